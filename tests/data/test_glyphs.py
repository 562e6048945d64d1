import collections
import io
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from concentration.data.sources.glyphs import (
    FACES,
    GlyphsConfig,
    GlyphSource,
    draw_master,
    load_characters,
    load_font,
)
from concentration.data.split_assignment import SPLITS
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config

SMALL = GlyphsConfig(verticals=("greek", "cyrillic", "arrows"), num_classes=30, num_drawings=6)


@pytest.fixture(scope="module")
def full():
    return GlyphSource(GlyphsConfig())


@pytest.fixture(scope="module")
def taxonomy(full):
    return full.build_taxonomy()


@pytest.fixture(scope="module")
def masters():
    """(code point, face) to the bytes of the master bitmap, for every drawing of the data set."""
    fonts = [load_font(face, 64) for face in range(len(FACES))]
    return {
        (c.codepoint, face): draw_master(fonts[face], c.codepoint, 64).tobytes()
        for c in load_characters()
        for face in c.faces
    }


def list_split(source, split):
    return [item for item in source.list_items() if item.split == split]


def test_coarse_drawings_are_further_ones_and_have_the_parents_alone():
    coarse = GlyphSource(SMALL.model_copy(update={"num_coarse_drawings": 3}))
    parents = {c.id: c.parents for c in coarse.build_taxonomy().classes}
    plain = GlyphSource(SMALL)
    for split in SPLITS:
        found, expected = list_split(coarse, split), list_split(plain, split)
        further = [item for item in found if item not in expected]
        assert [item for item in found if item in expected] == expected
        assert len(further) == (3 * 30 if split == "train" else 0)
        for item in further:
            assert item.labels == parents[f"U+{item.locator[0]:04X}"]
            assert item.locator[2] >= SMALL.num_drawings


def test_the_default_is_1200_to_1300_leaves_in_12_unequal_verticals(taxonomy):
    leaves = [int(taxonomy.is_leaf[taxonomy.vertical_slice(v)].sum()) for v in taxonomy.verticals]
    assert len(leaves) == 12
    assert 1200 <= sum(leaves) <= 1300
    assert max(leaves) >= 6 * min(leaves)
    assert min(leaves) >= 35


def test_every_leaf_has_ancestors_and_all_parents_are_in_its_vertical(taxonomy):
    for output in range(taxonomy.num_classes):
        c = taxonomy.class_of_output(output)
        if taxonomy.is_leaf[output]:
            assert c.id.startswith("U+")
            assert taxonomy.output(c.vertical) in taxonomy.ancestors[output]
        assert all(taxonomy.classes[taxonomy.position[parent]].vertical == c.vertical for parent in c.parents)


def test_a_letter_has_several_parents(taxonomy):
    labels = {taxonomy.class_of_output(output).id for output in taxonomy.smear([taxonomy.output("U+00C1")])}
    assert labels >= {"latin", "latin/uppercase", "latin/block/latin-1", "latin/letter/a", "latin/accent/acute"}
    assert "latin/lowercase" not in labels


def test_inner_classes_hold_at_least_two_leaves_and_are_not_leaves(taxonomy):
    count = collections.Counter(
        a for o in range(taxonomy.num_classes) if taxonomy.is_leaf[o] for a in taxonomy.ancestors[o]
    )
    inner = [o for o in range(taxonomy.num_classes) if not taxonomy.class_of_output(o).id.startswith("U+")]
    assert all(count[o] >= 2 and not taxonomy.is_leaf[o] for o in inner)


def test_every_class_is_in_every_split_and_no_face_is_in_two(full, taxonomy):
    leaves = {c.id for c in taxonomy.classes if c.id.startswith("U+")}
    faces = {}
    for split in SPLITS:
        items = list_split(full, split)
        assert {label for item in items for label in item.labels} == leaves
        faces[split] = {item.locator[1] for item in items}
        assert all(FACES[face].split == split for face in faces[split])
    assert sum(map(len, faces.values())) == len(set().union(*faces.values())) == len(FACES)
    assert all("STIX" in FACES[face].file for face in faces["test"])


def test_keys_are_unique_and_hold_neither_dot_nor_slash(full):
    keys = [item.key for item in full.list_items()]
    assert len(set(keys)) == len(keys)
    assert not any("." in key or "/" in key for key in keys)


def test_every_class_has_its_number_of_training_drawings(full):
    count = collections.Counter(item.labels[0] for item in list_split(full, "train"))
    assert set(count.values()) == {GlyphsConfig().num_drawings}


def test_no_two_classes_share_a_master_bitmap(masters):
    owner = {}
    for (codepoint, face), bitmap in masters.items():
        assert owner.setdefault(bitmap, codepoint) == codepoint, f"U+{codepoint:04X} in {FACES[face].file}"


def test_no_master_bitmap_is_empty_or_in_two_splits(masters):
    split_of = {}
    for (codepoint, face), bitmap in masters.items():
        assert any(bitmap)
        assert split_of.setdefault(bitmap, FACES[face].split) == FACES[face].split, f"U+{codepoint:04X}, face {face}"


def test_drawings_are_the_same_in_another_process_and_order():
    source = GlyphSource(SMALL)
    items = list_split(source, "train")
    here = [source.read(item) for item in items]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = list(pool.map(GlyphSource(SMALL).read, reversed(items), chunksize=64))
    assert here == there[::-1]


def test_the_seed_changes_the_drawings_and_the_drawings_of_a_face_differ():
    source, other = GlyphSource(SMALL), GlyphSource(SMALL.model_copy(update={"seed": 1}))
    for split in SPLITS:
        drawings = [source.read(item)[1] for item in list_split(source, split)]
        assert len(set(drawings)) == len(drawings)
        assert not set(drawings) & {other.read(item)[1] for item in list_split(other, split)}


def test_the_pickle_is_small_although_masters_are_cached():
    source = GlyphSource(SMALL)
    before = len(pickle.dumps(source))
    for item in list_split(source, "train"):
        source.read(item)
    assert len(pickle.dumps(source)) == before


@pytest.mark.parametrize("size", [16, 32, 48])
def test_images_are_grey_squares_with_visible_ink(size):
    source = GlyphSource(SMALL.model_copy(update={"image_size": size}))
    for split in SPLITS:
        for item in list_split(source, split):
            extension, content = source.read(item)
            image = Image.open(io.BytesIO(content))
            assert (extension, image.format, image.mode, image.size) == ("png", "PNG", "L", (size, size))
            pixels = np.asarray(image, dtype=float)
            assert pixels.max() - np.median(pixels) > 60, item.key


def test_pixel_means_of_training_faces_recognise_unseen_faces_far_above_chance():
    source = GlyphSource(GlyphsConfig(verticals=("greek",), num_drawings=9, num_test_drawings=1))
    own = collections.defaultdict(list)
    for split in SPLITS:
        for item in list_split(source, split):
            pixels = np.asarray(Image.open(io.BytesIO(source.read(item)[1])), dtype=float).ravel()
            own[split, item.labels[0]].append((pixels - pixels.mean()) / pixels.std())
    classes = sorted({label for _, label in own})
    means = np.stack([np.mean(own["train", label], axis=0) for label in classes])
    hits = [classes[int((means @ drawing).argmax())] == label for label in classes for drawing in own["test", label]]
    # The nearest mean of nine drawings, without any shift or rotation; chance is 0.015.
    assert np.mean(hits) > 0.2


def test_num_classes_caps_the_leaves_in_proportion():
    taxonomy = GlyphSource(GlyphsConfig(num_classes=120)).build_taxonomy()
    leaves = {v: int(taxonomy.is_leaf[taxonomy.vertical_slice(v)].sum()) for v in taxonomy.verticals}
    assert sum(leaves.values()) == 120
    total = len(load_characters())
    for vertical, size in collections.Counter(c.vertical for c in load_characters()).items():
        assert abs(leaves[vertical] - 120 * size / total) <= 1


def test_verticals_keep_the_order_of_the_taxonomy():
    taxonomy = GlyphSource(GlyphsConfig(verticals=("arrows", "greek"))).build_taxonomy()
    assert taxonomy.verticals == ("greek", "arrows")


def test_an_unknown_vertical_is_a_config_error_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"no vertical 'grek'.*did you mean 'greek'"):
        GlyphSource(GlyphsConfig(verticals=("grek",)))
    with pytest.raises(ConfigError, match=r"valid: .*cyrillic"):
        GlyphSource(GlyphsConfig(verticals=("zzz",)))


@pytest.mark.parametrize("values", [{"verticals": ()}, {"verticals": ("greek", "greek")}, {"num_classes": 23}])
def test_a_selection_that_makes_no_taxonomy_is_a_config_error(values):
    with pytest.raises(ConfigError):
        GlyphSource(GlyphsConfig(**values))


def test_an_unknown_key_is_a_config_error():
    with pytest.raises(ConfigError, match="num_drawings"):
        parse_config(GlyphsConfig, {"num_drawing": 3})


def test_a_missing_font_is_a_data_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    source = GlyphSource(SMALL)
    with pytest.raises(DataError, match="pip install matplotlib"):
        source.read(list_split(source, "val")[0])


def test_listing_needs_neither_matplotlib_nor_fonts():
    code = (
        "import sys; from concentration.data.sources.glyphs import *;"
        "GlyphSource(GlyphsConfig()).list_items(); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
