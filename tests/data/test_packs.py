"""Packs: what is written is what a reader of shards reads, and nothing is left by halves."""

import numpy as np
import pytest

from concentration.data.index import ShardIndex
from concentration.data.packs import PACK_SUFFIX, write_pack
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.sources.source import Item, LocalSource
from concentration.data.split import load_split
from concentration.errors import DataError


class Pictures(LocalSource):
    """Images by key; those without one cannot be read."""

    def __init__(self, images: dict[str, bytes]):
        self._images = images

    def read(self, item: Item) -> tuple[str, bytes]:
        if item.key not in self._images:
            raise DataError(f"{item.key}: gone")
        return "png", self._images[item.key]


@pytest.fixture
def items() -> list[Item]:
    labels = (("osprey",), ("taxi", "ramen"), ("gull",), ("tram",), ("egg",))
    return [Item(f"k{number}-ä", ids, None) for number, ids in enumerate(labels)]


@pytest.fixture
def images(items, encode_image) -> dict[str, bytes]:
    return {item.key: encode_image("png", (8, 8), seed) for seed, item in enumerate(items)}


def test_a_reader_reads_what_was_written(tmp_path, taxonomy, items, images):
    assert write_pack(tmp_path / f"train-000000{PACK_SUFFIX}", items, Pictures(images), taxonomy) == []
    assert (tmp_path / "train-000000.pack").read_bytes() == b"".join(images.values())
    split = load_split(tmp_path, "train", taxonomy)
    reader = SampleReader(split, LabelTargets(split, smear=False), 8, None, 0)
    for ordinal, item in enumerate(items):
        assert reader.read_encoded(ordinal) == images[item.key]
        assert split.key(ordinal) == f"train-000000.pack/{item.key}"
        assert {taxonomy.class_of_output(output).id for output in split.labels(ordinal)} == set(item.labels)
    assert reader.read(np.arange(5), 0).images.shape == (5, 3, 8, 8)


def test_images_that_cannot_be_had_are_named_and_left_out(tmp_path, taxonomy, items, images):
    del images[items[1].key]
    path = tmp_path / "val-000003.pack"
    assert write_pack(path, items, Pictures(images), taxonomy) == ["k1-ä: gone"]
    index = ShardIndex.load(path.with_suffix(".index"))
    assert index.keys == ("k0-ä", "k2-ä", "k3-ä", "k4-ä")
    assert write_pack(path, items, Pictures({}), taxonomy) == [f"{item.key}: gone" for item in items]
    assert list(tmp_path.iterdir()) == []


def test_the_same_samples_give_the_same_bytes(tmp_path, taxonomy, items, images):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_pack(tmp_path / name / "train-000000.pack", items, Pictures(images), taxonomy)
        written.append([(file.name, file.read_bytes()) for file in sorted((tmp_path / name).iterdir())])
    assert written[0] == written[1]


def test_a_truncated_pack_is_one_error_line(tmp_path, taxonomy, items, images):
    path = tmp_path / "train-000000.pack"
    write_pack(path, items, Pictures(images), taxonomy)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated or has changed"):
        len(load_split(tmp_path, "train", taxonomy))


def test_a_full_disk_is_one_error_line_and_leaves_nothing(tmp_path, taxonomy, items, images, monkeypatch):
    def write_bytes(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    with pytest.raises(DataError, match="No space left"):
        write_pack(tmp_path / "train-000000.pack", items, Pictures(images), taxonomy)
    assert list(tmp_path.iterdir()) == []
