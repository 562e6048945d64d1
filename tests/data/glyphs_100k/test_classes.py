"""The shipped lists: whatever the version of Python, these are the classes."""

import collections
import importlib.util
from pathlib import Path

import pytest

from concentration.data.sources.glyphs_100k.classes import build_taxonomy, count_typefaces, load_characters, load_faces
from concentration.data.sources.glyphs_100k.packages import load_packages
from concentration.data.sources.glyphs_100k.source import Glyphs100kSource

_SPEC = importlib.util.spec_from_file_location(
    "glyphs_100k_datasheet", Path(__file__).parents[3] / "docs" / "glyphs_100k.py"
)
datasheet = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(datasheet)


@pytest.fixture(scope="module")
def taxonomy():
    return build_taxonomy(load_characters())


def test_there_are_100_000_characters_in_20_unequal_verticals(taxonomy):
    sizes = collections.Counter(c.vertical for c in load_characters())
    assert sum(sizes.values()) > 100_000
    assert len(sizes) == taxonomy.num_verticals == 20
    assert max(sizes.values()) > 5 * min(sizes.values())


def test_every_character_is_drawn_by_two_training_typefaces_and_a_test_one():
    for character in load_characters():
        assert count_typefaces(character, "train") >= 2, character
        assert count_typefaces(character, "test") >= 1, character
        assert len(set(character.faces)) == len(character.faces)


def test_a_typeface_is_in_one_split_and_its_packages_are_known():
    splits = collections.defaultdict(set)
    for face in load_faces():
        splits[face.typeface].add(face.split)
        assert face.package in load_packages()
    assert all(len(found) == 1 for found in splits.values())
    assert splits["TW-Kai"] == splits["Noto Sans"] == {"test"}


def test_characters_and_their_look_alikes_come_once():
    points = [p for c in load_characters() for p in (c.codepoint, *c.others)]
    assert len(points) == len(set(points))


def test_the_tree_is_vertical_group_character(taxonomy):
    assert len(taxonomy.lineage(taxonomy.output("U+4E00"))) == 3
    assert all(
        len(taxonomy.ancestors[output]) == 2 for output in range(taxonomy.num_classes) if taxonomy.is_leaf[output]
    )


@pytest.mark.parametrize(("name", "size"), [("glyphs_30k", 30_000), ("glyphs_5k", 5_000)])
def test_tiers_have_all_verticals_in_proportion(name, size):
    taxonomy = Glyphs100kSource(datasheet.load_tier(name)).build_taxonomy()
    assert taxonomy.num_verticals == 20
    assert size - 40 <= taxonomy.is_leaf.sum() <= size + 40


def test_the_datasheet_is_up_to_date():
    assert datasheet.PAGE.read_text(encoding="utf-8") == datasheet.write_page(), "run `python docs/glyphs_100k.py`"
