"""The census's decisions on drawings made up of numbers; and, where the fonts are, the whole of it."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concentration.data.sources.glyphs_100k import census
from concentration.data.sources.glyphs_100k.census import MAX_FACES, assign_typefaces, cut_radicals, find_classes
from concentration.data.sources.glyphs_100k.classes import CLASSES_PATH, FACES_PATH
from concentration.data.sources.glyphs_100k.font_files import FaceDrawings
from concentration.data.sources.glyphs_100k.packages import load_packages
from concentration.data.sources.glyphs_100k.unicode_tables import UnicodeCharacter

SPLIT_OF = {"A": "train", "B": "train", "V": "val", "T": "test"}


def draw(digests: dict[int, int]) -> FaceDrawings:
    codepoints = sorted(digests)
    nothing = np.empty(0, np.int64)
    return FaceDrawings(
        np.array(codepoints, np.int64), np.array([digests[c] for c in codepoints], np.int64), nothing, nothing
    )


def find(faces: list[tuple[str, dict[int, int]]]) -> dict[int, tuple[int, ...]]:
    characters = {c: UnicodeCharacter(c, str(c), "Latin", "Basic Latin", 0) for _, d in faces for c in d}
    found = find_classes(characters, [draw(d) for _, d in faces], [name for name, _ in faces], SPLIT_OF)
    return {f.character.codepoint: f.faces for f in found}


def test_a_class_needs_two_training_typefaces_and_a_test_one():
    faces = [("A", {1: 1, 2: 2, 3: 3}), ("A", {2: 20}), ("B", {1: 10, 3: 30}), ("V", {1: 5}), ("T", {1: 11, 2: 21})]
    assert find(faces) == {1: (0, 2, 3, 4)}


def test_a_drawing_that_a_held_out_face_has_is_no_training_drawing():
    faces = [("A", {1: 1, 2: 1000}), ("B", {1: 10, 2: 7}), ("A", {1: 3, 2: 8}), ("T", {1: 1, 2: 9})]
    assert find(faces) == {1: (1, 2, 3), 2: (0, 1, 3, 2)}


def test_look_alikes_are_one_class_and_shared_drawings_belong_to_the_first():
    faces = [("A", {1: 1, 2: 1, 3: 3}), ("B", {1: 2, 2: 2, 3: 4}), ("B", {1: 5, 3: 5}), ("T", {1: 6, 2: 6, 3: 7})]
    assert find(faces) == {1: (0, 1, 3, 2), 3: (0, 1, 3)}


def test_typefaces_take_turns_up_to_the_limit():
    faces = [("A", {1: n}) for n in range(5)] + [("B", {1: 100})] + [("T", {1: 200 + n}) for n in range(6)]
    (chosen,) = find(faces).values()
    assert chosen[:4] == (0, 5, 6, 1)
    assert len([face for face in chosen if face >= 6]) <= MAX_FACES["test"]


def test_a_typeface_that_is_nearly_a_held_out_one_is_held_out():
    names = {name: name for name in (*census.TEST_TYPEFACES, *census.VAL_TYPEFACES, "Other")}
    names["Twin"] = names["TW-Kai"] = "TW-Kai"
    split_of = assign_typefaces(names)
    assert split_of["TW-Kai"] == "test"
    assert split_of["Other"] == "train"


@given(st.lists(st.integers(0, 50), min_size=4, max_size=9), st.integers(1, 4))
def test_radicals_are_cut_so_that_the_largest_part_is_as_small_as_it_can_be(sizes, num_parts):
    starts = cut_radicals(sizes, num_parts)
    assert starts[0] == 1
    assert starts[-1] == len(sizes) + 1
    assert starts == sorted(set(starts))
    assert len(starts) - 1 <= num_parts

    def largest(bounds) -> int:
        return max(sum(sizes[a:b]) for a, b in itertools.pairwise(bounds))

    best = min(
        largest([0, *cuts, len(sizes)])
        for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), num_parts - 1)
    )
    assert largest([start - 1 for start in starts]) == best


@pytest.mark.long
def test_the_census_finds_what_is_shipped(tmp_path, monkeypatch):
    folder = Path(os.environ.get("GLYPHS_100K_FONTS", "runs/fonts"))
    missing = [package.name for package in load_packages().values() if not package.folder(folder).is_dir()]
    if missing:
        pytest.skip(
            f"NOT TESTED: {len(missing)} font packages are not in {folder} (GLYPHS_100K_FONTS); the census fetches them"
        )
    shipped = FACES_PATH.read_bytes(), CLASSES_PATH.read_bytes()
    monkeypatch.setattr(census, "FACES_PATH", tmp_path / "faces.tsv")
    monkeypatch.setattr(census, "CLASSES_PATH", tmp_path / "classes.tsv.xz")
    census.take_census(folder)
    assert ((tmp_path / "faces.tsv").read_bytes(), (tmp_path / "classes.tsv.xz").read_bytes()) == shipped
