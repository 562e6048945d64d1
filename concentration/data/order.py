"""The order of samples: a pure function of (seed, epoch), so that a position is all the state that a resumed run needs.

Shards are permuted, taken in windows of a few, and samples are permuted inside the window: reads stay inside a window of
files, memory is O(window), and seeking to any position is a look-up. The permutations come from a hash of counters, not
from a library's random stream, so they hold for ever; golden values in the tests keep them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_ORDER, _CLASS, _SAMPLE = 1, 2, 3  # one stream of random bits per purpose


class Order(Protocol):
    def __len__(self) -> int:
        """The number of places in an epoch."""

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The ordinals of the samples at these places (each below the epoch's length)."""


class WindowOrder:
    """Every sample once an epoch, shuffled by shard and inside windows of `window_shards` shards.

    Args:
        ordinals_by_shard: the samples that take part, by shard.
        seed: of the whole order.
        window_shards: the shards that are read at the same time.
    """

    def __init__(self, ordinals_by_shard: Sequence[np.ndarray], seed: int, window_shards: int):
        self._shards = [ordinals for ordinals in ordinals_by_shard if len(ordinals)]
        self._seed = seed
        self._window_shards = window_shards
        self._length = sum(len(ordinals) for ordinals in self._shards)
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

    def _windows_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place at which each window starts."""
        if self._epoch is None or self._epoch[0] != epoch:
            shard_order = permutation(len(self._shards), self._seed, _ORDER, epoch)
            lengths = np.array([len(self._shards[shard]) for shard in shard_order])
            ends = np.cumsum(lengths)
            starts = np.concatenate([[0], ends])[:: self._window_shards]
            self._epoch = (epoch, shard_order, starts[starts < self._length])
        return self._epoch[1], self._epoch[2]

    def _samples_of(self, epoch: int, window: int) -> np.ndarray:
        if self._window is None or self._window[0] != (epoch, window):
            shard_order, _ = self._windows_of(epoch)
            first = window * self._window_shards
            shards = shard_order[first : first + self._window_shards]
            ordinals = np.concatenate([self._shards[shard] for shard in shards])
            shuffled = ordinals[permutation(len(ordinals), self._seed, _ORDER, epoch, window)]
            self._window = ((epoch, window), shuffled)
        return self._window[1]


class ClassBalancedOrder:
    """Every place draws a class evenly, then one of the class's samples: rare classes are seen as often as common ones.

    Args:
        ordinals_by_class: the samples that have each label; classes without samples are left out.
        length: places in an epoch.
        seed: of all draws.
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


class SequentialOrder:
    """Samples as they lie in the shards; for evaluation and for making targets."""

    def __init__(self, ordinals: np.ndarray):
        self._ordinals = ordinals

    def __len__(self) -> int:
        return len(self._ordinals)

    def take(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return self._ordinals[places]


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
