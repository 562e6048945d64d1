"""GoogLeNet trained by the real command line: its auxiliary classifiers over several ranks, and through a kill."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from real_runs import Plant, concentrate, load_json, load_lines, load_weights, one_line, prepare_shards, start_ranks

#: The smallest images with auxiliary classifiers; 5 steps.
SMALL = (
    "targets=labels",
    "base=googlenet",
    "base.width=0.0625",
    "data.image_size=79",
    "trainer.num_workers=0",
    "trainer.batch_size=10",
    "trainer.max_steps=5",
    "trainer.log_every_steps=1",
    "trainer.validate_every_epochs=1000",
)
STRUCTURED = ("top.top1=12", "top.top2=8", "top.norm=layer")
LINEAR = ("top=linear", "pace=none", "loss=softmax")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("googlenet"))


def train(workdir: Path, name: str, *options: str, **more) -> Path:
    command = ("student", f"name={name}", f"workdir={workdir}", *SMALL, *options)
    concentrate(*command, directory=workdir.parent, **more)
    return workdir / "students" / name


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_two_processes_give_the_losses_and_weights_of_one(prepared, loss):
    structure = STRUCTURED if loss == "sigmoid" else LINEAR
    options = (*structure, "base.dropout=0", "base.auxiliary_dropout=0", "optimizer.lr=0.01")
    one, name = train(prepared, f"one-{loss}", *options), f"two-{loss}"
    command = ["student", f"name={name}", f"workdir={prepared}", *SMALL, *options, "trainer.devices=2"]
    for process in start_ranks(command, prepared.parent, 2, [{}, {}]):
        finished = process.wait()
        assert finished.code == 0, finished.err
    two = prepared / "students" / name
    losses = [[line["train/loss"] for line in load_lines(path) if "train/loss" in line] for path in (one, two)]
    assert len(losses[0]) == 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    weights, other = load_weights(one), load_weights(two)
    for key in weights:
        np.testing.assert_allclose(other[key], weights[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_a_run_that_is_killed_ends_with_the_same_weights_and_without_auxiliary_classifiers(prepared, tmp_path):
    expected = train(prepared, "undisturbed", *LINEAR)
    workdir = Path(shutil.copytree(prepared, tmp_path / "work"))
    plant = Plant("concentration.training.checkpoints:CheckpointDirectory.save", 3, "after")
    every = "trainer.checkpoint_every_seconds=0"
    train(workdir, "killed", *LINEAR, every, plant=plant, code=-signal.SIGKILL)
    found = train(workdir, "killed", *LINEAR, every)
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert not any(key.startswith("auxiliaries") for key in load_weights(found))
    concentrate("evaluate", "name=killed", f"workdir={workdir}", directory=tmp_path)
    evaluation = load_json(workdir / "evaluations/killed.json")
    assert evaluation["num_parameters"]["total"] == sum(array.size for array in load_weights(found).values())


def test_a_softmax_that_no_process_would_have_all_classes_of_is_refused(prepared):
    for options, message in (
        (("trainer.shard_head=true",), "loss=softmax with trainer.shard_head=true: a softmax needs all classes"),
        (("targets=soft", "outside=mask"), "outside=mask with loss=softmax: one softmax is over all verticals"),
    ):
        finished = concentrate(
            "student", f"workdir={prepared}", "loss=softmax", *options, directory=prepared.parent, code=2
        )
        assert message in one_line(finished)
