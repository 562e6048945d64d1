"""Images that stay on the device: training by the real command line, beside training that reads them."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import TINY, Plant, concentrate, load_lines, load_weights, one_line, prepare_shards, start_ranks

DISTORTED = (
    "data.view={crop_area: 1.0, crop_aspect: 1.0, flip: 0.5, contrast: 0.2, "
    "distortion: {rotate: 8, shear: 0.15, scale: 0.15, shift: 0.06, stroke: 0.5, blur: 0.8, erase: 0.08, noise: 0.1}}",
)
OPTIONS = (*TINY, *DISTORTED, "targets=labels", "optimizer.lr=0.001", "trainer.log_every_steps=1")
RESIDENT = "trainer.resident=true"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("resident"))


def train(workdir: Path, name: str, *options: str, **more):
    finished = concentrate("student", f"name={name}", f"workdir={workdir}", *options, directory=workdir.parent, **more)
    return workdir / "students" / name if finished.code == 0 else finished


def losses(run_path: Path) -> list[float]:
    return [line["train/loss"] for line in load_lines(run_path) if "train/loss" in line]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_resident_images_learns_what_one_that_reads_them_learns(num_workers, prepared):
    read = train(prepared, f"read{num_workers}", *OPTIONS)
    held = train(prepared, f"held{num_workers}", *OPTIONS, RESIDENT, f"trainer.num_workers={num_workers}")
    assert losses(held) == pytest.approx(losses(read), rel=0.01)
    found, expected = load_weights(held), load_weights(read)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0.05, atol=0.02, err_msg=name)


def test_two_processes_learn_what_one_learns(prepared):
    options = (*OPTIONS, RESIDENT, "trainer.batch_size=15", "trainer.max_steps=10")
    one = train(prepared, "one", *options)
    arguments = ("student", "name=two", f"workdir={prepared}", "trainer.devices=2", *options)
    ranks = start_ranks(arguments, prepared.parent, 2, [{}, {}])
    assert [rank.wait().code for rank in ranks] == [0, 0]
    assert losses(prepared / "students" / "two") == pytest.approx(losses(one), rel=1e-4)


def test_a_killed_run_is_resumed_to_the_same_weights(prepared):
    whole = train(prepared, "whole", *OPTIONS, RESIDENT)
    plant = Plant("concentration.training.module:StudentModule.on_train_batch_start", 15, "before", signal.SIGTERM)
    train(prepared, "stopped", *OPTIONS, RESIDENT, code=75, plant=plant)
    resumed = train(prepared, "stopped", *OPTIONS, RESIDENT)
    found, expected = load_weights(resumed), load_weights(whole)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_damaged_images_are_named_as_where_they_are_read(tmp_path):
    workdir = prepare_shards(tmp_path, damaged=(3, 42, 77))
    held = train(workdir, "held", *OPTIONS, RESIDENT, "trainer.max_skipped_share=0.02")
    read = train(workdir, "read", *OPTIONS, "trainer.max_skipped_share=0.02")
    assert (held / "skipped.txt").read_text() == (read / "skipped.txt").read_text()


def test_a_student_replays_its_teachers_views(prepared):
    """Views are stored with the targets, and the student sees those."""
    for vertical in ("fruit", "tools"):
        options = ("base.channels=[4,8]", "base.norm=group", "top.top1=12", "top.top2=8", "trainer.max_steps=5")
        concentrate("teacher", f"vertical={vertical}", f"workdir={prepared}", *options, *DISTORTED,
                    "trainer.resident=true", directory=prepared.parent)  # fmt: skip
    view = DISTORTED[0].replace("data.view=", "view=")
    concentrate("targets", "targets.views=2", view, f"workdir={prepared}", directory=prepared.parent)
    options = tuple(option for option in OPTIONS if option not in ("targets=labels", *DISTORTED))
    read = train(prepared, "replays", *options, "targets.views=2")
    held = train(prepared, "replays_held", *options, "targets.views=2", RESIDENT)
    assert losses(held) == pytest.approx(losses(read), rel=0.01)


def test_crops_are_refused_in_one_line(prepared):
    options = [option for option in OPTIONS if not option.startswith("data.view")]
    finished = train(prepared, "cropped", *options, "data.view={crop_area: 0.5}", RESIDENT, code=2)
    line = one_line(finished)
    assert "1 of 1 views drawn by data.view are crops" in line
    assert "trainer.resident=false" in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no GPU here")
def test_a_gpu_makes_the_views_of_a_cpu(prepared):
    on_cpu = train(prepared, "on_cpu", *OPTIONS, RESIDENT)
    on_gpu = train(prepared, "on_gpu", *OPTIONS, RESIDENT, "trainer.accelerator=gpu")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=0.01)
