"""Near-duplicates between splits: images of `test` that training has all but seen, found by their perceptual hashes.

Shapes: N samples, U hashes of one split that differ, P pairs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

from concentration.data.views import View, decode_view

HASH_BITS = 64
#: Pairs that are listed for two splits; all are counted.
MAX_LISTED = 1000

#: The least standard deviation of an image's greys. Under it, a copy that was saved again agrees in all but 3 bits in less
#: than one of six cases, and blank images would all be each other's copies.
_MIN_CONTRAST = 2.0
#: Of both sides before the hash's own reduction to 32: finer, and large photographs are still decoded small.
_IMAGE_SIZE = 64
#: Candidates that are compared at a time.
_BLOCK = 2**20


class _WholeImage:
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
        has_twin_N: bool, the samples that are in any pair.
    """

    sample_P2: np.ndarray
    distance_P: np.ndarray
    num_pairs: int
    has_twin_N: np.ndarray


def hash_image(content: bytes) -> int | None:
    """The perceptual hash of an encoded image, 64 bits; None for a blank image, which has no structure to hash.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.

    Source: `imagehash.phash`, the signs of the 8 x 8 lowest frequencies; 32 are set, so distances are even.
    """
    pixels, _ = decode_view(content, _WholeImage(), 0, _IMAGE_SIZE)
    grey = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    if np.asarray(grey).std() < _MIN_CONTRAST:
        return None
    return int(str(imagehash.phash(grey)), 16)


def find_near_duplicates(hash_N: np.ndarray, split_N: np.ndarray, max_distance: int) -> NearDuplicates:
    """All pairs of samples in different splits whose hashes differ in at most `max_distance` bits; none is missed.

    Hashes are cut into max_distance + 1 bands: two that differ in max_distance bits agree in one band at least. Memory is
    O(N). 16-bit bands (a distance of 3) compare 15 million candidates for 1 million random hashes, half in each split.

    Args:
        hash_N: uint64, from `hash_image`.
        split_N: integers, the split of each sample.
        max_distance: at most 3 keeps bands long, and the search fast.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    num_pairs, has_twin_N = 0, np.zeros(len(hash_N), dtype=bool)
    members = [np.flatnonzero(split_N == split) for split in np.unique(split_N)]
    distinct = [_Distinct.of(hash_N, samples) for samples in members]
    for left, right in itertools.combinations(distinct, 2):
        listed = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.uint8)
        is_left_U, is_right_U = np.zeros(len(left.hash_U), dtype=bool), np.zeros(len(right.hash_U), dtype=bool)
        for a_P, b_P, distance_P in _join(left.hash_U, right.hash_U, max_distance):
            num_pairs += int(left.count_U[a_P] @ right.count_U[b_P])
            is_left_U[a_P], is_right_U[b_P] = True, True
            sample_P2 = np.stack([left.first_U[a_P], right.first_U[b_P]], axis=1)
            listed = _keep_nearest(np.concatenate([listed[0], sample_P2]), np.concatenate([listed[1], distance_P]))
        parts.append(listed)
        has_twin_N[left.sample_N[is_left_U[left.inverse_N]]] = True
        has_twin_N[right.sample_N[is_right_U[right.inverse_N]]] = True
    if not parts:
        return NearDuplicates(np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.uint8), 0, has_twin_N)
    return NearDuplicates(
        np.concatenate([pairs for pairs, _ in parts]), np.concatenate([d for _, d in parts]), num_pairs, has_twin_N
    )


@dataclass(frozen=True)
class _Distinct:
    """The hashes of one split, each once: (U,) with their first sample and count, (N,) samples and which hash is theirs."""

    hash_U: np.ndarray
    first_U: np.ndarray
    count_U: np.ndarray
    sample_N: np.ndarray
    inverse_N: np.ndarray

    @classmethod
    def of(cls, hash_N: np.ndarray, samples: np.ndarray) -> "_Distinct":
        hash_U, first_U, inverse_N, count_U = np.unique(
            hash_N[samples], return_index=True, return_inverse=True, return_counts=True
        )
        return cls(hash_U, samples[first_U], count_U, samples, inverse_N)


def _join(left_U: np.ndarray, right_U: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of places in `left_U` and in `right_U`, and their distance; each pair comes once."""
    edges = [HASH_BITS * number // (max_distance + 1) for number in range(max_distance + 2)]
    masks = [np.uint64((1 << stop) - (1 << start)) for start, stop in itertools.pairwise(edges)]
    for number, mask in enumerate(masks):
        order_U = np.argsort(right_U & mask)
        sorted_U = (right_U & mask)[order_U]
        start_U = np.searchsorted(sorted_U, left_U & mask, side="left")
        end_U = np.cumsum(np.searchsorted(sorted_U, left_U & mask, side="right") - start_U)
        for first in range(0, int(end_U[-1]), _BLOCK):
            candidate_P = np.arange(first, min(first + _BLOCK, int(end_U[-1])))
            a_P = np.searchsorted(end_U, candidate_P, side="right")
            before_P = np.where(a_P > 0, end_U[a_P - 1], 0)
            b_P = order_U[start_U[a_P] + candidate_P - before_P]
            differs_P = left_U[a_P] ^ right_U[b_P]
            distance_P = np.bitwise_count(differs_P)
            is_found_P = distance_P <= max_distance
            for earlier in masks[:number]:  # these came with that band
                is_found_P &= (differs_P & earlier) != 0
            yield a_P[is_found_P], b_P[is_found_P], distance_P[is_found_P]


def _keep_nearest(sample_P2: np.ndarray, distance_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((sample_P2[:, 1], sample_P2[:, 0], distance_P))[:MAX_LISTED]
    return sample_P2[order], distance_P[order]
