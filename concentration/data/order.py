"""The order in which samples are read: a pure function of (seed, epoch), so a place in it is all that a resumed run has to know.

A shuffled epoch permutes the shards, takes them in windows of a few, and permutes the samples inside each window. So reads stay
inside a few files, memory is O(window), and the sample at any place is found without walking the epoch. The permutations come
from a hash of counters and not from a library's random stream, so that they never change; golden values in the tests hold them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

_ORDER, _CLASS, _SAMPLE = 1, 2, 3  # one stream of random bits per purpose


class Stretch(NamedTuple):
    """The shards (by number) that are read together, and the place in the epoch's order at which the next shards begin."""

    shards: list[int]
    stop: int


class Order(Protocol):
    """Which sample stands at each place of each epoch."""

    def __len__(self) -> int:
        """The number of places in an epoch."""

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The ordinals of the samples at these places (each below the epoch's length)."""

    def stretch_at(self, epoch: int, place: int, shard_start: np.ndarray) -> Stretch:
        """The shards that are read around this place, so that remote ones can be fetched in time.

        Args:
            shard_start: (number of shards + 1,) the first ordinal of every shard, and the number of samples.
        """


class WindowOrder:
    """Every sample once an epoch: the shards are shuffled, and the samples inside windows of `window_shards` shards.

    Args:
        ordinals_by_shard: the ordinals that take part, by shard. If all samples of a shard do, a range takes no memory: any place
            among 100 million samples in 25,000 shards is found in milliseconds and with some megabytes.
        seed: the seed of all permutations.
        window_shards: how many shards a window has, which are read at the same time.
    """

    def __init__(self, ordinals_by_shard: Sequence[np.ndarray | range], seed: int, window_shards: int):
        self._shards = [ordinals for ordinals in ordinals_by_shard if len(ordinals)]
        self._lengths = np.array([len(ordinals) for ordinals in self._shards], dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self._length = int(self._lengths.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        _, starts = self._windows_of(epoch)
        windows = np.searchsorted(starts, places, side="right") - 1
        taken = np.empty(len(places), dtype=np.int64)
        for window in np.unique(windows):
            inside = windows == window
            taken[inside] = self._samples_of(epoch, int(window))[places[inside] - starts[window]]
        return taken

    def stretch_at(self, epoch: int, place: int, shard_start: np.ndarray) -> Stretch:
        _, starts = self._windows_of(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        firsts = np.array([ordinals[0] for ordinals in self._shards_of(epoch, window)])
        stop = starts[window + 1] if window + 1 < len(starts) else self._length
        return Stretch((np.searchsorted(shard_start, firsts, side="right") - 1).tolist(), int(stop))

    def _windows_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in this epoch, and the place at which each window starts. The last epoch's are kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            shard_order = permutation(len(self._shards), self._seed, _ORDER, epoch)
            ends = np.cumsum(self._lengths[shard_order])
            starts = np.concatenate([[0], ends])[:: self._window_shards]
            self._epoch = (epoch, shard_order, starts[starts < self._length])
        return self._epoch[1], self._epoch[2]

    def _samples_of(self, epoch: int, window: int) -> np.ndarray:
        """The shuffled ordinals of a window. The last window's are kept."""
        if self._window is None or self._window[0] != (epoch, window):
            ordinals = np.concatenate([_as_array(ordinals) for ordinals in self._shards_of(epoch, window)])
            shuffled = ordinals[permutation(len(ordinals), self._seed, _ORDER, epoch, window)]
            self._window = ((epoch, window), shuffled)
        return self._window[1]

    def _shards_of(self, epoch: int, window: int) -> list[np.ndarray | range]:
        shard_order, _ = self._windows_of(epoch)
        first = window * self._window_shards
        return [self._shards[shard] for shard in shard_order[first : first + self._window_shards]]


class ClassBalancedOrder:
    """Every place draws a class, all with equal probability, and then one of its samples, so that rare classes are seen often.

    Args:
        ordinals_by_class: for each class the ordinals of the samples with that label; classes without samples are left out.
        length: the number of places in an epoch.
        seed: the seed of all draws.
    """

    def __init__(self, ordinals_by_class: Sequence[np.ndarray], length: int, seed: int):
        self._classes = [ordinals for ordinals in ordinals_by_class if len(ordinals)]
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        drawn = random_bits(self._seed, _CLASS, epoch, places) % np.uint64(len(self._classes))
        inside = random_bits(self._seed, _SAMPLE, epoch, places)
        pairs = zip(drawn.tolist(), inside.tolist(), strict=True)
        return np.array([self._classes[c][bits % len(self._classes[c])] for c, bits in pairs], dtype=np.int64)

    def stretch_at(self, epoch: int, place: int, shard_start: np.ndarray) -> Stretch:
        """All shards for the whole epoch, since every place draws from all of them."""
        return Stretch(list(range(len(shard_start) - 1)), self._length)


class SequentialOrder:
    """The given samples in the given order in every epoch, for evaluation and for making targets."""

    def __init__(self, ordinals: np.ndarray):
        self._ordinals = ordinals

    def __len__(self) -> int:
        return len(self._ordinals)

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return self._ordinals[places]

    def stretch_at(self, epoch: int, place: int, shard_start: np.ndarray) -> Stretch:
        shard = int(np.searchsorted(shard_start, self._ordinals[place], side="right")) - 1
        later = self._ordinals[place:]
        outside = np.flatnonzero((later < shard_start[shard]) | (later >= shard_start[shard + 1]))
        return Stretch([shard], place + int(outside[0]) if len(outside) else len(self))


def _as_array(ordinals: np.ndarray | range) -> np.ndarray:
    return np.arange(ordinals.start, ordinals.stop) if isinstance(ordinals, range) else ordinals


def permutation(length: int, *keys: int) -> np.ndarray:
    """A permutation of range(length), int64, that depends on nothing but the keys."""
    return np.argsort(random_bits(*keys, np.arange(length)), kind="stable")


def random_bits(*keys: int | np.ndarray) -> np.ndarray:
    """64 random bits (uint64) that depend on nothing but the keys, which are integers; arrays among them are broadcast.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied after each key is mixed in.
    """
    with np.errstate(over="ignore"):
        bits = np.uint64(0x9E3779B97F4A7C15)
        for key in keys:
            bits = bits ^ np.asarray(key).astype(np.int64).view(np.uint64)
            bits = bits + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def uniforms(*keys: int | np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1), float64, from the upper 53 of `random_bits`."""
    return (random_bits(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
