"""A stage's directory: what is skipped, refused, replaced and locked, and what a kill leaves behind."""

import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest

from concentration.errors import ConfigError, DataError
from concentration.files import hash_file
from concentration.schema import Config
from concentration.stages.replaced import REPLACED_FOLDER, forget_replaced, set_aside
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.temporaries import name_temporary

_FORK = multiprocessing.get_context("fork")


class OptimizerConfig(Config):
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"fused"})

    lr: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.99)
    fused: bool = False


class TinyConfig(StageConfig):
    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {"num_workers"}

    seed: int = 0
    base: str | None = None
    num_workers: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "students" / "a")


def build(directory: RunDirectory, **values) -> TinyConfig:
    return TinyConfig(workdir=directory.path.parent, **values)


def is_due(directory: RunDirectory, upstream=None, **values) -> bool:
    with directory.begin(build(directory, **values), upstream or {}) as due:
        return due


def finish(directory: RunDirectory, **values) -> None:
    with directory.begin(build(directory, **values), {}) as due:
        assert due
        (directory.path / "model").write_text("weights")
        directory.finish({"checkpoint": "abc"})


def refuse(directory: RunDirectory, *expected: str, upstream=None, error=ConfigError, **values) -> None:
    with pytest.raises(error) as caught:
        is_due(directory, upstream, **values)
    for text in (str(directory.path), *expected):
        assert text in str(caught.value)


def fail_inside(directory: RunDirectory, error: type[BaseException], writes: str | None = None, **values) -> None:
    def work() -> None:
        with directory.begin(build(directory, **values), {}) as due:
            assert due
            if writes is not None:
                (directory.path / writes).write_text("half")
            raise error("no such file")

    with pytest.raises(error):
        work()


def test_what_is_finished_is_not_done_again(directory, capsys):
    finish(directory)
    done = (directory.path / "DONE.json").read_bytes()
    assert capsys.readouterr().out == ""
    assert not is_due(directory)
    assert "finished already" in capsys.readouterr().out
    assert directory.load_done("concentrate student")["checkpoint"] == "abc"
    assert (directory.path / "DONE.json").read_bytes() == done


def test_what_is_begun_is_continued_with_its_files(directory):
    with directory.begin(build(directory), {}) as due:
        assert due
        (directory.path / "last.ckpt").write_text("half")
    with directory.begin(build(directory), {}) as due:
        assert due
        assert (directory.path / "last.ckpt").read_text() == "half"


@pytest.mark.parametrize("is_finished", [False, True])
def test_another_config_is_refused_with_the_key_and_both_values(is_finished, directory):
    finish(directory) if is_finished else is_due(directory)
    before = (directory.path / "config.json").read_bytes()
    refuse(directory, "seed was 0, is 1", "overwrite=true", "another name", seed=1)
    refuse(directory, "optimizer.lr was 0.1, is 0.2", optimizer=OptimizerConfig(lr=0.2))
    refuse(directory, "optimizer.betas was [0.9, 0.99], is [0.9]", optimizer=OptimizerConfig(betas=(0.9,)))
    refuse(directory, "base was None, is 'small'", base="small")
    refuse(directory, "base was None, is 'small'; seed was 0, is 1", base="small", seed=1)
    refuse(directory, "upstream.data was not there, is '12'", upstream={"data": "12"})
    assert (directory.path / "config.json").read_bytes() == before
    assert is_due(directory) is not is_finished, "it goes on with the config that it was begun with"


def test_another_upstream_result_is_refused_with_both_hashes(directory):
    assert is_due(directory, {"data": "12", "targets": "ab"})
    assert is_due(directory, {"targets": "ab", "data": "12"})
    refuse(directory, "upstream.targets was 'ab', is 'cd'", upstream={"data": "12", "targets": "cd"})
    refuse(directory, "upstream.targets was 'ab', is not there", upstream={"data": "12"})
    refuse(
        directory, "has changed since: upstream.targets", "overwrite=changed", upstream={"data": "12", "targets": "c"}
    )
    grown = {"data": "34", "targets": "ab"}
    refuse(directory, "upstream.data was '12'", "overwrite=changed", "`concentrate add vertical=NAME`", upstream=grown)


def test_what_changes_only_how_it_is_computed_may_change(directory, tmp_path):
    finish(directory)
    assert not is_due(directory, num_workers=8, optimizer=OptimizerConfig(fused=True), overwrite="changed")
    moved = directory.path.parent.rename(tmp_path / "moved")
    assert not is_due(RunDirectory(moved / "a"))
    assert (moved / "a" / "model").exists()


def test_overwrite_replaces_everything(directory):
    finish(directory)
    (directory.path / "curves" / "deep").mkdir(parents=True)
    (directory.path / "curves" / "deep" / "1").write_text("old")
    (directory.path / "link").symlink_to(directory.path.parent)
    with directory.begin(build(directory, seed=1, overwrite=True), {}) as due:
        assert due
        assert {path.name for path in directory.path.glob("[!.]*")} == {"config.json"}
        directory.finish({})
    assert {path.name for path in directory.path.iterdir()} == {".lock", "config.json", "DONE.json"}
    assert directory.path.parent.exists(), "a link is removed, not what it leads to"
    assert directory.load_config()["seed"] == 1
    refuse(directory, "seed was 1, is 0")


def test_a_finished_stage_of_the_same_config_is_made_anew_with_overwrite(directory):
    finish(directory)
    with directory.begin(build(directory, overwrite=True), {}) as due:
        assert due
        assert {path.name for path in directory.path.glob("[!.]*")} == {"config.json"}
        (directory.path / "1.ckpt").write_text("half")
    # A scheduler gives a stopped command again as it was: what it has done meanwhile is not lost.
    with directory.begin(build(directory, overwrite=True), {}) as due:
        assert due
        assert (directory.path / "1.ckpt").exists()


def test_overwrite_changed_replaces_only_what_has_another_config_or_upstream(directory):
    finish(directory)
    assert not is_due(directory, overwrite="changed")
    assert (directory.path / "model").exists()
    assert is_due(directory, upstream={"data": "12"}, overwrite="changed")
    assert not (directory.path / "model").exists()
    finish(directory, seed=1, overwrite="changed")
    assert not is_due(directory, seed=1, overwrite="changed")


def test_a_growing_stage_is_due_when_it_is_finished_and_reopened_until_it_is_again(directory):
    finish(directory)
    with directory.begin(build(directory), {}, is_growing=True) as due:
        assert due
        assert directory.is_finished
        assert (directory.path / "model").exists()
        directory.reopen()
    assert is_due(directory)
    finish(directory)
    assert not is_due(directory)


@pytest.fixture
def finished(directory) -> RunDirectory:
    finish(directory)
    for name in ("1.ckpt", "metrics.csv", "DONE.json.old"):
        (directory.path / name).write_text("of the earlier config")
    (directory.path / "curves").mkdir()
    (directory.path / "curves" / "1").write_text("old")
    return directory


def read_all(directory: RunDirectory) -> dict[str, bytes]:
    files = (path for path in directory.path.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(directory.path)): path.read_bytes() for path in files}


def stop_after(num_renames: int, monkeypatch) -> None:
    """The process ends at a rename, as with a kill."""
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, functools.partialmethod(_rename_some, getattr(Path, name), [num_renames]))


def _rename_some(path, rename, left, target):
    if left[0] == 0:
        raise SystemExit
    left[0] -= 1
    return rename(path, target)


@pytest.mark.parametrize("error", [ConfigError, DataError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("changed", [{"seed": 1}, {}])
def test_what_was_replaced_comes_back_where_nothing_was_written(changed, error, finished):
    before = read_all(finished)
    fail_inside(finished, error, overwrite=True, **changed)
    assert read_all(finished) == before
    assert not is_due(finished)


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_what_was_replaced_is_gone_where_the_new_has_begun(is_forgotten, finished):
    with contextlib.suppress(DataError), finished.begin(build(finished, seed=1, overwrite=True), {}):
        if is_forgotten:
            forget_replaced(finished.path)
        (finished.path / "last.ckpt").write_text("new")
        raise DataError("a shard is gone")
    assert {path.name for path in finished.path.iterdir()} == {".lock", "config.json", "last.ckpt"}
    assert is_due(finished, seed=1)


@pytest.mark.parametrize("num_renames", range(7))
def test_a_kill_while_overwriting_loses_nothing(num_renames, finished, monkeypatch):
    """In between it is no finished stage, and never do files of the earlier config lie under the later one."""
    before = read_all(finished)
    stop_after(num_renames, monkeypatch)
    with contextlib.suppress(SystemExit), finished.begin(build(finished, seed=1, overwrite=True), {}):
        pytest.fail("the stage began")
    monkeypatch.undo()
    assert finished.is_finished is (num_renames == 0)
    refuse(finished, "seed was 0, is 1", seed=1)
    assert not is_due(finished)
    assert read_all(finished) == before


def test_a_kill_while_the_new_config_is_written_loses_nothing(finished):
    before = read_all(finished)
    set_aside(finished.path)
    name_temporary(finished.path / "config.json").write_text('{"identi')
    assert not is_due(finished)
    assert read_all(finished) == before


@pytest.mark.parametrize("num_renames", range(7, 14))
def test_a_kill_while_bringing_back_loses_nothing(num_renames, finished, monkeypatch):
    before = read_all(finished)
    stop_after(num_renames, monkeypatch)
    with pytest.raises((SystemExit, DataError)), finished.begin(build(finished, seed=1, overwrite=True), {}):
        raise DataError("a typing error")
    monkeypatch.undo()
    assert not is_due(finished)
    assert read_all(finished) == before


@pytest.mark.parametrize("place", ["model", "neighbours/index"])
def test_what_nfs_keeps_of_files_that_others_have_open_is_no_error(place, directory, monkeypatch):
    """It gives them another name in place of deleting them, and their folder cannot be deleted."""
    delete, is_open = os.unlink, True

    def unlink(path, *, dir_fd=None):
        folder, name = os.path.split(path)
        if is_open and name == Path(place).name:
            os.rename(path, os.path.join(folder, ".nfs0025a27f4567"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        elif is_open and name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy", name)
        else:
            delete(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    for seed in range(2):
        with directory.begin(build(directory, seed=seed, overwrite=True), {}) as due:
            assert due
            (directory.path / place).parent.mkdir(exist_ok=True)
            (directory.path / place).write_text(str(seed))
            directory.finish({"checkpoint": "abc"})
    [kept] = directory.path.rglob(".nfs*")
    assert kept.read_text() == "0"
    assert not is_due(directory, seed=1)
    assert (directory.path / place).read_text() == "1"
    is_open = False
    kept.unlink()
    assert not is_due(directory, seed=1)
    assert not (directory.path / REPLACED_FOLDER).exists()


def fail_part(directory: RunDirectory, part: str, message: str = "a typing error") -> None:
    with (
        contextlib.suppress(DataError),
        directory.begin(build(directory, seed=1, overwrite=True), {}, part=part) as due,
    ):
        assert due
        raise DataError(message)


def hold_part(directory: RunDirectory, may_end) -> None:
    with contextlib.suppress(DataError), directory.begin(build(directory, seed=1, overwrite=True), {}, part="1-of-2"):
        (directory.path / "held").touch()
        may_end.wait(60)
        (directory.path / "held").unlink()
        raise DataError("a typing error")


def start_holding_part(directory: RunDirectory) -> tuple:
    """The process that holds a part, which it has begun, and what lets it end."""
    may_end = _FORK.Event()
    process = _FORK.Process(target=hold_part, args=(directory, may_end))
    process.start()
    deadline = time.monotonic() + 60
    while not (directory.path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process, may_end


def test_what_parts_of_a_stage_have_replaced_comes_back_with_the_last_that_fails(finished):
    before = read_all(finished)
    fail_part(finished, "0-of-2")
    assert read_all(finished) == before
    process, may_end = start_holding_part(finished)
    fail_part(finished, "0-of-2")
    assert (finished.path / REPLACED_FOLDER / "model").exists(), "the other may still make it"
    may_end.set()
    process.join(60)
    assert read_all(finished) == before
    assert not is_due(finished)


def test_a_stage_waits_for_the_parts_of_it_that_are_being_made(directory):
    """It took their half-written files for those of a kill, and `overwrite` would have moved away the rest."""
    process, may_end = start_holding_part(directory)
    (directory.path / ".train-000001.safetensors.1.tmp").touch()
    refuse(directory, "other processes make parts of this; wait for them or end them", seed=1)
    assert (directory.path / ".train-000001.safetensors.1.tmp").exists()
    assert directory.is_held
    may_end.set()
    process.join(60)
    assert not directory.is_held
    assert is_due(directory, seed=1)
    assert not (directory.path / ".train-000001.safetensors.1.tmp").exists()


def test_a_mistake_that_is_found_before_anything_is_written_may_be_corrected(directory):
    fail_inside(directory, ConfigError, seed=7)
    fail_inside(directory, DataError, seed=8)
    fail_inside(directory, DataError, writes="last.ckpt")
    refuse(directory, "seed was 0, is 7", seed=7)


@pytest.mark.parametrize("error", [RuntimeError, DataError, KeyboardInterrupt])
def test_an_error_leaves_the_stage_unfinished_and_the_directory_free(error, directory):
    fail_inside(directory, error, writes="last.ckpt")
    assert is_due(directory)
    assert (directory.path / "last.ckpt").exists()
    with pytest.raises(ConfigError, match=r"students/a: not there or not finished; run `concentrate student` first"):
        directory.load_done("concentrate student")


def hold(directory: RunDirectory) -> None:
    with directory.begin(build(directory), {}):
        (directory.path / "held").write_text("")
        time.sleep(60)


def test_a_directory_in_which_another_process_works_is_refused_until_it_is_killed(directory):
    process = _FORK.Process(target=hold, args=(directory,))
    process.start()
    deadline = time.monotonic() + 60
    while not (directory.path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refuse(directory, "another process works here; wait for it or end it")
    refuse(directory, "another process works here", seed=1, overwrite=True)
    assert (directory.path / "held").exists()
    is_due(RunDirectory(directory.path.with_name("b")))  # other directories are free
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert is_due(directory)


def test_a_file_system_without_locks_is_named_as_such(directory, monkeypatch):
    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    refuse(directory, "cannot be locked (No locks available)")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"identity": {}}', b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["config.json", "DONE.json"])
def test_a_damaged_file_is_refused_with_what_to_do(content, name, directory):
    finish(directory)
    (directory.path / name).write_bytes(content)
    refuse(directory, name, "run the stage again", error=DataError)
    if name == "DONE.json":
        with pytest.raises(DataError, match=r"DONE\.json"):
            directory.load_done("concentrate student")


def test_what_a_kill_left_is_cleared_but_a_status_that_another_writes(directory):
    """Bars are begun before the lock is taken: two runs at once met in this folder, and one ended with exit code 2."""
    directory.path.mkdir(parents=True)
    (directory.path / "checkpoints").mkdir()
    names = (
        ".model.safetensors.1.tmp",
        "checkpoints/.step-000000001.ckpt.1.tmp",
        "../.a.json.1.tmp",
        "../.a.safetensors.1.tmp",
    )
    left, others = [directory.path / name for name in names], [directory.path / ".status.json.1.tmp"]
    others.append(directory.path / "../.b.json.1.tmp")  # of another stage's result
    for path in (*left, *others):
        path.touch()
    with directory.begin(build(directory), {}):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in others)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "students").write_text("a file")
    refuse(RunDirectory(tmp_path / "students" / "a"), "cannot be made (Not a directory)", "another workdir")


def test_a_directory_that_cannot_be_written_to_is_one_line(directory):
    """As on a disk that is mounted for reading, or of another user's; the tests may be root, whom permissions do not stop."""
    (directory.path / ".lock").mkdir(parents=True)
    refuse(directory, "cannot be written to (Is a directory)", "another workdir")


def test_a_config_is_kept_whole_and_readable(directory):
    is_due(directory, base="größe", num_workers=3)
    content = (directory.path / "config.json").read_text(encoding="utf-8")
    assert "größe" in content
    assert json.loads(content)["config"]["num_workers"] == 3
    assert "num_workers" not in json.loads(content)["identity"]
    assert TinyConfig.model_validate(directory.load_config()) == build(directory, base="größe", num_workers=3)


def test_a_files_hash_is_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "b").write_bytes(b"weights!")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()[:16]
    assert hash_file(tmp_path / "b") != hash_file(tmp_path / "a")


def test_what_an_earlier_version_counted_into_the_identity_is_no_difference(directory):
    finish(directory)
    path = directory.path / "config.json"
    begun = json.loads(path.read_text())
    begun["identity"]["num_workers"] = 4
    begun["identity"]["optimizer"]["fused"] = True
    path.write_text(json.dumps(begun))
    assert not is_due(directory)
    begun["identity"]["optimizer"]["lr"] = 0.2
    path.write_text(json.dumps(begun))
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        is_due(directory)
