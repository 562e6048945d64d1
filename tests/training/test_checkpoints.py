"""Checkpoints: a damaged byte is noticed, the best is kept, a full disk costs nothing that was saved."""

import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import (
    TINY_NETWORK,
    Plant,
    concentrate,
    load_lines,
    load_weights,
    one_line,
    prepare_shards,
    run_command,
    write_shards,
)

from concentration.training.head_files import DAMAGES, load_verified

#: Ten steps an epoch, each with a checkpoint.
OPTIONS = (
    *TINY_NETWORK,
    "targets=labels",
    "trainer.num_workers=0",
    "trainer.batch_size=20",
    "trainer.max_epochs=3",
    "trainer.checkpoint_every_seconds=0",
)
SAVE = "concentration.training.checkpoints:CheckpointDirectory.save"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def undisturbed(workdir) -> Path:
    return train(workdir, "undisturbed")


def train(workdir: Path, name: str, *options: str, **more) -> Path:
    concentrate("student", f"name={name}", f"workdir={workdir}", *OPTIONS, *options, directory=workdir.parent, **more)
    return workdir / "students" / name


def list_checkpoints(run_path: Path) -> list[Path]:
    return sorted((run_path / "checkpoints").glob("*.ckpt"))


def is_same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return one == other


def test_no_changed_byte_changes_what_is_loaded(tmp_path):
    """Every byte of a file in turn: it is refused, or the byte is one that nobody reads."""
    content = {"state_dict": {"weight": torch.arange(40.0), "bias": torch.ones(3, 2)}, "global_step": 7}
    path = tmp_path / "step.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    num_refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            loaded = load_verified(path)
        except DAMAGES:
            num_refused += 1
        else:
            assert is_same(loaded, content), f"byte {place}"
    assert num_refused > 400  # the tensors alone are 184 bytes; padding and dates are what may change


def test_torch_alone_would_not_notice(tmp_path):
    path = tmp_path / "step.ckpt"
    torch.save({"weight": torch.full((100,), 1.5)}, path)
    changed = path.read_bytes().replace(np.float32(1.5).tobytes(), np.float32(2.5).tobytes(), 1)
    path.write_bytes(changed)
    assert torch.load(path, weights_only=True)["weight"][0] == 2.5
    with pytest.raises(ValueError, match="checksum"):
        load_verified(path)


def test_a_flipped_bit_of_a_weight_is_noticed_and_the_checkpoint_before_it_taken(undisturbed, workdir):
    run_path = train(workdir, "flipped", plant=Plant(SAVE, 12, "after"), code=-signal.SIGKILL)
    _, newest = list_checkpoints(run_path)
    content = torch.load(newest, weights_only=True)
    weight = next(tensor for tensor in content["state_dict"].values() if tensor.dim() > 1)
    damaged = bytearray(newest.read_bytes())
    damaged[damaged.index(weight.numpy().tobytes()) + 5] ^= 4
    newest.write_bytes(damaged)
    finished = concentrate("student", "name=flipped", f"workdir={workdir}", *OPTIONS, directory=workdir.parent)
    assert f"{newest.name}: damaged (the checksum of " in finished.out
    assert (run_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


#: A learning rate that rises until it is far too large: a validation in the middle is the best.
WILD = ("optimizer.lr=10", "optimizer.warmup_steps=60", "trainer.max_epochs=6", "trainer.keep_best=true")


def test_the_best_network_is_kept_through_a_kill_and_no_more_than_it(workdir):
    run_path = train(workdir, "best", *WILD, plant=Plant(SAVE, 55, "after"), code=-signal.SIGKILL)
    kept = list_checkpoints(run_path)
    train(workdir, "best", *WILD)
    validated = {line["step"]: line["val/mpvap"] for line in load_lines(run_path) if "val/mpvap" in line}
    assert list(validated) == [10, 20, 30, 40, 50, 60]
    best = max(validated, key=validated.get)
    assert best < 50, f"choose options whose best is not among the last: {validated}"
    assert len(kept) == 3
    assert kept[0].name == f"step-{best:09d}.ckpt"
    assert not list_checkpoints(run_path)
    expected = load_weights(train(workdir, "to_best", *WILD[:-1], f"trainer.max_steps={best}"))
    shutil.copy(run_path / "best.safetensors", run_path / "model.safetensors")
    found = load_weights(run_path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_the_best_of_no_validation_is_refused(tmp_path):
    given = write_shards(tmp_path / "given")
    for path in given.glob("val-*"):
        path.unlink()
    workdir = tmp_path / "work"
    concentrate(
        "prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}", directory=tmp_path
    )
    command = ("student", f"workdir={workdir}", *OPTIONS, "trainer.keep_best=true")
    assert "trainer.keep_best=true needs validation images" in one_line(
        concentrate(*command, directory=tmp_path, code=2)
    )


@contextlib.contextmanager
def mount_memory(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("left_bytes", [0, 20_000], ids=["nothing", "too_little_for_a_checkpoint"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoints(undisturbed, workdir, tmp_path, left_bytes):
    with mount_memory(tmp_path / "disk", "20m"):
        small = Path(shutil.copytree(workdir, tmp_path / "disk/work", ignore=shutil.ignore_patterns("students")))
        command = ("student", "name=full", f"workdir={small}", *OPTIONS)
        concentrate(*command, directory=tmp_path, plant=Plant(SAVE, 12, "after"), code=-signal.SIGKILL)
        before = {path: path.read_bytes() for path in list_checkpoints(small / "students/full")}
        assert len(before) == 2
        filler = tmp_path / "disk/filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with open(filler, "r+b") as file:
            file.truncate(filler.stat().st_size - left_bytes)
        finished = concentrate(*command, directory=tmp_path, code=2)
        assert "Traceback" not in finished.err
        assert "cannot be written (No space left on device); free space" in finished.err
        assert {path: path.read_bytes() for path in list_checkpoints(small / "students/full")} == before
        filler.unlink()
        concentrate(*command, directory=tmp_path)
        found = (small / "students/full/model.safetensors").read_bytes()
        assert found == (undisturbed / "model.safetensors").read_bytes()


def test_a_checkpoint_larger_than_a_file_may_be_is_one_line(workdir):
    """The same where nothing can be mounted; the metrics still fit."""
    options = ("student", "name=limited", f"workdir={workdir}", *OPTIONS)
    script = f"ulimit -f 16; exec {shlex.join([sys.executable, '-m', 'concentration.cli', *options])}"
    finished = run_command("bash", "-c", script, directory=workdir.parent, code=2)
    assert "Traceback" not in finished.err
    assert ".ckpt: cannot be written (File too large); free space" in finished.err
    assert not list((workdir / "students/limited/checkpoints").iterdir()), "nothing half-written is left"
