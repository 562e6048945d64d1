"""The order of samples: a pure function of (seed, epoch), so that a position is all the state that a resumed run needs.

Shards are permuted and taken in windows of a few, and samples are permuted inside a window: so reads stay inside a few files,
memory is O(window), and any position is found by a look-up. The permutations come from a hash of counters, not from a
library's random stream, so they never change; golden values in the tests make sure of that.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

_ORDER, _CLASS, _SAMPLE = 1, 2, 3  # one stream of random bits per purpose


class Stretch(NamedTuple):
    """The numbers of the shards that are read together, and the place in the epoch at which the next ones begin."""

    shards: list[int]
    stop: int


class Order(Protocol):
    def __len__(self) -> int:
        """The number of places in an epoch."""

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The ordinals of the samples at these places (each below the epoch's length)."""

    def stretch_at(self, epoch: int, place: int, shard_start: np.ndarray) -> Stretch:
        """What is read around this place. `shard_start`: the first ordinal of every shard, and their number."""


class WindowOrder:
    """Every sample once an epoch, shuffled by shard and inside windows of `window_shards` shards.

    Args:
        ordinals_by_shard: the samples that take part, by shard. Ranges, where all do, take no memory: any place among 100 million
            samples in 25,000 shards is found in milliseconds and with some megabytes.
        seed: the seed of the whole order.
        window_shards: how many shards are read at the same time.
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
        """The epoch's order of shards, and the place at which each window starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            shard_order = permutation(len(self._shards), self._seed, _ORDER, epoch)
            ends = np.cumsum(self._lengths[shard_order])
            starts = np.concatenate([[0], ends])[:: self._window_shards]
            self._epoch = (epoch, shard_order, starts[starts < self._length])
        return self._epoch[1], self._epoch[2]

    def _samples_of(self, epoch: int, window: int) -> np.ndarray:
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
    """Every place draws a class, each with equal probability, then one of its samples: rare classes are seen as often as others.

    Args:
        ordinals_by_class: for each class the samples with that label; classes without samples are left out.
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
        """All shards, always: a rare class's samples lie anywhere."""
        return Stretch(list(range(len(shard_start) - 1)), self._length)


class SequentialOrder:
    """Samples as they lie in the shards; for evaluation and for making targets."""

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
    """A permutation of range(length), int64, that depends on the keys alone."""
    return np.argsort(random_bits(*keys, np.arange(length)), kind="stable")


def random_bits(*keys: int | np.ndarray) -> np.ndarray:
    """64 random bits for each combination of counters; arrays among the keys are broadcast.

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
    """Numbers in [0, 1), float64, from `random_bits`."""
    return (random_bits(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
