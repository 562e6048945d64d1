"""Training with a head that is spread over processes: by the real command line, it is training without."""

import io
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from real_runs import (
    TINY_NETWORK,
    Plant,
    concentrate,
    load_json,
    load_lines,
    load_weights,
    one_line,
    prepare_shards,
    start_ranks,
)

#: A batch of 15 that leaves 5 of 200 images for the last; micro-batches, decay, and clipping that bites. At a learning rate of
#: 0.01 rounding stays rounding. Of the 10 classes fruit has 6: three processes cut it, two do not.
OPTIONS = (
    *TINY_NETWORK,
    "targets=labels",
    "optimizer=adamw",
    "optimizer.lr=0.01",
    "optimizer.warmup_steps=5",
    "trainer.batch_size=15",
    "trainer.accumulate=2",
    "trainer.clip_norm=0.5",
    "trainer.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.log_every_steps=5",
    "pace=vertical",
    "pace.offset=class",
    "pace.lr=0.02",
)
SHARDED = "trainer.shard_head=true"
CHECKPOINTS = "concentration.training.checkpoints:CheckpointDirectory"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(prepared) -> Path:
    """The run of one process, whose head is not spread."""
    concentrate("student", "name=whole", f"workdir={prepared}", *OPTIONS, directory=prepared.parent)
    return prepared / "students" / "whole"


def train(workdir: Path, directory: Path, world_size: int, *options: str, name: str = "sharded", plant=None) -> Path:
    """A run of so many processes, the head spread; rank 0 is killed where there is a plant, and the others with it."""
    arguments = ["student", f"name={name}", f"workdir={workdir}", SHARDED, f"trainer.devices={world_size}", *options]
    running = start_ranks(arguments, directory, world_size, [{}] * world_size, plant)
    first = running[0].wait()
    if plant is not None:
        assert first.code == -signal.SIGKILL, first.err
        for process in running[1:]:
            process.send(signal.SIGKILL)
    codes = {process.wait().code for process in running[1:]}
    if plant is None:
        assert {first.code, *codes} == {0}, first.err
    return workdir / "students" / name


def assert_same(found: Path, expected: Path) -> None:
    """The same weights by the same names, and the same curves, to rounding."""
    weights, other = load_weights(found), load_weights(expected)
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in other.items()}
    for name in weights:
        np.testing.assert_allclose(weights[name], other[name], rtol=1e-3, atol=1e-4, err_msg=name)
    headers = [safetensors.safe_open(path / "model.safetensors", "np").metadata() for path in (found, expected)]
    assert headers[0] == headers[1]
    curves = [{line["step"]: line for line in load_lines(path) if "train/loss" in line} for path in (found, expected)]
    assert curves[0].keys() == curves[1].keys()
    # Of one step each, so the same after a resume.
    names = {"train/gradient_norm", "train/fruit/gamma", "train/tools/gamma", "train/learning_rate"}
    for step, line in curves[0].items():
        for name in names:
            assert line[name] == pytest.approx(curves[1][step][name], rel=2e-4), (step, name)
    assert load_json(found / "DONE.json")["step"] == load_json(expected / "DONE.json")["step"]
    assert not (found / "checkpoints").exists()


def test_two_processes_give_the_network_of_one(prepared, whole, tmp_path):
    assert_same(train(prepared, tmp_path, 2, *OPTIONS), whole)
    # A downstream stage knows nothing of it.
    concentrate("evaluate", "name=sharded", f"workdir={prepared}", directory=tmp_path)


def test_a_run_of_three_that_is_killed_goes_on_with_two_and_ends_with_one(prepared, whole, tmp_path):
    workdir = Path(shutil.copytree(prepared / "shards", tmp_path / "work" / "shards")).parent
    every = "trainer.checkpoint_every_seconds=0"
    # With several ranks, a checkpoint is made where validation is, at every epoch's end, and every 20 steps.
    train(workdir, tmp_path, 3, *OPTIONS, every, plant=Plant(f"{CHECKPOINTS}.save", 1, "after"))
    checkpoints = workdir / "students" / "sharded" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-000000014.ckpt", *(f"step-000000014.head-{rank}-of-3.pt" for rank in range(3))]  # fmt: skip
    content = torch.load(checkpoints / "step-000000014.ckpt", weights_only=True)
    assert not [name for name in content["state_dict"] if "classifiers" in name or "pace" in name]
    train(workdir, tmp_path, 2, *OPTIONS, every, plant=Plant(f"{CHECKPOINTS}.save", 1, "after"))
    assert_same(train(workdir, tmp_path, 1, *OPTIONS), whole)


def test_a_checkpoint_with_a_vertical_missing_is_refused_by_name_and_an_earlier_one_is_gone_on_from(prepared, tmp_path):
    workdir = Path(shutil.copytree(prepared / "shards", tmp_path / "work" / "shards")).parent
    options = (*OPTIONS, "trainer.checkpoint_every_seconds=0")
    train(workdir, tmp_path, 2, *options, plant=Plant(f"{CHECKPOINTS}.save", 2, "after"))
    checkpoints = workdir / "students" / "sharded" / "checkpoints"
    older, newer = sorted(checkpoints.glob("*.ckpt"))
    kept = {path: path.read_bytes() for path in checkpoints.glob("*.pt")}
    command = ("student", "name=sharded", f"workdir={workdir}", SHARDED, *options)
    # Rank 0 holds tools, rank 1 fruit, which is larger than half of all but stays whole.
    for checkpoint in (older, newer):
        checkpoint.with_name(f"{checkpoint.stem}.head-1-of-2.pt").unlink()
    line = one_line(concentrate(*command, directory=tmp_path, code=2))
    assert f"{newer.name}: vertical 'fruit' is in none of its files {newer.stem}.head-*.pt; restore the one" in line
    for checkpoint in (older, newer):
        path = checkpoint.with_name(f"{checkpoint.stem}.head-1-of-2.pt")
        content = torch.load(io.BytesIO(kept[path]), weights_only=True)
        torch.save({"parts": [{**part, "stop": 4} for part in content["parts"]]}, path)
    line = one_line(concentrate(*command, directory=tmp_path, code=2))
    assert f"{newer.name}: classes from 4 on of vertical 'fruit' are in none of its files" in line
    damaged = path
    damaged.write_bytes(kept[damaged][:1000])
    line = one_line(concentrate(*command, directory=tmp_path, code=2))
    assert f"{damaged.name}: damaged" in line
    for path, content in kept.items():
        if path.name.startswith(older.stem):
            path.write_bytes(content)
    finished = concentrate(*command, directory=tmp_path)
    assert f"{damaged.name}: damaged" in finished.out
    assert "going on from the one before it" in finished.out
    steps = [line["step"] for line in load_lines(workdir / "students" / "sharded") if "train/loss" in line]
    assert steps == [1, 5, 10, 15, 20, 25, 28]


def test_what_does_not_go_together_is_refused(prepared, tmp_path):
    for option, message in (
        (
            "trainer.ema_decay=0.9",
            "ema_decay=0.9 with shard_head=true: the average of a part of a head is not kept",
        ),
        ("trainer.precision=16-mixed", "precision=16-mixed with shard_head=true: .* use bf16-mixed or 32-true"),
    ):
        command = ("student", "name=refused", f"workdir={prepared}", *OPTIONS, SHARDED, option)
        line = one_line(concentrate(*command, directory=tmp_path, code=2))
        assert re.search(message, line), line


@pytest.mark.long
@pytest.mark.parametrize("top", ["fc_fc", "fc_sc", "sc_sc", "fc_sc_generic"])
def test_four_processes_give_the_network_of_one_with_any_top_layers(prepared, tmp_path, top):
    options = (*OPTIONS, f"top={top}", *(["top.generic=3"] if top == "fc_sc_generic" else []), "pace=class")
    concentrate("student", f"name=whole_{top}", f"workdir={prepared}", *options, directory=tmp_path)
    found = train(prepared, tmp_path, 4, *options, name=f"sharded_{top}")
    assert_same(found, prepared / "students" / f"whole_{top}")
