"""Finds what looks alike: typefaces that are one design under two names, and characters that most typefaces draw the same.

Nothing imports this module at run time.

Shapes: F faces, D drawings of all faces, P bitmaps of a face that are kept to be compared, S the side of a bitmap.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from concentration.data.sources.glyphs_100k.font_files import FaceDrawings

#: A bitmap that a face draws for so many characters is a placeholder for characters that it lacks.
PLACEHOLDER_COUNT = 12

#: Two bitmaps are nearly equal if their squared distance is below this share of the smaller one's squared length.
NEAR_DISTANCE = 0.05
#: Two faces are one design if they have at least so many characters in common, and this share of them is nearly equal.
MIN_COMPARED, NEAR_SHARE = 8, 0.5

#: Two characters look alike if this share of the faces that draw both draws them with the same bitmap.
SAME_SHARE = 0.5


def drop_placeholders(drawings: FaceDrawings) -> FaceDrawings:
    """The drawings without bitmaps that stand for `PLACEHOLDER_COUNT` characters or more."""
    _, inverse, count = np.unique(drawings.digest, return_inverse=True, return_counts=True)
    return drawings.restrict(drawings.codepoint[count[inverse] < PLACEHOLDER_COUNT].tolist())


def merge_typefaces(typefaces: Sequence[str], drawings: Sequence[FaceDrawings]) -> dict[str, str]:
    """Merges typefaces that are nearly the same: the common name of each, by its own name.

    Two typefaces are compared by the pair of their faces that has most characters in common.

    Args:
        typefaces: (F,) the typeface of each face.
        drawings: (F,) the drawings of each face.
    """
    all_kept = np.unique(np.concatenate([d.kept_codepoint for d in drawings])).tolist()
    place = {codepoint: n for n, codepoint in enumerate(all_kept)}
    draws = [sum(1 << place[codepoint] for codepoint in d.kept_codepoint.tolist()) for d in drawings]  # a bit for each
    faces_of: dict[str, list[int]] = {}
    for face, name in enumerate(typefaces):
        faces_of.setdefault(name, []).append(face)
    links = _Union(sorted(faces_of))
    for left, right in itertools.combinations(sorted(faces_of), 2):
        pairs = itertools.product(faces_of[left], faces_of[right])
        num_common, one, other = max(((draws[a] & draws[b]).bit_count(), a, b) for a, b in pairs)
        if num_common >= MIN_COMPARED and _are_nearly_the_same(drawings[one], drawings[other]):
            links.join(left, right)
    return {name: links.find(name) for name in faces_of}


def _are_nearly_the_same(left: FaceDrawings, right: FaceDrawings) -> bool:
    """Whether the bitmaps of most characters that both faces draw are nearly equal; about 64 of them are compared."""
    _, at_left, at_right = np.intersect1d(
        left.kept_codepoint, right.kept_codepoint, assume_unique=True, return_indices=True
    )
    step = max(1, len(at_left) // 64)
    pixels = [d.kept[at[::step]].astype(np.float32) for d, at in ((left, at_left), (right, at_right))]
    distance = ((pixels[0] - pixels[1]) ** 2).sum(axis=(1, 2))
    length = np.minimum(*((p**2).sum(axis=(1, 2)) for p in pixels))
    return bool((distance < NEAR_DISTANCE * length).mean() >= NEAR_SHARE)


def merge_characters(drawings: Iterable[FaceDrawings], rank: Mapping[int, int]) -> dict[int, int]:
    """Merges characters that look alike: the code point that stands for each, which has the lowest rank of those that are merged.

    Args:
        drawings: the drawings of each face.
        rank: the rank of each code point.
    """
    num_same: Counter[tuple[int, int]] = Counter()
    faces_of: dict[int, int] = dict.fromkeys(rank, 0)  # a bit for each face
    for number, d in enumerate(drawings):
        for codepoint in d.codepoint.tolist():
            faces_of[codepoint] |= 1 << number
        for group in groups_of_equal(d):
            num_same.update(itertools.combinations(group, 2))
    links = _Union(sorted(rank, key=rank.get))
    for (left, right), count in num_same.items():
        if count >= SAME_SHARE * (faces_of[left] & faces_of[right]).bit_count():
            links.join(left, right)
    return {codepoint: links.find(codepoint) for codepoint in rank}


def groups_of_equal(drawings: FaceDrawings) -> Iterable[list[int]]:
    """Yields each list of two or more code points, ascending, that a face draws with the same bitmap."""
    order = np.lexsort((drawings.codepoint, drawings.digest))
    digest, codepoint = drawings.digest[order], drawings.codepoint[order]
    for group in np.split(codepoint, np.flatnonzero(np.diff(digest)) + 1):
        if len(group) > 1:
            yield group.tolist()


class _Union:
    """Disjoint sets (union-find). A set is named after the first of its members in the order given."""

    def __init__(self, members: Sequence):
        self._rank = {member: number for number, member in enumerate(members)}
        self._parent = {member: member for member in members}

    def find(self, member):
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, left, right) -> None:
        first, second = sorted((self.find(left), self.find(right)), key=self._rank.get)
        self._parent[second] = first
