"""Finds near-duplicates between splits: images of `test` that are copies of training images, by their perceptual hashes.

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

#: In how many bits the hashes of near-duplicates may differ. With more than 6, bands become so short that a million images reach
#: `MAX_COMPARED`.
MaxDistance = Annotated[int, pydantic.Field(ge=0, le=6)]

#: How many pairs are listed for any two splits; all pairs are counted.
MAX_LISTED = 1000
#: How many pairs of hashes are compared for any two splits, which takes a minute. A million different images need far fewer
#: (15 million at a distance of 3), but 100,000 images that agree in one band would need 2.5 billion, and the time grows with
#: the square of their number.
MAX_COMPARED = 2**30

#: The least standard deviation of an image's grey levels for which it gets a hash. Below it, hashes mean nothing: fewer than one
#: in six copies that were saved again stay within 3 bits, and all blank images would be each other's copies.
_MIN_CONTRAST = 2.0
#: The side in pixels to which an image is decoded before `imagehash` reduces it to 32: larger, so that little detail is lost, and
#: small, so that large photographs are decoded fast.
_IMAGE_SIZE = 64
#: How many candidate pairs are compared at once.
_BLOCK = 2**20


class WholeImage:
    """The view of a whole image, which is stretched to a square; implements `Views`."""

    def at(self, row: int, size: tuple[int, int]) -> View:
        return View(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of samples from different splits whose hashes differ in few bits.

    Attributes:
        sample_P2: int64, the listed pairs: for any two splits the `MAX_LISTED` with the smallest distance. The sample of the
            split with the lower number comes first. Of the samples of one split that share a hash, only the first is listed.
        distance_P: uint8, the number of bits that differ, ascending for any two splits.
        num_pairs: the number of all pairs of samples, listed or not.
        num_twins: for any two splits (the lower number first): how many samples of the first, and of the second, are in a pair.
        num_left_out: how many candidate pairs of hashes were not compared, because there were more than `MAX_COMPARED`. Some of
            them may be near-duplicates that are missing here.
    """

    sample_P2: np.ndarray
    distance_P: np.ndarray
    num_pairs: int
    num_twins: Mapping[tuple[int, int], tuple[int, int]]
    num_left_out: int


def hash_image(content: bytes) -> int | None:
    """The perceptual hash of an encoded image, 64 bits; None for a blank image, which has no structure to hash.

    Exactly 32 of the bits are set, so the distance of two hashes is always even.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.

    Source: `imagehash.phash`: which of the 8 x 8 lowest frequencies are above their median.
    """
    pixels = decode_view(content, WholeImage(), 0, _IMAGE_SIZE)[0]
    grey = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    if np.asarray(grey).std() < _MIN_CONTRAST:
        return None
    return int(str(imagehash.phash(grey)), 16)


def find_near_duplicates(hash_N: np.ndarray, split_N: np.ndarray, max_distance: int) -> NearDuplicates:
    """All pairs of samples from different splits whose hashes differ in at most `max_distance` bits.

    The bits of a hash are divided into max_distance + 1 bands, so that two hashes within that distance agree in at least one
    whole band. Only pairs that agree in a band are candidates, and candidates beyond `MAX_COMPARED` are left out. Memory is O(N).
    For 1 million random hashes, half in each of two splits, bands of 16 bits (max_distance=3) give 15 million candidates.

    Args:
        hash_N: uint64, from `hash_image`.
        split_N: integers, the number of each sample's split.
        max_distance: the fewer, the longer the bands, and the faster the search.
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
    """The distinct hashes of one split: each hash (U,) uint64, the first sample that has it, and how many samples have it."""

    hash_U: np.ndarray
    first_U: np.ndarray
    count_U: np.ndarray

    @classmethod
    def of(cls, hash_N: np.ndarray, samples: np.ndarray) -> "_Distinct":
        hash_U, first_U, count_U = np.unique(hash_N[samples], return_index=True, return_counts=True)
        return cls(hash_U, samples[first_U], count_U)


@dataclass(frozen=True)
class _Band:
    """One band of bits, and for each hash of the left split its candidates: the hashes of the right split that agree in the band.

    Attributes:
        mask: the bits of the band.
        order_U: the places of the right hashes, sorted by the band's bits. The candidates of a left hash are
            `order_U[start:start + count]`.
        start_U, count_U: where the candidates of each left hash begin in `order_U`, and how many there are.
        is_compared_U: bool, whether the candidates of a left hash are compared. If there are too many in all, only those of the
            left hashes with the fewest candidates are.
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
    """The max_distance + 1 bands of about equal width, which share `MAX_COMPARED` equally."""
    edges = [HASH_BITS * number // (max_distance + 1) for number in range(max_distance + 2)]
    masks = [np.uint64((1 << stop) - (1 << start)) for start, stop in itertools.pairwise(edges)]
    return [_Band.of(mask, left_U, right_U, MAX_COMPARED // len(masks)) for mask in masks]


def _join(
    bands: Sequence[_Band], left_U: np.ndarray, right_U: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the pairs within `max_distance` block by block: their places in `left_U` and in `right_U`, and their distances.

    A pair that agrees in several bands is found in each of them, and yielded for the first.
    """
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
    """The `MAX_LISTED` nearest pairs, and their distances."""
    order = np.lexsort((sample_P2[:, 1], sample_P2[:, 0], distance_P))[:MAX_LISTED]
    return sample_P2[order], distance_P[order]
