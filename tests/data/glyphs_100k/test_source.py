"""The source on eleven characters: what is drawn, how tiers are cut, and `prepare` and training on them."""

import collections
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from concentration.data.distortions import DistortionConfig
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.sources.glyphs_100k import classes, source
from concentration.data.sources.glyphs_100k.classes import Character, Face
from concentration.data.sources.glyphs_100k.source import Glyphs100kConfig, Glyphs100kSource
from concentration.data.split import load_split
from concentration.data.views import ViewConfig
from concentration.errors import DataError
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared

FACES = [
    Face("p", "f", 0, name, split)
    for name, split in zip("AABCD", ("train", "train", "train", "val", "test"), strict=True)
]


def build(fonts, **values) -> Glyphs100kSource:
    return Glyphs100kSource(Glyphs100kConfig(path=fonts, **values))


def test_every_face_draws_its_characters_in_its_split(fonts):
    items = build(fonts).list_items()
    assert collections.Counter(item.split for item in items) == {"train": 33, "val": 11, "test": 11}
    assert len({item.key for item in items}) == len(items)
    assert [item.key for item in items[:5]] == ["u0041-f000", "u0041-f002", "u0041-f003", "u0041-f004", "u0041-f001"]


def test_the_taxonomy_is_vertical_group_character(fonts):
    taxonomy = build(fonts).build_taxonomy()
    assert taxonomy.verticals == ("latin", "greek", "digits")
    assert taxonomy.lineage(taxonomy.output("U+0061")) == ("latin", "small", "a LETTER a")


def test_a_drawing_is_a_png_of_16_greys(fonts):
    source = build(fonts)
    for item in source.list_items():
        extension, content = source.read(item)
        image = Image.open(io.BytesIO(content))
        assert (extension, image.format, image.mode, image.size) == ("png", "PNG", "L", (48, 48))
        pixels = np.asarray(image)
        assert (pixels % 17 == 0).all()
        assert pixels.max() > 200
        assert 40 < len(content) < 600


def test_training_drawings_are_capped_and_typefaces_come_first(fonts):
    items = [item for item in build(fonts, max_drawings=2).list_items() if item.split == "train"]
    assert {item.locator[1] for item in items if item.labels == ("U+0041",)} == {0, 2}


def test_tiers_take_of_each_vertical_its_share_spread_or_most_drawn(monkeypatch):
    wide, narrow = (0, 2, 4), (0, 4)
    characters = [Character(n, f"v{n // 40}", "g", str(n), wide if n % 4 == 3 else narrow, ()) for n in range(160)]
    monkeypatch.setattr(source, "load_characters", lambda: characters)
    monkeypatch.setattr(classes, "load_faces", lambda: FACES)
    spread, most = (
        [c.codepoint for c in build("nowhere", num_classes=40, prefer=prefer)._select()]
        for prefer in ("spread", "typefaces")
    )
    assert spread == list(range(0, 160, 4))
    assert most == list(range(3, 160, 4))
    assert len(build("nowhere", num_classes=1000)._select()) == 160


def test_a_missing_font_is_a_data_error_that_says_what_to_do(fonts):
    shutil.rmtree(next(fonts.glob("fonts-stix*")))
    source = build(fonts)
    with pytest.raises(DataError, match=r"STIXGeneral.ttf: no such file; run `concentrate prepare`"):
        source.read(next(item for item in source.list_items() if item.split == "test"))


def test_prepare_writes_packs_that_are_read_in_many_views_and_goes_on_where_it_was_stopped(fonts, tmp_path):
    view = ViewConfig(distortion=DistortionConfig(rotate=10, noise=0.1))
    values = {"data": {"kind": "glyphs_100k", "path": fonts, "image_size": 32, "view": view}, "samples_per_shard": 9}
    config = PrepareConfig(workdir=tmp_path, num_processes=1, **values)
    prepare(config)
    shards = tmp_path / "shards"
    assert len(list(shards.glob("train-*.pack"))) == 4
    assert not list(shards.glob("*.tar"))
    before = {file.name: file.read_bytes() for file in shards.glob("*.[pi]*")}
    for name in ("DONE.json", "train-000001.pack", "train-000001.skipped", "val-000000.skipped"):
        (shards / name).unlink()
    prepare(config)
    assert {file.name: file.read_bytes() for file in shards.glob("*.[pi]*")} == before
    prepared, taxonomy, _ = load_prepared(tmp_path, DataOverrides())
    split = load_split(shards, "train", taxonomy)
    reader = SampleReader(split, LabelTargets(split, smear=True), prepared.image_size, prepared.view, 0)
    first, second = (reader.read(np.arange(33), epoch) for epoch in (0, 1))
    assert first.images.shape == (33, 3, 32, 32)
    assert (first.images != second.images).any(dim=(1, 2, 3)).sum() > 25, "but where both views are rounded to nothing"
    assert not first.skipped_B.any()


def test_the_pickle_holds_no_fonts(fonts):
    source = build(fonts)
    source.read(source.list_items()[0])
    assert source.__getstate__()["_fonts"] == {}
