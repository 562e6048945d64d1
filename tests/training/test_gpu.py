"""Training and evaluation on a GPU by the real command line, beside the same on a CPU; without a GPU nothing is tested here."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import TINY_NETWORK, Plant, concentrate, load_json, load_lines, load_weights, prepare_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no GPU here")

#: Twelve steps, each of them logged.
STEPS = (
    *TINY_NETWORK,
    "targets=labels",
    "trainer.num_workers=0",
    "trainer.batch_size=16",
    "trainer.max_steps=12",
    "trainer.log_every_steps=1",
    "optimizer.lr=0.01",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("gpu"))


def train(workdir: Path, name: str, *options: str) -> Path:
    concentrate("student", f"name={name}", f"workdir={workdir}", *STEPS, *options, directory=workdir.parent)
    return workdir / "students" / name


def losses(run_path: Path) -> list[float]:
    return [line["train/loss"] for line in load_lines(run_path) if "train/loss" in line]


def test_a_gpu_learns_what_a_cpu_learns(prepared):
    on_cpu = train(prepared, "on_cpu")
    on_gpu = train(prepared, "on_gpu", "trainer.accelerator=gpu")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)
    found, expected = load_weights(on_gpu), load_weights(on_cpu)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0.05, atol=0.02, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.precision=bf16-mixed",),
        ("trainer.precision=16-mixed", "trainer.clip_norm=100"),
        ("trainer.precision=16-mixed", "trainer.clip_norm=100", "optimizer=adamw", "optimizer.lr=0.01"),
        ("optimizer=adamw", "optimizer.lr=0.01", "trainer.clip_norm=100"),
        ("trainer.precision=bf16-mixed", "trainer.clip_norm=100", "optimizer=adamw", "optimizer.lr=0.01"),
        ("trainer.update_in_backward=true",),
        ("trainer.update_in_backward=true", "trainer.precision=bf16-mixed", "optimizer=adamw", "optimizer.lr=0.01"),
        ("trainer.accumulate=2", "trainer.ema_decay=0.9"),
        ("loss=softmax",),
    ],
    ids=lambda options: " ".join(option.partition(".")[2] or option for option in options),
)
def test_every_switch_works_on_a_gpu(prepared, options):
    name = "_".join(options).replace("=", "-").replace(".", "-")
    allowed_on_cpu = tuple(option for option in options if "precision" not in option)
    expected = train(prepared, f"cpu_{name}", *allowed_on_cpu)
    found = train(prepared, f"gpu_{name}", "trainer.accelerator=gpu", *options)
    tolerance = 0.05 if allowed_on_cpu != options else 0.01
    assert losses(found) == pytest.approx(losses(expected), rel=tolerance)


@pytest.mark.parametrize("backward", ["false", "true"])
def test_a_run_on_a_gpu_is_continued_on_a_cpu_and_back(prepared, backward):
    """A checkpoint belongs to no device: the first steps on a GPU, some on a CPU, the rest on a GPU."""
    options = (f"trainer.update_in_backward={backward}", "optimizer=adamw", "optimizer.lr=0.01", "trainer.max_steps=60")
    options = (*options, "trainer.checkpoint_every_seconds=0")
    whole = train(prepared, f"whole-{backward}", "trainer.accelerator=gpu", *options)
    stop = Plant("concentration.training.module:StudentModule.on_train_batch_start", 4, "before", signal.SIGTERM)
    for accelerator in ("gpu", "cpu"):
        concentrate("student", f"name=moved-{backward}", f"workdir={prepared}", *STEPS, *options,
                    f"trainer.accelerator={accelerator}", directory=prepared.parent, code=75, plant=stop)  # fmt: skip
    moved = train(prepared, f"moved-{backward}", "trainer.accelerator=gpu", *options)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-3)


def test_an_evaluation_is_that_of_a_cpu(prepared):
    train(prepared, "measured")
    measured = {}
    for accelerator in ("cpu", "gpu"):
        concentrate("evaluate", "name=measured", f"workdir={prepared}", f"accelerator={accelerator}", "overwrite=true",
                    directory=prepared.parent)  # fmt: skip
        measured[accelerator] = load_json(prepared / "evaluations" / "measured.json")
    assert measured["gpu"]["mpvap"] == pytest.approx(measured["cpu"]["mpvap"], abs=1e-3)
