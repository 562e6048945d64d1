"""Shards are plain WebDataset tars: read with webdataset itself, the same bytes every time, whole or not there."""

from pathlib import Path

import pytest
import webdataset
from labelled_shards import encode_labels

from concentration.data.shards import write_shard
from concentration.data.sources.source import Item
from concentration.errors import DataError


class FakeSource:
    """Gives its images by key; where there is none, it cannot be had."""

    def __init__(self, images: dict[str, tuple[str, bytes]]):
        self._images = images

    def read(self, item: Item) -> tuple[str, bytes]:
        if item.key not in self._images:
            raise DataError(f"{item.key}: cannot be decoded")
        return self._images[item.key]


@pytest.fixture
def source(encode_image) -> FakeSource:
    images = {f"{extension}-1": (extension, encode_image(extension)) for extension in ("png", "jpg", "webp")}
    return FakeSource(images | {"jpeg-1": ("jpeg", encode_image("jpg", seed=9))})


ITEMS = [
    Item("webp-1", ("gull", "taxi"), None),
    Item("png-1", ("gull",), None),
    Item("jpeg-1", ("é字",), None),
    Item("jpg-1", ("soup",), None),
]


def read(path: Path) -> list[dict]:
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    return [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in samples
    ]


def test_webdataset_reads_the_items_in_their_order(source, tmp_path):
    assert write_shard(tmp_path / "a.tar", ITEMS, source) == []
    expected = []
    for item in ITEMS:
        extension, image = source.read(item)
        label = encode_labels(*item.labels)
        expected.append({"__key__": item.key, extension: image, "json": label})
    assert read(tmp_path / "a.tar") == expected


def test_the_same_items_give_the_same_bytes_whenever_and_wherever(source, tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", ITEMS, source)
    monkeypatch.setattr("time.time", lambda: 4e9)
    (tmp_path / "elsewhere").mkdir()
    write_shard(tmp_path / "elsewhere" / "b.tar", ITEMS, source)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "elsewhere" / "b.tar").read_bytes()


def test_images_that_cannot_be_had_are_listed_and_left_out(source, tmp_path):
    items = [Item("gone-1", ("gull",), None), *ITEMS[:2], Item("gone-2", ("gull",), None)]
    assert write_shard(tmp_path / "a.tar", items, source) == ["gone-1: cannot be decoded", "gone-2: cannot be decoded"]
    assert [sample["__key__"] for sample in read(tmp_path / "a.tar")] == ["webp-1", "png-1"]


def test_without_any_image_there_is_no_tar_not_even_an_older_one(source, tmp_path):
    write_shard(tmp_path / "a.tar", ITEMS, source)
    assert len(write_shard(tmp_path / "a.tar", [Item("gone", ("gull",), None)], source)) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_older_tar_and_nothing_else(source, tmp_path):
    write_shard(tmp_path / "a.tar", ITEMS[:2], source)
    before = (tmp_path / "a.tar").read_bytes()

    class Interrupted(FakeSource):
        def read(self, item):
            if item.key == "jpeg-1":
                raise KeyboardInterrupt
            return source.read(item)

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", ITEMS, Interrupted({}))
    assert (tmp_path / "a.tar").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_folder_that_cannot_be_written_is_named(source, tmp_path):
    with pytest.raises(DataError, match=r"gone/a\.tar: cannot be written \(No such file or directory\)"):
        write_shard(tmp_path / "gone" / "a.tar", ITEMS, source)


def test_a_full_disk_is_named(source, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match=r"a\.tar: cannot be written \(No space left on device\); free space"):
        write_shard(tmp_path / "a.tar", ITEMS, source)
    assert list(tmp_path.iterdir()) == []
