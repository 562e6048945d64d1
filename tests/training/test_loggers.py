"""The curves: always in metrics.jsonl, beside it in TensorBoard or wandb, and never in a run's way."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from real_runs import TINY_NETWORK, concentrate, load_json, load_lines, prepare_shards, run_command

from concentration.training.loggers import JsonlLogger, load_metrics

#: Ten steps, every second of them logged, then a validation.
OPTIONS = (
    *TINY_NETWORK,
    "targets=labels",
    "trainer.num_workers=0",
    "trainer.batch_size=20",
    "trainer.max_epochs=1",
    "trainer.log_every_steps=2",
)
NO_WANDB = {"WANDB_API_KEY": None, "WANDB_MODE": None, "WANDB_BASE_URL": None, "NETRC": "/nowhere"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("loggers"))


@pytest.fixture(scope="module")
def plain(workdir) -> Path:
    concentrate("student", "name=plain", f"workdir={workdir}", *OPTIONS, "pace=class", directory=workdir.parent)
    return workdir / "students" / "plain"


def test_every_curve_has_its_name(plain):
    by_vertical = {f"train/{v}/{what}" for v in ("fruit", "tools") for what in ("loss", "gamma", "routed")}
    expected = {
        "train/loss",
        "train/learning_rate",
        "train/samples_per_second",
        "train/data_wait_share",
        "train/gradient_norm",
        *by_vertical,
    }
    lines = load_lines(plain)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8, 10]
    for line in trained:
        assert line.keys() == expected | {"step", "seconds"}
    validated = [line for line in lines if "val/mpvap" in line]
    assert [line["step"] for line in validated] == [10]
    assert {"val/mpvap", "val/top1", "val/fruit/ap", "val/tools/ap"} <= validated[0].keys()


def test_what_is_logged_is_what_it_says(plain):
    trained = [line for line in load_lines(plain) if "train/loss" in line]
    last = trained[-1]
    assert last["train/learning_rate"] == pytest.approx(0.2)
    assert 0 <= last["train/data_wait_share"] <= 1
    assert last["train/samples_per_second"] > 1
    assert last["train/fruit/routed"] + last["train/tools/routed"] == 200 + 28, (
        "every seventh image is in both verticals"
    )
    # Each vertical's part is of the latest step alone, the whole of the steps since the last line.
    assert last["train/fruit/loss"] + last["train/tools/loss"] == pytest.approx(last["train/loss"], rel=0.4)
    assert last["train/fruit/gamma"] == pytest.approx(6**0.5, rel=0.5)


def test_tensorboard_gets_the_same_curves(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    concentrate("student", "name=board", f"workdir={workdir}", *OPTIONS, "logger=tensorboard", directory=workdir.parent)
    run_path = workdir / "students" / "board"
    folders = {path.parent for path in run_path.rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    for name in ("train/loss", "val/mpvap"):
        expected = [(line["step"], line[name]) for line in load_lines(run_path) if name in line]
        assert [(e.step, pytest.approx(e.value, rel=1e-4, abs=1e-5)) for e in events.Scalars(name)] == expected


def test_wandb_without_a_key_is_offline(workdir):
    started = time.monotonic()
    command = ("student", "name=offline", f"workdir={workdir}", *OPTIONS, "logger=wandb")
    concentrate(*command, directory=workdir.parent, HOME=str(workdir), **NO_WANDB)
    assert time.monotonic() - started < 100
    run_path = workdir / "students" / "offline"
    assert load_json(run_path / "DONE.json")["step"] == 10
    assert [line["step"] for line in load_lines(run_path) if "train/loss" in line] == [2, 4, 6, 8, 10]
    offline = list((run_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 1
    content = offline[0].read_bytes()
    assert b"train/loss" in content
    assert b"val/mpvap" in content


@pytest.mark.long
def test_wandb_with_a_key_and_no_network_goes_on_offline(workdir):
    started = time.monotonic()
    environment = {
        **NO_WANDB,
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    command = (sys.executable, "-m", "concentration.cli", "student", "name=cut_off", f"workdir={workdir}")
    finished = run_command(
        *command, *OPTIONS, "logger=wandb", directory=workdir.parent, HOME=str(workdir), **environment
    )
    assert time.monotonic() - started < 120, "20 seconds of trying, and the run"
    assert "continuing offline" in finished.out + finished.err
    run_path = workdir / "students" / "cut_off"
    assert load_json(run_path / "DONE.json")["step"] == 10
    assert list((run_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.long
def test_each_job_of_a_multirun_is_a_wandb_run_of_its_own(workdir):
    command = (sys.executable, "-m", "concentration.cli", "teacher", "-m", "vertical=fruit,tools", f"workdir={workdir}")
    options = [option for option in OPTIONS if option != "targets=labels"]
    run_command(*command, *options, "logger=wandb", directory=workdir.parent, HOME=str(workdir), **NO_WANDB)
    for vertical in ("fruit", "tools"):
        runs = list((workdir / "teachers" / vertical / "wandb").glob("offline-run-*/*.wandb"))
        assert len(runs) == 1
        assert f"train/{vertical}/loss".encode() in runs[0].read_bytes()


def test_a_resumed_run_drops_the_lines_behind_its_checkpoint_and_goes_on_in_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "seconds": step * 10.0, "train/loss": 1.0} for step in (5, 10, 15)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 20, "seco')
    logger = JsonlLogger(path, first_step=10)
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=15)
    kept = load_metrics(tmp_path)
    assert [line["step"] for line in kept] == [5, 10, 15]
    assert kept[-1]["train/loss"] == 0.5
    assert "epoch" not in kept[-1]
    assert 100 <= kept[-1]["seconds"] < 110


def test_a_line_that_a_kill_cut_off_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 0.1}\n{"step": 2, "sec')
    assert [line["step"] for line in load_metrics(tmp_path)] == [1]


def test_no_logger_is_asked_for_what_it_is_not(workdir):
    finished = concentrate(
        "student", "name=odd", f"workdir={workdir}", "logger=wandbb", directory=workdir.parent, code=2
    )
    assert re.search(r"logger=wandbb: no such choice; did you mean 'wandb'\?", finished.err)
