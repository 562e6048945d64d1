"""Near-duplicates between splits: images of `test` that training has all but seen, found by their perceptual hashes.

Shapes: N samples, U hashes of one split that differ, P pairs.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import imagehash
import numpy as np
import pydantic
from PIL import Image

from concentration.data.views import View, decode_view

HASH_BITS = 64

#: Bits in which near-duplicates may differ. With more, bands are so short that a million images come to `MAX_COMPARED`.
MaxDistance = Annotated[int, pydantic.Field(ge=0, le=6)]

#: Pairs that are listed for two splits; all are counted.
MAX_LISTED = 1000
#: Pairs of hashes of two splits that are compared: a minute. A million different images stay far below it (15 million at a
#: distance of 3), but a hundred thousand that all agree in one band come to 2.5 billion, and time grows with their square.
MAX_COMPARED = 2**30

#: The least standard deviation of an image's greys. Under it, a copy that was saved again agrees in all but 3 bits in less
#: than one of six cases, and blank images would all be each other's copies.
_MIN_CONTRAST = 2.0
#: Of both sides before the hash's own reduction to 32: finer, and large photographs are still decoded small.
_IMAGE_SIZE = 64
#: Candidates that are compared at a time.
_BLOCK = 2**20


class WholeImage:
    """The whole image, which becomes square; implements `Views`."""

    def at(self, row: int, size: tuple[int, int]) -> View:
        return View(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of samples in different splits whose hashes differ in few bits.

    Attributes:
        sample_P2: int64, the nearest pairs of every two splits, at most `MAX_LISTED`; the sample of the lower split comes
            first. Samples of one split with one hash, thousands perhaps, are listed once, by the first of them.
        distance_P: uint8, the bits that differ, rising for every two splits.
        num_pairs: of samples, listed or not.
        num_twins: by two splits, the lower one first: the samples of the first, and of the second, that are in their pairs.
        num_left_out: pairs of hashes that agree in a band, and were too many to be compared (`MAX_COMPARED`). Some of them
            may be pairs that are missing here.
    """

    sample_P2: np.ndarray
    distance_P: np.ndarray
    num_pairs: int
    num_twins: Mapping[tuple[int, int], tuple[int, int]]
    num_left_out: int


def hash_image(content: bytes) -> int | None:
    """The perceptual hash of an encoded image, 64 bits; None for a blank image, which has no structure to hash.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.

    Source: `imagehash.phash`, the signs of the 8 x 8 lowest frequencies; 32 are set, so distances are even.
    """
    pixels = decode_view(content, WholeImage(), 0, _IMAGE_SIZE)[0]
    grey = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    if np.asarray(grey).std() < _MIN_CONTRAST:
        return None
    return int(str(imagehash.phash(grey)), 16)


def find_near_duplicates(hash_N: np.ndarray, split_N: np.ndarray, max_distance: int) -> NearDuplicates:
    """Pairs of samples in different splits whose hashes differ in at most `max_distance` bits; all, up to `MAX_COMPARED`.

    Hashes are cut into max_distance + 1 bands: two that differ in max_distance bits agree in one band at least. Memory is
    O(N). 16-bit bands (a distance of 3) compare 15 million candidates for 1 million random hashes, half in each split.

    Args:
        hash_N: uint64, from `hash_image`.
        split_N: integers, the split of each sample.
        max_distance: at most 3 keeps bands long, and the search fast.
    """
    listed = [(np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.uint8))]
    num_pairs = num_left_out = 0
    num_twins: dict[tuple[int, int], tuple[int, int]] = {}
    distinct = {int(split): _Distinct.of(hash_N, np.flatnonzero(split_N == split)) for split in np.unique(split_N)}
    for (left_split, left), (right_split, right) in itertools.combinations(distinct.items(), 2):
        nearest = listed[0]  # none yet
        is_left_U, is_right_U = np.zeros(len(left.hash_U), dtype=bool), np.zeros(len(right.hash_U), dtype=bool)
        bands = _cut_into_bands(left.hash_U, right.hash_U, max_distance)
        for a_P, b_P, distance_P in _join(bands, left.hash_U, right.hash_U, max_distance):
            num_pairs += int(left.count_U[a_P] @ right.count_U[b_P])
            is_left_U[a_P], is_right_U[b_P] = True, True
            sample_P2 = np.stack([left.first_U[a_P], right.first_U[b_P]], axis=1)
            nearest = _keep_nearest(np.concatenate([nearest[0], sample_P2]), np.concatenate([nearest[1], distance_P]))
        listed.append(nearest)
        num_left_out += sum(band.num_left_out for band in bands)
        num_twins[left_split, right_split] = int(left.count_U @ is_left_U), int(right.count_U @ is_right_U)
    return NearDuplicates(
        np.concatenate([sample_P2 for sample_P2, _ in listed]),
        np.concatenate([distance_P for _, distance_P in listed]),
        num_pairs,
        num_twins,
        num_left_out,
    )


@dataclass(frozen=True)
class _Distinct:
    """The hashes of one split, (U,), each once, with their first sample and count."""

    hash_U: np.ndarray
    first_U: np.ndarray
    count_U: np.ndarray

    @classmethod
    def of(cls, hash_N: np.ndarray, samples: np.ndarray) -> "_Distinct":
        hash_U, first_U, count_U = np.unique(hash_N[samples], return_index=True, return_counts=True)
        return cls(hash_U, samples[first_U], count_U)


@dataclass(frozen=True)
class _Band:
    """Some of the bits, and for each hash of the left those of the right that agree with it in them: its candidates.

    Attributes:
        mask: the bits.
        order_U: places of the right's hashes; `order_U[start:start + count]` are the candidates of a hash of the left.
        start_U, count_U: of each hash of the left.
        is_compared_U: bool, whether its candidates are looked at; those with the fewest are.
    """

    mask: np.uint64
    order_U: np.ndarray
    start_U: np.ndarray
    count_U: np.ndarray
    is_compared_U: np.ndarray

    @classmethod
    def of(cls, mask: np.uint64, left_U: np.ndarray, right_U: np.ndarray, max_compared: int) -> "_Band":
        order_U = np.argsort(right_U & mask)
        sorted_U = (right_U & mask)[order_U]
        start_U = np.searchsorted(sorted_U, left_U & mask, side="left")
        count_U = np.searchsorted(sorted_U, left_U & mask, side="right") - start_U
        rising_U = np.argsort(count_U, kind="stable")
        is_compared_U = np.empty(len(left_U), dtype=bool)
        is_compared_U[rising_U] = np.cumsum(count_U[rising_U]) <= max_compared
        return cls(mask, order_U, start_U, count_U, is_compared_U)

    @property
    def num_left_out(self) -> int:
        return int(self.count_U[~self.is_compared_U].sum())


def _cut_into_bands(left_U: np.ndarray, right_U: np.ndarray, max_distance: int) -> list[_Band]:
    edges = [HASH_BITS * number // (max_distance + 1) for number in range(max_distance + 2)]
    masks = [np.uint64((1 << stop) - (1 << start)) for start, stop in itertools.pairwise(edges)]
    return [_Band.of(mask, left_U, right_U, MAX_COMPARED // len(masks)) for mask in masks]


def _join(
    bands: Sequence[_Band], left_U: np.ndarray, right_U: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of places in `left_U` and in `right_U`, and their distance; each pair comes once."""
    for number, band in enumerate(bands):
        end_U = np.cumsum(band.count_U * band.is_compared_U)
        for first in range(0, int(end_U[-1]), _BLOCK):
            candidate_P = np.arange(first, min(first + _BLOCK, int(end_U[-1])))
            a_P = np.searchsorted(end_U, candidate_P, side="right")
            before_P = np.where(a_P > 0, end_U[a_P - 1], 0)
            b_P = band.order_U[band.start_U[a_P] + candidate_P - before_P]
            differs_P = left_U[a_P] ^ right_U[b_P]
            distance_P = np.bitwise_count(differs_P)
            is_found_P = distance_P <= max_distance
            for earlier in bands[:number]:
                came_earlier_P = ((differs_P & earlier.mask) == 0) & earlier.is_compared_U[a_P]
                is_found_P &= ~came_earlier_P
            yield a_P[is_found_P], b_P[is_found_P], distance_P[is_found_P]


def _keep_nearest(sample_P2: np.ndarray, distance_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((sample_P2[:, 1], sample_P2[:, 0], distance_P))[:MAX_LISTED]
    return sample_P2[order], distance_P[order]
