"""Images of several characters: what they are labelled with, how characters come together, and that they are reproducible."""

import collections
import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from concentration.data.sources.glyph_scenes import GlyphScenesConfig, GlyphScenesSource
from concentration.data.sources.glyphs import FACES, GlyphsConfig, GlyphSource
from concentration.errors import ConfigError
from concentration.schema import parse_config

SMALL = GlyphScenesConfig(num_classes=60, num_images=3000, num_val_images=20, num_test_images=40, num_topics=4)


@pytest.fixture(scope="module")
def source():
    return GlyphScenesSource(SMALL)


@pytest.fixture(scope="module")
def items(source):
    return source.list_items()


def test_splits_have_the_images_that_are_asked_for(items):
    assert collections.Counter(item.split for item in items) == {"train": 3000, "val": 20, "test": 40}
    assert len({item.key for item in items}) == len(items)


def test_the_classes_are_those_of_the_single_characters(source):
    expected = GlyphSource(GlyphsConfig(num_classes=60)).build_taxonomy()
    assert source.build_taxonomy().fingerprint == expected.fingerprint


def test_an_image_has_one_to_four_different_characters_each_in_a_cell_of_its_own(items):
    counts = collections.Counter(len(item.labels) for item in items)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 500
    for item in items:
        assert len(set(item.labels)) == len(item.labels)
        _, placed = item.locator
        assert tuple(f"U+{codepoint:04X}" for _, _, codepoint, _ in placed) == item.labels
        cells = {(round(left / 24), round(top / 24)) for left, top, _, _ in placed}
        assert len(cells) == len(placed)
        assert all(0 <= left <= 24 and 0 <= top <= 24 for left, top, _, _ in placed)


def test_no_typeface_is_in_two_splits(items):
    for item in items:
        assert {FACES[face].split for _, _, _, face in item.locator[1]} == {item.split}


def test_popularity_has_a_long_tail(items):
    counts = sorted(collections.Counter(label for item in items for label in item.labels).values())
    assert counts[-1] > 10 * np.median(counts)
    assert len(counts) == 60
    flat = GlyphScenesSource(SMALL.model_copy(update={"tail": 0.0})).list_items()
    flat_counts = sorted(collections.Counter(label for item in flat for label in item.labels).values())
    assert flat_counts[-1] < 2 * np.median(flat_counts)


def mutual_information(items) -> float:
    """Of the two characters of a pair, in nats: 0 where they come together by chance."""
    ids = sorted({label for item in items for label in item.labels})
    place = {class_id: number for number, class_id in enumerate(ids)}
    joint = np.zeros((len(ids), len(ids)))
    for item in items:
        for left, right in itertools.permutations(item.labels, 2):
            joint[place[left], place[right]] += 1
    joint /= joint.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / expected[seen])).sum())


def test_topics_make_characters_come_together_across_verticals(source, items):
    train = [item for item in items if item.split == "train"]
    without = [
        i for i in GlyphScenesSource(SMALL.model_copy(update={"affinity": 1.0})).list_items() if i.split == "train"
    ]
    assert mutual_information(train) > 2 * mutual_information(without)
    taxonomy = source.build_taxonomy()
    verticals = [{taxonomy.classes[taxonomy.position[label]].vertical for label in item.labels} for item in train]
    assert np.mean([len(of_image) > 1 for of_image in verticals]) > 0.3


def test_the_topic_of_an_image_is_that_of_its_characters(source, items):
    probability_TL = source.topic_probabilities()
    np.testing.assert_allclose(probability_TL.sum(axis=1), 1)
    place = {character.class_id: number for number, character in enumerate(source._glyphs.characters)}
    train = [item for item in items if item.split == "train" and len(item.labels) == 4]
    topic_of = dict(zip((i.key for i in items if i.split == "train"), source.draw_topics("train"), strict=True))
    guessed = [int(np.log(probability_TL[:, [place[label] for label in i.labels]]).sum(1).argmax()) for i in train]
    assert np.mean([topic_of[i.key] == guess for i, guess in zip(train, guessed, strict=True)]) > 0.7


def test_images_are_grey_squares_in_which_each_character_is_seen(source, items):
    for item in items[:10] + items[-10:]:
        extension, content = source.read(item)
        image = Image.open(io.BytesIO(content))
        assert (extension, image.format, image.mode, image.size) == ("png", "PNG", "L", (48, 48))
        pixels = np.asarray(image, dtype=float)
        for left, top, _, _ in item.locator[1]:
            inside = pixels[top : top + 24, left : left + 24]
            assert inside.max() - np.median(inside) > 50, item.key


def test_an_image_depends_on_config_and_number_alone(items):
    other = pickle.loads(pickle.dumps(GlyphScenesSource(SMALL)))
    again = other.list_items()
    assert again == items
    assert [other.read(item) for item in reversed(again[:20])] == [
        GlyphScenesSource(SMALL).read(i) for i in items[19::-1]
    ]
    longer = GlyphScenesSource(SMALL.model_copy(update={"num_images": 3500})).list_items()
    assert longer[:3000] == items[:3000], "more images leave the others as they were"
    moved = GlyphScenesSource(SMALL.model_copy(update={"seed": 1})).list_items()
    assert sum(a.labels == b.labels for a, b in zip(items, moved, strict=True)) < 300


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_characters": 5}, "the 4 places of data.cells=2"),
        ({"min_characters": 3, "max_characters": 2}, "expected the first to be at most the second"),
        ({"image_size": 16, "cells": 3}, "data.image_size=24 at least"),
        ({"affinity": 0.5}, "affinity"),
        ({"num_image": 3}, "did you mean 'num_images'"),
    ],
)
def test_a_mistake_is_a_config_error(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(GlyphScenesConfig, values)
