"""Folders of images as people have them: one level or many, split or not, linked, with names of every kind."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from concentration.data.index import index_shard
from concentration.data.shards import write_shard
from concentration.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from concentration.data.split_assignment import SPLITS, assign_splits
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config


@pytest.fixture
def put(tmp_path, encode_image):
    """(path, ...): writes an image of its own under each path below the root, and returns the root."""
    root = tmp_path / "images"

    def write(*paths: str) -> Path:
        for relative in paths:
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            extension = path.suffix[1:].lower().replace("jpeg", "jpg")
            path.write_bytes(encode_image(extension, (9, 7), seed=sum(os.fsencode(relative))))
        return root

    return write


def open_folder(root: Path, **options) -> ImageFolderSource:
    return ImageFolderSource(parse_config(ImageFolderConfig, {"path": root, **options}))


def list_all(source: ImageFolderSource) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By path: split and labels."""
    items = source.list_items()
    splits = assign_splits(items, source.split, kept={}).splits
    return {item.locator: (split, item.labels) for item, split in zip(items, splits, strict=True)}


def describe(source: ImageFolderSource) -> list[tuple[str, tuple[str, ...], str]]:
    return [(c.id, c.parents, c.vertical) for c in source.build_taxonomy().classes]


def refuse(root: Path, *expected: str, **options) -> None:
    with pytest.raises(DataError) as caught:
        open_folder(root, **options).build_taxonomy()
    for text in expected:
        assert text in str(caught.value)


def test_a_folder_per_class_is_one_vertical(put):
    root = put("cat/1.jpg", "cat/2.png", "dog/1.webp", "ant/x.jpeg")
    source = open_folder(root)
    assert describe(source) == [("ant", (), "all"), ("cat", (), "all"), ("dog", (), "all")]
    found = list_all(source)
    assert {path: labels for path, (_, labels) in found.items()} == {
        f"{root}/ant/x.jpeg": ("ant",),
        f"{root}/cat/1.jpg": ("cat",),
        f"{root}/cat/2.png": ("cat",),
        f"{root}/dog/1.webp": ("dog",),
    }


def test_a_folder_per_vertical_holds_its_classes_and_deeper_ones_their_subclasses(put):
    root = put(
        "birds/gull/1.png",
        "birds/raptor/2.png",
        "birds/raptor/osprey/3.png",
        "birds/raptor/kite/red/4.png",
        "cars/taxi/1.png",
        "cars/tram/1.png",
    )
    source = open_folder(root)
    assert describe(source) == [
        ("birds/gull", (), "birds"),
        ("birds/raptor", (), "birds"),
        ("birds/raptor/kite", ("birds/raptor",), "birds"),
        ("birds/raptor/kite/red", ("birds/raptor/kite",), "birds"),
        ("birds/raptor/osprey", ("birds/raptor",), "birds"),
        ("cars/taxi", (), "cars"),
        ("cars/tram", (), "cars"),
    ]
    taxonomy = source.build_taxonomy()
    assert taxonomy.lineage(taxonomy.output("birds/raptor/kite/red")) == ("raptor", "kite", "red")
    assert list_all(source)[f"{root}/birds/raptor/2.png"][1] == ("birds/raptor",), (
        "an inner class has images of its own"
    )


def test_given_splits_are_kept_and_missing_ones_are_taken_from_train(put):
    paths = [f"{split}/{c}/{n}.png" for split in SPLITS for c in ("a", "b") for n in range(20)]
    root = put(*paths)
    assert {path: split for path, (split, _) in list_all(open_folder(root)).items()} == {
        f"{root}/{path}": path.split("/")[0] for path in paths
    }
    shutil.rmtree(root / "val")
    found = list_all(open_folder(root, split={"val_share": 0.3}))
    assert {split for path, (split, _) in found.items() if path.startswith(f"{root}/train")} == {"train", "val"}
    assert {split for path, (split, _) in found.items() if path.startswith(f"{root}/test")} == {"test"}
    assert {labels for _, labels in found.values()} == {("a",), ("b",)}


def test_a_sample_keeps_its_split_when_images_come_or_the_folder_is_moved(put, tmp_path):
    root = put(*(f"c{n % 7}/{n}.png" for n in range(150)))
    before = {str(Path(path).relative_to(root)): split for path, (split, _) in list_all(open_folder(root)).items()}
    assert set(before.values()) == set(SPLITS)
    put(*(f"c{n % 7}/0{n}.png" for n in range(60)), "new/1.png")
    root.rename(tmp_path / "elsewhere")
    after = list_all(open_folder(tmp_path / "elsewhere"))
    assert len(after) == 211
    for path, split in before.items():
        assert after[f"{tmp_path}/elsewhere/{path}"][0] == split


def test_the_shares_of_splits_are_those_of_the_config(put):
    root = put(*(f"c{n % 2}/{n}.png" for n in range(600)))
    splits = [split for split, _ in list_all(open_folder(root, split={"val_share": 0.2, "test_share": 0.3})).values()]
    for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        assert abs(splits.count(split) - 600 * share) < 4 * (600 * share * (1 - share)) ** 0.5
    source = open_folder(root, split={"val_share": 0, "test_share": 0})
    assert {split for split, _ in list_all(source).values()} == {"train"}


def test_what_a_path_holds_may_group_images(put):
    root = put(*(f"train/c{n % 2}/shoe{n // 5}_{n}.png" for n in range(100)), "test/c0/shoe1_x.png")
    source = open_folder(root, split={"group": r"/(shoe\d+)_", "val_share": 0.5})
    items, found = source.list_items(), list_all(source)
    assert {item.group for item in items} == {f"shoe{n}" for n in range(20)}
    split_of: dict[str, set[str]] = {}
    for item in items:
        split_of.setdefault(item.group, set()).add(found[item.locator][0])
    assert split_of.pop("shoe1") >= {"test"}, "the source's own test stays, also where it tears a group"
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set().union(*split_of.values()) == {"train", "val"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(", "split.group=\\(: no regular expression"),
        ("shoe", "split.group=shoe: has no parenthesis; put one around the group"),
        (r"/(b\d)", r"data\.split\.group=/\(b\\d\): finds no group in 'x/a1\.png'; correct it"),
        (r"(b)?1", "finds no group in 'x/a1.png'"),
    ],
)
def test_a_pattern_that_finds_no_group_is_refused(pattern, expected, put):
    root = put("x/b1.png", "x/a1.png", "y/b1.png")
    with pytest.raises(ConfigError, match=expected):
        open_folder(root, split={"group": pattern}).list_items()


def test_a_folder_for_validation_has_one_of_three_names(put):
    for name in ("val", "valid", "validation"):
        root = put("train/a/1.png", "train/b/1.png", f"{name}/a/1.png", f"{name}/b/1.png")
        found = list_all(open_folder(root, split={"test_share": 0}))
        assert [split for path, (split, _) in found.items() if f"/{name}/" in path] == ["val", "val"]
        assert {labels for _, labels in found.values()} == {("a",), ("b",)}
        shutil.rmtree(root / name)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALID", "TEST"),
        ("training", "dev", "testing"),
        ("Training", "Dev", "Testing"),
    ],
)
def test_splits_have_several_names_in_capitals_or_not(train, val, test, put):
    splits = {train: "train", val: "val", test: "test"}
    root = put(*(f"{name}/{c}/1.png" for name in splits for c in ("a", "b")))
    source = open_folder(root)
    assert {item.locator: item.split for item in source.list_items()} == {
        f"{root}/{name}/{c}/1.png": split for name, split in splits.items() for c in ("a", "b")
    }
    assert describe(source) == [("a", (), "all"), ("b", (), "all")]
    assert source.list_notes() == []


def test_a_training_folder_is_a_split_where_it_is_the_only_one_or_another_split_is_beside_it(put):
    root = put("Training/a/1.png", "Training/b/1.png", ".cache/x/1.png")
    assert describe(open_folder(root)) == [("a", (), "all"), ("b", (), "all")]
    put("extra/c/1.png", "dev/a/1.png")
    source = open_folder(root)
    assert describe(source) == [("a", (), "all"), ("b", (), "all")]
    assert source.list_notes() == [f"{root}: folders beside Training/ are not read: extra"]


def test_a_class_may_be_called_train(put):
    """COCO's car, bus, train: without another split beside it, it does not swallow them."""
    root = put("bus/1.png", "car/1.png", "train/1.png")
    source = open_folder(root, split={"val_share": 0, "test_share": 0})
    assert describe(source) == [("bus", (), "all"), ("car", (), "all"), ("train", (), "all")]
    assert {labels for _, labels in list_all(source).values()} == {("bus",), ("car",), ("train",)}
    assert source.list_notes() == [
        f"{root}: train/ is taken for a class or vertical, not for a split; for that, put a val/ or test/ beside it"
    ]


def test_test_and_val_are_classes_where_nothing_is_for_training(put):
    source = open_folder(put("test/1.png", "val/1.png"))
    assert describe(source) == [("test", (), "all"), ("val", (), "all")]


@pytest.mark.parametrize(
    ("twice", "split"),
    [
        (("val", "validation"), "val"),
        (("dev", "val"), "val"),
        (("Train", "train"), "train"),
        (("test", "testing"), "test"),
    ],
)
def test_two_folders_of_one_split_are_refused(twice, split, put):
    names = {"train", *twice} if split != "train" else set(twice)
    root = put(*(f"{name}/{c}/1.png" for name in names for c in ("a", "b")))
    refuse(root, f"images: holds {' and '.join(twice)}, which all mean {split}; keep one of these folders")


def test_what_is_not_read_is_said(put):
    root = put("train/a/1.png", "train/b/1.JPG", "test/a/1.png", "extra/c/1.png")
    for name in ("a/2.GIF", "a/3.gif", "b/4.bmp", "b/README"):
        (root / "train" / name).write_bytes(b"")
    assert open_folder(root).list_notes() == [
        f"{root}: folders beside train/ are not read: extra",
        f"{root}: ignored files that are not .jpg, .jpeg, .png, .webp: 1 without any, 1 .bmp, 2 .gif",
    ]
    shutil.rmtree(root)
    assert open_folder(put("a/1.png", "b/1.png")).list_notes() == []


def test_workers_get_no_listing(put):
    source = open_folder(put(*(f"c{n % 2}/{n}.png" for n in range(100))))
    source.list_items()
    assert len(pickle.dumps(source)) < 1500


def test_the_listing_does_not_depend_on_the_file_system(put, monkeypatch):
    root = put("b/2.png", "a/1.png", "a/x/1.png", "a/10.png", "b/1.jpg")
    listed = open_folder(root).list_items()
    walk = os.walk

    def walk_backwards(*args, **options):
        for folder, inner, files in walk(*args, **options):
            inner.reverse()
            yield folder, inner, files[::-1]

    monkeypatch.setattr(os, "walk", walk_backwards)
    assert open_folder(root).list_items() == listed


def test_images_are_stored_as_they_are_and_indexed_whatever_the_case_of_their_names(put, tmp_path):
    root = put("a/1.JPG", "a/2.Jpeg", "a/3.PNG", "b/4.WebP")
    source = open_folder(root)
    items = source.list_items()
    assert write_shard(tmp_path / "a.tar", items, source) == []
    index = index_shard(tmp_path / "a.tar", source.build_taxonomy(), "a.tar")
    assert index.keys == tuple(item.key for item in items)
    content = (tmp_path / "a.tar").read_bytes()
    for item, start, size in zip(items, index.image_offset, index.image_size, strict=True):
        assert content[start : start + size] == Path(item.locator).read_bytes()
        assert source.read(item) == (Path(item.locator).suffix[1:].lower(), Path(item.locator).read_bytes())


def test_keys_are_unique_and_webdataset_reads_them_back_whole(put):
    names = (
        "鳥/カモメ/1.5.png",
        "鳥/カモメ/1-5.png",
        "鳥/カモメ/1_5.png",
        "鳥/カラス/1.5.png",
        "鳥/カラス/1.5.jpg",
        "été/crêpe & co/a b.png",
        "été/glace/a..b.png",
        f"été/x/{'long' * 50}1.png",
        f"été/x/{'long' * 50}2.png",
    )
    source = open_folder(put(*names))
    keys = [item.key for item in source.list_items()]
    assert len(set(keys)) == len(keys) == len(names)
    for key in keys:
        assert base_plus_ext(f"{key}.png") == (key, "png")
        assert key.isascii()
        assert len(key) < 90, "with its extension a name in the oldest tar format"
    assert {c.vertical for c in source.build_taxonomy().classes} == {"鳥", "été"}


def test_links_are_followed_and_loops_are_not(put, tmp_path, encode_image):
    """As when a subset of a data set is made of links to its folders or images."""
    root = put("birds/gull/1.png", "birds/kite/1.png")
    elsewhere = tmp_path / "elsewhere" / "tram"
    elsewhere.mkdir(parents=True)
    (elsewhere / "1.png").write_bytes(encode_image())
    (root / "cars").symlink_to(tmp_path / "elsewhere")
    (root / "cars" / "taxi").symlink_to(elsewhere)
    (root / "birds" / "kite" / "2.png").symlink_to(elsewhere / "1.png")
    (root / "birds" / "gull" / "again").symlink_to(root / "birds")
    (root / "birds" / "gull" / "self").symlink_to("self")
    source = open_folder(root)
    assert sorted(labels for _, labels in list_all(source).values()) == [
        ("birds/gull",),
        ("birds/kite",),
        ("birds/kite",),
        ("cars/taxi",),
        ("cars/tram",),
    ]


def test_links_that_lead_to_each_other_are_followed_once(put, tmp_path):
    root = put("v/a/1.png", "v/b/1.png")
    (root / "v" / "a" / "tob").symlink_to("../b")
    (root / "v" / "b" / "toa").symlink_to("../a")
    (root / "v" / "b" / "out").symlink_to(tmp_path)
    (root / "v" / "b" / "everything").symlink_to("/")
    assert sorted(labels for _, labels in list_all(open_folder(root)).values()) == [
        ("v/a",),
        ("v/a/tob",),
        ("v/b",),
        ("v/b/toa",),
    ]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_had(put):
    root = put("a/1.png", "b/1.png")
    (root / "b" / "2.png").symlink_to(root / "gone.png")
    source = open_folder(root)
    items = {item.locator.removeprefix(f"{root}/"): item for item in source.list_items()}
    with pytest.raises(DataError) as caught:
        source.read(items["b/2.png"])
    assert str(caught.value) == f"{root}/b/2.png: is a link to '{root}/gone.png', which is missing"
    (root / "b" / "1.png").unlink()
    with pytest.raises(DataError) as caught:
        source.read(items["b/1.png"])
    assert str(caught.value) == f"{root}/b/1.png: is missing"


def test_a_pipe_is_not_waited_for(put):
    root = put("a/1.png", "b/1.png")
    os.mkfifo(root / "b" / "2.png")
    source = open_folder(root)
    [pipe] = [item for item in source.list_items() if item.locator == f"{root}/b/2.png"]
    with pytest.raises(DataError, match=r"b/2\.png: cannot be decoded \(no file, but a folder, a pipe or a device\)"):
        source.read(pipe)


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"<html>", lambda c: c[:40]])
def test_an_image_that_cannot_be_decoded_is_named(damage, put):
    root = put("a/1.png", "b/1.png")
    path = root / "a" / "1.png"
    path.write_bytes(damage(path.read_bytes()))
    source = open_folder(root)
    with pytest.raises(DataError, match=r"images/a/1\.png: cannot be decoded") as caught:
        source.read(source.list_items()[0])
    assert "BytesIO" not in str(caught.value)


def test_an_image_beside_folders_of_classes_is_refused(put):
    put("cat/1.png", "dog/1.png", "3.png")
    refuse(put(), "images/3.png", "no class's folder", "move it")
    shutil.rmtree(put())
    put("birds/gull/1.png", "birds/kite/1.png", "birds/2.png")
    refuse(put(), "images/birds", "VERTICAL/CLASS/IMAGE")


def test_folders_without_images_are_refused(put, tmp_path):
    refuse(tmp_path / "gone", "gone: no such folder", "data.path=FOLDER")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "cat" / "notes.txt").write_text("text")
    refuse(tmp_path / "empty", "no images", "CLASS/IMAGE.jpg")
    (tmp_path / "file").write_text("text")
    refuse(tmp_path / "file", "no such folder")


def test_a_single_class_is_refused(put):
    refuse(put("birds/gull/1.png", "cars/taxi/1.png", "cars/tram/1.png"), "vertical 'birds' has 1 class")


@pytest.mark.parametrize("top", ["", "train/"])
def test_hidden_files_and_folders_hold_no_images(top, put):
    root = put(f"{top}a/1.png", f"{top}b/1.png")
    (root / top / "a" / "._1.png").write_bytes(b"what macOS leaves beside every file on a foreign disk")
    assert open_folder(root).list_notes() == []
    put(*(f"{top}{folder}/1.png" for folder in ("a/.ipynb_checkpoints", ".net/x", "b/.a/.b")))
    source = open_folder(root)
    assert sorted(list_all(source)) == [f"{root}/{top}a/1.png", f"{root}/{top}b/1.png"]
    assert describe(source) == [("a", (), "all"), ("b", (), "all")]
    assert source.list_notes() == [
        f"{root}: ignored hidden folders: {top}.net, {top}a/.ipynb_checkpoints, {top}b/.a",
    ]


def test_names_that_are_not_utf_8_are_refused(put):
    refuse(put("a/1.png", "b\udce9/1.png"), r"b\udce9/1.png", "not UTF-8", "rename")


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(put, monkeypatch):
    root = put("a/1.png", "b/1.png", "c/1.png")
    scandir = os.scandir

    def refuse_one(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse_one)
    refuse(root, f"{root}/b: cannot be read (Permission denied)", "correct its permissions")


def test_a_given_taxonomy_is_taken_as_it_is(put, tmp_path):
    path = tmp_path / "taxonomy.json"
    verticals = {"tram": "cars", "gull": "birds", "taxi": "cars", "kite": "birds"}
    classes = [{"id": class_id, "vertical": vertical} for class_id, vertical in verticals.items()]
    path.write_text(json.dumps({"classes": classes}))
    root = put("gull/1.png", "tram/1.png")
    source = open_folder(root, taxonomy=path)
    assert [c.id for c in source.build_taxonomy().classes] == ["tram", "gull", "taxi", "kite"]
    put("swan/1.png")
    refuse(root, "images/swan: no class 'swan' in", "rename the folder or add the class", taxonomy=path)
    refuse(root, "no such file", taxonomy=tmp_path / "gone.json")
