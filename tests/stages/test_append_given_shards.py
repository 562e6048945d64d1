"""`prepare data=shards append=true`: new tars are indexed after the old ones; kills; what is gone or changed is refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from real_runs import IMAGE_SIZE, Plant, concentrate, draw_image, load_json, one_line, write_shards, write_tar
from servers import serve

from concentration.data.split import load_split
from concentration.stages.prepared import DataOverrides, load_prepared


@pytest.fixture
def given(tmp_path) -> Path:
    """80 training images in 4 tars, one tar each for validation and test."""
    return write_shards(tmp_path / "given", num_train=80)


def grow(given: Path) -> None:
    """Two tars for training that sort before and between the old ones, one for validation, and two classes."""
    for name, labels in (("train-00", ["kite", "gull"]), ("train-000001b", ["lemon"]), ("val-000001", ["gull"])):
        write_tar(given / f"{name}.tar", [(f"{name}-{label}", [label], draw_image(label, 999)) for label in labels])
    taxonomy = load_json(given / "taxonomy.json")
    taxonomy["classes"] += [{"id": name, "vertical": "birds"} for name in ("gull", "kite")]
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))


def prepare(path: Path | str, workdir: Path, *options: str, **expected):
    return concentrate("prepare", "data=shards", f"data.path={path}", f"data.image_size={IMAGE_SIZE}", *options,
                       f"workdir={workdir}", "num_processes=1", directory=workdir.parent, **expected)  # fmt: skip


def read_files(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "shards").glob("[!.]*") if path.name != "status.json"}


def read_keys(workdir: Path, name: str) -> list[str]:
    _, taxonomy, _ = load_prepared(workdir, DataOverrides())
    split = load_split(workdir / "shards", name, taxonomy)
    return [split.key(ordinal) for ordinal in range(len(split))]


@pytest.mark.parametrize("where", ["here", "http"])
def test_old_indices_stay_to_the_byte_and_new_tars_come_after_them(where, given, tmp_path):
    workdir = tmp_path / "work"
    with serve(given) as server:
        path = given if where == "here" else server.url
        prepare(path, workdir, "data.near_duplicates=2")
        before, keys = read_files(workdir), read_keys(workdir, "train")
        grow(given)
        finished = prepare(path, workdir, "data.near_duplicates=2", "append=true")
        assert server.count("train-000000.tar") == (where == "http"), "what is indexed is not fetched again"
    assert "prepare: 6 shards are indexed already; new: 3" in finished.out
    after = read_files(workdir)
    kept = [name for name in before if name.endswith((".index", ".hashes"))]
    assert len(kept) == 12
    assert all(after[name] == before[name] for name in kept)
    assert sorted(name for name in after if name.endswith(".index") and name not in before) == [
        "train-000004.index",
        "train-000005.index",
        "val-000001.index",
    ]
    grown = read_keys(workdir, "train")
    assert grown[: len(keys)] == keys
    assert grown[len(keys) :] == [
        "train-00.tar/train-00-kite",
        "train-00.tar/train-00-gull",
        "train-000001b.tar/train-000001b-lemon",
    ]
    done = load_json(workdir / "shards/DONE.json")
    assert {name: facts["samples"] for name, facts in done["splits"].items()} == {"train": 83, "val": 41, "test": 60}
    assert done["splits"]["train"]["by_vertical"]["birds"] == 2
    assert "appending.json" not in after
    classes = [c["id"] for c in load_json(workdir / "shards/taxonomy.json")["classes"]]
    assert classes == [c["id"] for c in load_json(given / "taxonomy.json")["classes"]]


def test_appending_nothing_changes_nothing_and_the_first_time_is_a_preparation(given, tmp_path):
    workdir = tmp_path / "work"
    assert "indexed already" not in prepare(given, workdir, "append=true").out
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (workdir / "shards").glob("[!.]*")}
    os.utime(given / "train-000002.tar")  # the same content at another time
    assert "prepare: 6 shards are indexed already; new: 0" in prepare(given, workdir, "append=true").out
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} == before


def remove(given: Path) -> None:
    (given / "train-000001.tar").unlink()


def cut(given: Path) -> None:
    path = given / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def change(given: Path) -> None:
    """One byte of an image; size and time stay."""
    path = given / "train-000001.tar"
    content, state = bytearray(path.read_bytes()), path.stat()
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def rename(given: Path) -> None:
    (given / "train-000001.tar").rename(given / "train-9.tar")
    (given / "train-000001.tar").symlink_to("train-9.tar")


def insert_class(given: Path) -> None:
    taxonomy = load_json(given / "taxonomy.json")
    taxonomy["classes"].insert(2, {"id": "plum", "vertical": "fruit"})
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))


def drop_class(given: Path) -> None:
    taxonomy = load_json(given / "taxonomy.json")
    taxonomy["classes"] = [c for c in taxonomy["classes"] if c["id"] not in ("gull", "kite", "file")]
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove, ["train-000001.tar: no such file, but ", "train-000001.index describes it; bring it back"]),
        (cut, ["train-000001.tar: ", " bytes, but ", " when it was indexed"]),
        (change, ["train-000001.tar: has changed since it was indexed; bring it back, or prepare everything anew"]),
        (rename, ["train-000001.tar: was indexed, and is not among what data.train=train-*.tar finds in "]),
        (insert_class, ["taxonomy.json: class 'plum' at position 2, expected 'citrus'; classes may only be added at"]),
        (drop_class, ["taxonomy.json: class None at position 9, expected 'file'"]),
    ],
)
def test_what_is_gone_or_has_changed_is_refused_and_nothing_is_touched(spoil, expected, given, tmp_path):
    workdir = tmp_path / "work"
    prepare(given, workdir, f"data.taxonomy={given / 'taxonomy.json'}")
    before = read_files(workdir)
    grow(given)
    spoil(given)
    append = (f"data.taxonomy={given / 'taxonomy.json'}", "append=true")
    lines = [line for line in prepare(given, workdir, *append, code=2).err.splitlines() if "check: " not in line]
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]
    assert read_files(workdir) == before


def test_a_remote_shard_of_another_size_is_refused(given, tmp_path):
    workdir = tmp_path / "work"
    with serve(given) as server:
        prepare(server.url, workdir)
        before = read_files(workdir)
        shutil.copy(given / "test-000000.tar", given / "train-000001.tar")
        finished = prepare(server.url, workdir, "append=true", code=2)
        assert f"{server.url}/train-000001.tar: has changed since it was indexed" in finished.err
        (given / "train-000001.tar").unlink()
        message = one_line(prepare(server.url, workdir, "append=true", code=2))
    assert message.startswith(f"{server.url}/train-000001.tar: was indexed, and is not among what data.train=")
    assert read_files(workdir) == before


@pytest.mark.parametrize(
    ("where", "call", "when"),
    [
        ("data.appending:write_atomically", 1, "after"),
        ("stages.run_directory:RunDirectory.reopen", 1, "before"),
        ("stages.run_directory:RunDirectory.reopen", 1, "after"),
        *(("stages.prepare_listing:write_atomically", call, "after") for call in (1, 2)),
        ("data.index:ShardIndex.save", 2, "after"),
        ("stages.prepare:_summarise", 1, "before"),
        ("stages.run_directory:RunDirectory.finish", 1, "before"),
        ("stages.run_directory:RunDirectory.finish", 1, "after"),
    ],
)
def test_a_killed_append_is_continued_to_the_same_files(where, call, when, given, tmp_path):
    workdir, whole = tmp_path / "work", tmp_path / "whole"
    prepare(given, workdir)
    shutil.copytree(workdir, whole)
    grow(given)
    prepare(given, whole, "append=true")
    prepare(given, workdir, "append=true", plant=Plant(f"concentration.{where}", call, when), code=-signal.SIGKILL)
    # Also without append=true: a plain run must not index anew what was there.
    prepare(given, workdir, *(["append=true"] if "DONE.json" in read_files(workdir) or call == 1 else []))
    left = {"appending.json", "config.json"}  # the config holds the first run's runtime fields
    expected = {name: content for name, content in read_files(whole).items() if name not in left}
    assert {name: content for name, content in read_files(workdir).items() if name not in left} == expected
