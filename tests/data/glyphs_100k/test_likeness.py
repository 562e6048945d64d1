"""What looks alike, on bitmaps of a few pixels."""

import numpy as np
import pytest

from concentration.data.sources.glyphs_100k.font_files import FaceDrawings
from concentration.data.sources.glyphs_100k.likeness import (
    PLACEHOLDER_COUNT,
    drop_placeholders,
    groups_of_equal,
    merge_characters,
    merge_typefaces,
)


def face(digests: dict[int, int], bitmaps: dict[int, np.ndarray] | None = None) -> FaceDrawings:
    kept = dict(sorted((bitmaps or {}).items()))
    pixels = np.stack(list(kept.values())) if kept else np.empty((0, 4, 4), np.uint8)
    codepoints = sorted(digests)
    return FaceDrawings(
        np.array(codepoints, np.int64),
        np.array([digests[c] for c in codepoints], np.int64),
        np.array(list(kept), np.int64),
        pixels,
    )


def test_a_bitmap_of_many_characters_is_a_placeholder():
    digests = {c: 7 for c in range(PLACEHOLDER_COUNT)} | {100: 8, 101: 8, 102: 9}
    bitmaps = {c: np.ones((4, 4), np.uint8) for c in (0, 100)}
    left = drop_placeholders(face(digests, bitmaps))
    assert left.codepoint.tolist() == [100, 101, 102]
    assert left.kept_codepoint.tolist() == [100]
    assert list(groups_of_equal(left)) == [[100, 101]]


@pytest.fixture
def drawings() -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    return {c: generator.integers(0, 16, (4, 4)).astype(np.uint8) for c in range(40)}


def test_typefaces_that_draw_most_characters_nearly_alike_are_one(drawings):
    other = {c: np.random.default_rng(c + 100).integers(0, 16, (4, 4)).astype(np.uint8) for c in drawings}
    nearly = {c: np.clip(bitmap.astype(int) + (c % 2), 0, 15).astype(np.uint8) for c, bitmap in drawings.items()}
    few = {c: drawings[c] for c in range(5)}
    digests = {c: c for c in drawings}
    faces = [
        face(digests, bitmaps) for bitmaps in (drawings, other, nearly, few, {c: b for c, b in other.items() if c > 9})
    ]
    merged = merge_typefaces(["B", "A", "C", "D", "E"], faces)
    assert merged == {"A": "A", "B": "B", "C": "B", "D": "D", "E": "A"}


def test_characters_that_half_of_the_faces_draw_alike_are_one():
    faces = [face({1: 10, 2: 10, 3: 30}), face({1: 11, 2: 12, 3: 11}), face({1: 13, 3: 14}), face({3: 15, 4: 15})]
    rank = {1: 1, 2: 2, 3: 0, 4: 4}
    assert merge_characters(faces, rank) == {1: 1, 2: 1, 3: 3, 4: 3}


def test_being_alike_is_passed_on_and_the_lowest_rank_stands_for_all():
    faces = [face({5: 1, 6: 1}), face({6: 2, 7: 2})]
    assert merge_characters(faces, {5: 9, 6: 1, 7: 0}) == {5: 7, 6: 7, 7: 7}
