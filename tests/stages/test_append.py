"""`prepare append=true`: new images and classes beside what was there, to the byte; kills at every point; what is refused."""

import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import webdataset
from real_runs import Plant, Running, concentrate, one_line

from concentration.data.split import load_split
from concentration.errors import ConfigError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory

OLD = ("birds/gull", "birds/kite", "cars/taxi", "cars/tram")
NEW = ("birds/auk", "fish/cod", "fish/eel", "cars/tram/old")


@pytest.fixture
def put(tmp_path, encode_image):
    """(class, numbers): adds images of a class; the numbers 3n to 3n + 2 are one session."""

    def add(class_id: str, numbers: range) -> Path:
        for number in numbers:
            path = tmp_path / "images" / class_id / f"s{number // 3}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image("png", (9, 7), seed=sum(class_id.encode()) * 1000 + number))
        return tmp_path / "images"

    return add


@pytest.fixture
def images(put) -> Path:
    for class_id in OLD:
        root = put(class_id, range(30))
    return root


@pytest.fixture
def more(images, put) -> Path:
    """The folder after it has grown: members of old sessions, new sessions, new classes, and some old ones gone."""

    def grow() -> Path:
        for class_id in NEW:
            put(class_id, range(24))
        put("birds/kite", range(29, 60))
        shutil.rmtree(images / "cars" / "taxi")
        return put("cars/taxi", range(5, 30))

    return grow


SPLIT = {
    "shares": ("data.split.val_share=0.2",),
    "per class": ("data.split.val_per_class=3", "data.split.test_per_class=4"),
}


def arguments(images: Path, workdir: Path, split="shares", *options: str) -> list[str]:
    group = r"data.split.group='^(.*/s\d+)-'"
    data = ("data=image_folder", f"data.path={images}", group, *SPLIT[split], f"workdir={workdir}")
    return ["prepare", *data, "num_processes=1", "samples_per_shard=25", *options]


def read_files(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "shards").glob("[!.]*") if path.name != "status.json"}


def read_places(workdir: Path) -> dict[str, tuple[str, str]]:
    """By the image's number in its class: split and class."""
    found = {}
    for path in sorted((workdir / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            key = sample["__key__"]
            assert key not in found, "no image is there twice"
            found[key] = (path.name.split("-")[0], json.loads(sample["json"])["labels"][0])
    return found


@pytest.mark.parametrize("split", SPLIT)
def test_what_was_there_stays_to_the_byte_and_what_is_new_comes_after_it(split, images, more, tmp_path):
    workdir = tmp_path / "work"
    concentrate(*arguments(images, workdir, split), directory=tmp_path)
    before, places, (_, taxonomy, fingerprint) = read_files(workdir), read_places(workdir), prepared(workdir)
    finished = concentrate(*arguments(more(), workdir, split, "append=true"), directory=tmp_path)
    after, (_, grown, grown_fingerprint) = read_files(workdir), prepared(workdir)
    for name, content in before.items():
        if name.endswith((".tar", ".index", ".skipped")):
            assert after[name] == content
    assert grown_fingerprint != fingerprint
    assert grown.classes[: taxonomy.num_classes] == taxonomy.classes
    assert {c.id for c in grown.classes[taxonomy.num_classes :]} == set(NEW)
    assert grown.verticals == ("birds", "cars", "fish")
    for vertical in taxonomy.verticals:
        old = [taxonomy.class_of_output(o).id for o in range(*taxonomy.vertical_slice(vertical).indices(99))]
        new = [grown.class_of_output(o).id for o in range(*grown.vertical_slice(vertical).indices(99))]
        assert new[: len(old)] == old
    later = read_places(workdir)
    assert places.items() <= later.items()
    assert len(later) == 4 * 30 + 4 * 24 + 30
    assert "5 prepared images are gone from the source, and stay" in finished.out
    assert "115 images are prepared already; new: " in finished.out
    sessions: dict[str, set[str]] = {}
    for key, (name, _) in later.items():
        sessions.setdefault(re.sub(r"-\d+-\w+$", "", key), set()).add(name)
    assert len(sessions) == 4 * 10 + 4 * 8 + 10
    assert all(len(splits) == 1 for splits in sessions.values())
    done = RunDirectory(workdir / "shards").load_done("")
    assert sum(facts["samples"] for facts in done["splits"].values()) == len(later)
    for name, facts in done["splits"].items():
        numbers = sorted(int(shard[-10:-4]) for shard in after if shard.startswith(name) and shard.endswith(".tar"))
        assert numbers == list(range(facts["shards"]))
        sizes = [shard.num_samples for shard in load_split(workdir / "shards", name, grown).shards]
        assert max(sizes) <= 25
    if split == "per class":
        counts = load_split(workdir / "shards", "test", grown).count_labels()
        assert all(counts[grown.output(class_id)] >= 4 for class_id in OLD + NEW)


def prepared(workdir: Path):
    return load_prepared(workdir, DataOverrides())


def test_appending_again_changes_nothing_and_a_plain_run_does_not_even_look(images, more, tmp_path):
    workdir = tmp_path / "work"
    first = concentrate(*arguments(images, workdir, "shares", "append=true"), directory=tmp_path)
    assert "prepared already" not in first.out, "it is the first time"
    more()
    concentrate(*arguments(images, workdir), directory=tmp_path)
    concentrate(*arguments(images, workdir, "shares", "append=true"), directory=tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (workdir / "shards").glob("[!.]*")}
    again = concentrate(*arguments(images, workdir, "shares", "append=true"), directory=tmp_path)
    assert "241 images are prepared already; new: 0 train, 0 val, 0 test" in again.out
    shutil.rmtree(images)
    assert "finished already" in concentrate(*arguments(images, workdir), directory=tmp_path).out
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} == before
    assert not (workdir / "shards" / "appending.json").exists()


PLANTS = [
    ("data.appending:write_atomically", 1, "before"),
    ("data.appending:write_atomically", 1, "after"),
    ("stages.run_directory:RunDirectory.reopen", 1, "before"),
    ("stages.run_directory:RunDirectory.reopen", 1, "after"),
    *(("stages.prepare_listing:write_atomically", call, when) for call in (1, 2) for when in ("before", "after")),
    *(("stages.prepare:write_atomically", 2, when) for when in ("before", "after")),
    ("stages.prepare:write_shard", 2, "after"),
    ("stages.prepare:index_shard", 3, "after"),
    ("stages.prepare:_summarise", 1, "before"),
    ("stages.run_directory:RunDirectory.finish", 1, "before"),
    ("stages.run_directory:RunDirectory.finish", 1, "after"),
]


@pytest.mark.parametrize(("plant", "split"), list(zip(PLANTS, itertools.cycle(SPLIT), strict=False)), ids=str)
def test_a_killed_append_is_continued_to_the_same_files(plant, split, images, more, tmp_path):
    where, call, when = plant
    workdir, whole = tmp_path / "work", tmp_path / "whole"
    concentrate(*arguments(images, workdir, split), directory=tmp_path)
    shutil.copytree(workdir, whole)
    before = read_files(workdir)
    more()
    concentrate(*arguments(images, whole, split, "append=true"), directory=tmp_path)
    append = arguments(images, workdir, split, "append=true")
    killed = Running(append, tmp_path, plant=Plant(f"concentration.{where}", call, when)).wait()
    assert killed.code == -signal.SIGKILL
    files = read_files(workdir)
    assert all(files[name] == content for name, content in before.items() if name.endswith((".tar", ".index")))
    if "DONE.json" not in files:
        # Also without append=true: a plain run must not write the first shards anew.
        append = arguments(images, workdir, split) if call % 2 else append
    concentrate(*append, directory=tmp_path)
    left = {"config.json"}  # the config holds the first run's runtime fields
    expected = {name: content for name, content in read_files(whole).items() if name not in left}
    assert {name: content for name, content in read_files(workdir).items() if name not in left} == expected


def test_a_source_that_changed_after_a_kill_is_appended_as_it_is_now(images, more, put, tmp_path):
    workdir = tmp_path / "work"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    before = read_files(workdir)
    more()
    append = arguments(images, workdir, "shares", "append=true")
    plant = Plant("concentration.stages.prepare:write_shard", 4, "after")
    assert Running(append, tmp_path, plant=plant).wait().code == -signal.SIGKILL
    shutil.rmtree(images / "fish")
    put("birds/owl", range(9))
    concentrate(*append, directory=tmp_path)
    after = read_files(workdir)
    assert all(after[name] == content for name, content in before.items() if name.endswith((".tar", ".index")))
    labels = {label for _, label in read_places(workdir).values()}
    assert labels == {*OLD, "birds/auk", "cars/tram/old", "birds/owl"}
    assert {c.id for c in prepared(workdir)[1].classes} == labels


def test_a_folder_of_new_images_alone_may_have_one_class_of_an_old_vertical(images, encode_image, tmp_path):
    workdir, arrived = tmp_path / "work", tmp_path / "arrived"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    before = read_places(workdir)
    for class_id in ("birds/kite", "cars/van"):
        (arrived / class_id).mkdir(parents=True)
        (arrived / class_id / "s99-1.png").write_bytes(encode_image("png", (9, 7), seed=sum(class_id.encode())))
    concentrate(*arguments(arrived, workdir, "shares", "append=true"), directory=tmp_path)
    after = read_places(workdir)
    assert before.items() <= after.items()
    assert sorted(after[key][1] for key in after.keys() - before.keys()) == ["birds/kite", "cars/van"]
    assert [c.id for c in prepared(workdir)[1].classes] == [*OLD, "cars/van"]


def test_images_of_another_folder_that_have_the_paths_of_prepared_ones_are_told(images, put, tmp_path):
    workdir, other = tmp_path / "work", tmp_path / "other"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    put("birds/kite", range(30, 32))
    images.rename(other)
    out = concentrate(*arguments(other, workdir, "shares", "append=true"), directory=tmp_path).out
    assert "120 images are prepared already; new: " in out
    assert f"data.path was {images}: images are known by their paths in the source, and 120 have the path of one" in out
    again = concentrate(*arguments(other, workdir, "shares", "append=true"), directory=tmp_path).out
    assert "data.path was" not in again


def test_a_class_that_moved_is_refused_before_anything_is_touched(images, tmp_path):
    taxonomy = tmp_path / "classes.json"
    classes = [{"id": class_id, "vertical": class_id.split("/")[0]} for class_id in OLD]
    taxonomy.write_text(json.dumps({"classes": classes}))
    workdir = tmp_path / "work"
    options = (f"data.taxonomy={taxonomy}",)
    concentrate(*arguments(images, workdir, "shares", *options), directory=tmp_path)
    before = read_files(workdir)
    classes[1]["vertical"] = "cars"
    classes.append({"id": "birds/auk", "vertical": "birds"})
    taxonomy.write_text(json.dumps({"classes": classes}))
    append = arguments(images, workdir, "shares", *options, "append=true")
    message = one_line(concentrate(*append, directory=tmp_path, code=2))
    assert (
        "class 'birds/kite' had the vertical 'birds', and now 'cars'; restore it, or prepare everything anew" in message
    )
    classes[1] = {"id": "birds/kite", "vertical": "birds", "parents": ["birds/gull"]}
    taxonomy.write_text(json.dumps({"classes": classes}))
    message = one_line(concentrate(*append, directory=tmp_path, code=2))
    assert "class 'birds/kite' had the parents [], and now ['birds/gull']" in message
    assert read_files(workdir) == before
    classes[1] = {"id": "birds/kite", "vertical": "birds"}
    taxonomy.write_text(json.dumps({"classes": classes[::-1]}))
    concentrate(*append, directory=tmp_path)
    assert [c.id for c in prepared(workdir)[1].classes] == [*OLD, "birds/auk"], "a class without images comes, too"


def test_images_that_were_repaired_come_and_broken_ones_count_against_all_images(images, put, tmp_path):
    workdir = tmp_path / "work"
    broken = images / "birds" / "gull" / "s0-0.png"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    options = ("max_skipped_share=0.01",)
    concentrate(*arguments(images, workdir, "shares", *options), directory=tmp_path)
    before = read_files(workdir)
    append = arguments(images, workdir, "shares", *options, "append=true")
    for _ in range(2):
        concentrate(*append, directory=tmp_path)  # one of one new image, but of 120 in all
        again = read_files(workdir)
        assert {name for name in again if name.endswith(".tar")} == {name for name in before if name.endswith(".tar")}
        assert again["DONE.json"] == before["DONE.json"]
    broken.write_bytes(content)
    concentrate(*append, directory=tmp_path)
    assert len(read_places(workdir)) == 120
    assert read_files(workdir)["skipped.txt"] == b""


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_cannot_be_appended_leaves_what_was_there_as_it_was(images, more, tmp_path, is_killed):
    workdir = tmp_path / "work"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    before = read_files(workdir)
    more()
    for number in range(3):
        (images / "birds" / "gull" / f"s{90 + number}-0.png").write_bytes(b"<html>")
    append = arguments(images, workdir, "shares", "append=true")
    if is_killed:
        plant = Plant("concentration.stages.prepare:_write_and_index", 2, "before")
        concentrate(*append, "num_processes=1", directory=tmp_path, plant=plant, code=-signal.SIGKILL)
        assert "DONE.json" not in read_files(workdir)
    message = concentrate(*append, directory=tmp_path, code=2).err
    assert "3 of 244 images cannot be read or decoded" in message
    after = read_files(workdir)
    assert len(after.pop("skipped.txt").splitlines()) == 3
    assert after == {name: content for name, content in before.items() if name not in ("skipped.txt", "listing.sha256")}
    _, taxonomy, _ = prepared(workdir)
    assert tuple(c.id for c in taxonomy.classes) == OLD
    concentrate(*append, f"max_skipped_share={message.partition('or give max_skipped_share=')[2].partition(';')[0]}",
                directory=tmp_path)  # fmt: skip
    assert len(prepared(workdir)[1].classes) > len(OLD)


def test_what_has_changed_in_the_prepared_set_is_refused(images, more, tmp_path):
    workdir = tmp_path / "work"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    more()
    index = workdir / "shards" / "train-000001.index"
    index.rename(tmp_path / "kept")
    append = arguments(images, workdir, "shares", "append=true")
    assert "bring them back" in one_line(concentrate(*append, directory=tmp_path, code=2))
    (tmp_path / "kept").rename(index)
    message = one_line(concentrate(*append, "samples_per_shard=9", directory=tmp_path, code=2))
    assert "samples_per_shard was 25, is 9" in message
    concentrate(*append, directory=tmp_path)


def test_a_class_that_comes_again_with_its_accents_encoded_otherwise_is_refused(images, tmp_path):
    workdir, folder = tmp_path / "work", images / "birds"
    (folder / "gull").rename(folder / "me\u0301sange")
    concentrate(*arguments(images, workdir), directory=tmp_path)
    before = read_files(workdir)
    (folder / "me\u0301sange").rename(folder / "m\xe9sange")
    message = one_line(concentrate(*arguments(images, workdir, "shares", "append=true"), directory=tmp_path, code=2))
    assert r"the class ids 'birds/me\u0301sange' and 'birds/m\xe9sange' differ in" in message
    assert read_files(workdir) == before


def test_overwriting_is_no_appending(tmp_path):
    stage = {"workdir": tmp_path, "append": True}
    with pytest.raises(ConfigError, match=r"append=true and overwrite: .* give one of them"):
        parse_config(PrepareConfig, {**stage, "overwrite": True, "data": {"kind": "glyphs"}})


def test_a_damaged_note_of_what_was_there_is_refused(images, tmp_path):
    workdir = tmp_path / "work"
    concentrate(*arguments(images, workdir), directory=tmp_path)
    (workdir / "shards" / "DONE.json").unlink()
    (workdir / "shards" / "appending.json").write_text('{"num_classes": 4}')
    message = one_line(concentrate(*arguments(images, workdir), directory=tmp_path, code=2))
    assert "appending.json: damaged" in message
