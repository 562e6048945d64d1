"""Images that lie in two splits, nearly: found, said, written and drawn; hashed once; looked for anew where that is asked."""

import csv
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_runs import taxonomy_of_fruit_and_tools, write_tar
from servers import serve

import concentration.data.image_hashes
from concentration.data import near_duplicates
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.run_directory import RunDirectory

CLASSES = ("birds/gull", "birds/kite", "cars/taxi", "cars/tram")


def draw_picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)


def save_picture(picture: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture
def images(tmp_path) -> Path:
    """Four different images of each class in each split; then copies, saved anew: train in val twice, in test once."""
    root = tmp_path / "images"
    for s, split in enumerate(("train", "val", "test")):
        for c, class_id in enumerate(CLASSES):
            for number in range(4):
                save_picture(draw_picture(100 * s + 10 * c + number), root / split / class_id / f"{number}.png")
    for name, split, class_id in (("a", "val", "birds/gull"), ("b", "val", "cars/taxi"), ("c", "test", "birds/kite")):
        copy = Image.open(root / "train" / class_id / "1.png").resize((64, 64))
        save_picture(copy, root / split / class_id / f"{name}.jpg", quality=80)
    return root


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "work"


def build_config(path: Path | str, workdir: Path, append=False, **data) -> PrepareConfig:
    data = {"kind": "image_folder", "path": path} | data
    stage = {"workdir": workdir, "num_processes": 1, "samples_per_shard": 5}
    return parse_config(PrepareConfig, {**stage, "append": append, "data": data})


def read_pairs(workdir: Path) -> set[tuple[str, str]]:
    """What the table pairs: split and image of each side."""
    with open(workdir / "shards" / "near_duplicates.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["split_1", "key_1", "split_2", "key_2", "distance"]
    assert all(0 <= int(distance) <= 2 for *_, distance in rows[1:])
    return {(f"{left} {name_of(a)}", f"{right} {name_of(b)}") for left, a, right, b, _ in rows[1:]}


def name_of(key: str) -> str:
    """The image's class and number, of a shard and a key that begins with its split and ends in a hash."""
    shard, _, inner = key.partition(".tar/")
    split = shard.split("-")[0]
    assert inner.startswith(split)
    return inner.removeprefix(f"{split}-").rpartition("-")[0]


def load_facts(workdir: Path) -> dict | None:
    return RunDirectory(workdir / "shards").load_done("")["near_duplicates"]


def list_states(workdir: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (workdir / "shards").glob(pattern)}


PAIRS = {
    ("train birds-gull-1", "val birds-gull-a"),
    ("train cars-taxi-1", "val cars-taxi-b"),
    ("train birds-kite-1", "test birds-kite-c"),
}


def test_copies_in_other_splits_are_said_listed_and_drawn(images, workdir, capsys):
    prepare(build_config(images, workdir))
    assert read_pairs(workdir) == PAIRS
    said = capsys.readouterr().out
    assert "prepare: 2 of 18 images of val have a near copy in train\n" in said
    assert "prepare: 1 of 17 images of test have a near copy in train\n" in said
    assert "images of test have a near copy in val" not in said
    assert f"the pairs are in {workdir}/shards/near_duplicates.csv, some drawn beside it" in said
    assert "data.split.group" in said
    assert load_facts(workdir) == {
        "max_distance": 2,
        "pairs": 3,
        "images_with_twin": {"val": {"train": 2}, "test": {"train": 1, "val": 0}},
        "images_without_hash": 0,
        "comparisons_left_out": 0,
    }


def test_the_sides_of_a_drawn_pair_look_alike(images, workdir):
    prepare(build_config(images, workdir))
    pixels = np.asarray(Image.open(workdir / "shards" / "near_duplicates.png").convert("RGB")).astype(int)
    is_image_X = (np.abs(pixels[120] - pixels[0, 0]).max(1) > 8).nonzero()[0]
    starts = is_image_X[np.diff(is_image_X, prepend=-9) > 3]
    assert len(starts) == 6, "three pairs in a row"
    sides = [pixels[60:240, start + 20 : start + 200] for start in starts]
    for left, right in zip(sides[::2], sides[1::2], strict=True):
        assert np.abs(left - right).mean() < 25
    assert np.abs(sides[0] - sides[2]).mean() > 50, "another pair is another picture"


def test_another_distance_is_looked_for_anew_without_another_hash_or_shard(images, workdir, monkeypatch):
    prepare(build_config(images, workdir, near_duplicates=None))
    assert load_facts(workdir) is None
    assert list_states(workdir, "*.hashes") == {}
    shards = list_states(workdir, "*.[ti][an][rd]*")
    assert len(shards) == 2 * 12
    shutil.move(images, images.with_name("gone"))
    prepare(build_config(images, workdir, near_duplicates=2))
    assert read_pairs(workdir) == PAIRS
    hashes = list_states(workdir, "*.hashes")
    assert len(hashes) == 12
    monkeypatch.setattr(concentration.data.image_hashes, "hash_image", None)
    done = list_states(workdir, "DONE.json")
    prepare(build_config(images, workdir, near_duplicates=2))
    assert list_states(workdir, "DONE.json") == done, "the same is not looked for again"
    prepare(build_config(images, workdir, near_duplicates=0))
    assert load_facts(workdir)["max_distance"] == 0
    prepare(build_config(images, workdir, near_duplicates=None))
    assert load_facts(workdir) is None
    assert list_states(workdir, "near_duplicates.*") == {}, "what was found earlier is not left behind"
    assert list_states(workdir, "*.hashes") == hashes
    assert list_states(workdir, "*.[ti][an][rd]*") == shards


def test_appending_hashes_only_what_is_new(images, workdir, monkeypatch):
    prepare(build_config(images, workdir))
    hashes, hashed = list_states(workdir, "*.hashes"), []
    original = near_duplicates.hash_image
    monkeypatch.setattr(concentration.data.image_hashes, "hash_image", lambda c: hashed.append(c) or original(c))
    shutil.copy(images / "val" / "cars" / "taxi" / "2.png", images / "test" / "cars" / "taxi" / "d.png")
    prepare(build_config(images, workdir, append=True))
    assert len(hashed) == 1
    assert hashes.items() < list_states(workdir, "*.hashes").items()
    assert read_pairs(workdir) == PAIRS | {("val cars-taxi-2", "test cars-taxi-d")}


def test_blank_images_are_counted_and_not_each_others_copies(images, workdir, capsys):
    for split in ("train", "test"):
        save_picture(Image.new("RGB", (32, 32), "white"), images / split / "cars" / "taxi" / "blank.png")
    prepare(build_config(images, workdir))
    assert read_pairs(workdir) == PAIRS
    assert "2 images were not compared: they are blank, or cannot be decoded" in capsys.readouterr().out
    assert load_facts(workdir)["images_without_hash"] == 2


def test_comparisons_that_were_left_out_are_said(images, workdir, capsys, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", 0)
    prepare(build_config(images, workdir))
    said = capsys.readouterr().out
    assert "no image has a near copy in another split (data.near_duplicates=2)" in said
    assert "some near copies may not be found: too many images look alike, and " in said
    assert load_facts(workdir)["comparisons_left_out"] >= 3


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def given(tmp_path) -> Path:
    """Shards with one copy, under keys of any length and script, and an image that cannot be decoded."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "taxonomy.json").write_text(json.dumps(taxonomy_of_fruit_and_tools()))
    train = [(f"t{n}", [label], encode(draw_picture(n))) for n, label in enumerate(("lemon", "saw", "drill"))]
    write_tar(folder / "train-0.tar", train)
    write_tar(folder / "train-1.tar", [("鳥,$x$ $" + "n" * 200, ["lemon"], encode(draw_picture(8)))])
    write_tar(folder / "test-0.tar", [("a,b", ["lemon"], encode(draw_picture(8).resize((60, 60)))),
                                      ("c", ["saw"], b"no image")])  # fmt: skip
    return folder


@pytest.mark.parametrize("where", ["here", "http"])
def test_given_shards_are_looked_at_only_where_that_is_asked(where, given, tmp_path, workdir, capsys):
    with serve(given) as server, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = given if where == "here" else server.url
        prepare(build_config(path, workdir, kind="shards"))
        assert list_states(workdir, "*.hashes") == {}
        assert load_facts(workdir) is None
        for name in ("work", "other"):
            prepare(build_config(path, tmp_path / name, kind="shards", near_duplicates=2))
    facts = load_facts(workdir)
    assert facts == load_facts(tmp_path / "other")
    assert (facts["pairs"], facts["images_without_hash"]) == (1, 1)
    assert len(list_states(workdir, "*.hashes")) == 3
    with open(workdir / "shards" / "near_duplicates.csv", newline="") as file:
        ((left, left_key, right, right_key, _),) = list(csv.reader(file))[1:]
    assert (left, left_key, right, right_key) == ("train", "train-1.tar/鳥,$x$ $" + "n" * 200, "test", "test-0.tar/a,b")
    assert Image.open(workdir / "shards" / "near_duplicates.png").size == (1476, 360)
    assert "leave one of each pair out of the shards" in capsys.readouterr().out


def damage(tar: Path) -> None:
    """Turns one bit of its first image."""
    content = bytearray(tar.read_bytes())
    content[content.index(b"PNG") + 60] ^= 1
    tar.write_bytes(content)


def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again_before_it_is_hashed(given, tmp_path, workdir):
    for name in ("work", "other"):
        with serve(given) as server:
            prepare(build_config(server.url, tmp_path / name, kind="shards"))
            for copy in (tmp_path / name / "cache").glob("*.shard") if name == "work" else ():
                damage(copy)
            prepare(build_config(server.url, tmp_path / name, kind="shards", near_duplicates=2))
    hashes = {path.name: path.read_bytes() for path in (tmp_path / "other/shards").glob("*.hashes")}
    assert {path.name: path.read_bytes() for path in (workdir / "shards").glob("*.hashes")} == hashes


def test_another_image_than_was_indexed_is_not_hashed(images, workdir):
    prepare(build_config(images, workdir))
    tar = workdir / "shards" / "train-000000.tar"
    tar.with_suffix(".hashes").unlink()
    damage(tar)
    with pytest.raises(DataError, match=rf"^{tar}: the image of '.*' is not the one that was indexed"):
        prepare(build_config(images, workdir, near_duplicates=1))


def test_damaged_hashes_are_one_line(images, workdir):
    prepare(build_config(images, workdir))
    path = workdir / "shards" / "train-000001.hashes"
    content = path.read_bytes()
    other = (workdir / "shards" / "train-000000.hashes").read_bytes()
    for damaged, expected in ((content[:30], "damaged"), (other, "of other images than train-000001.index describes")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=expected) as caught:
            prepare(build_config(images, workdir, near_duplicates=1))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert "delete it" in str(caught.value)
    path.unlink()
    prepare(build_config(images, workdir, near_duplicates=1))
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"near_duplicates": 7}, "data.near_duplicates=7: Input should be less than or equal to 6"),
        ({"near_duplicates": -1}, "data.near_duplicates=-1: "),
        ({"kind": "glyphs", "near_duplicates": 2}, "unknown key 'data.near_duplicates'"),
    ],
)
def test_mistakes_are_one_line(data, expected, workdir):
    data = {"kind": "image_folder", "path": "images"} | data if "kind" not in data else data
    with pytest.raises(ConfigError) as caught:
        parse_config(PrepareConfig, {"workdir": workdir, "data": data})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
