"""The curves: always in metrics.jsonl, beside it in TensorBoard or wandb, and never in a run's way."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
from real_runs import TINY_NETWORK, Plant, Running, concentrate, load_json, load_lines, prepare_shards, run_command

from concentration.errors import ConfigError
from concentration.progress import STATUS_SECONDS, Progress, load_status
from concentration.schema import parse_config
from concentration.training.configs import LoggerConfig
from concentration.training.loggers import JsonlLogger
from concentration.training.metrics_file import load_metrics

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
    assert [line["step"] for line in trained] == [1, 2, 4, 6, 8, 10]
    for line in trained:
        assert line.keys() == expected | {"step", "seconds"}
    validated = [line for line in lines if "val/mpvap" in line]
    assert [line["step"] for line in validated] == [10]
    assert {"val/mpvap", "val/top1", "val/fruit/ap", "val/tools/ap"} <= validated[0].keys()


def test_gamma_is_known_from_before_the_first_step(plain):
    start, first = load_lines(plain)[:2]
    assert start.keys() == {"step", "seconds", "train/fruit/gamma", "train/tools/gamma"}
    assert (start["step"], first["step"]) == (0, 1)
    assert start["train/fruit/gamma"] == pytest.approx(6**0.5, rel=0.01)
    assert first["train/fruit/gamma"] != pytest.approx(6**0.5, rel=0.01), "a step has moved it"


def test_a_run_that_ends_between_two_lines_has_one_more_over_as_many_steps_and_a_short_one_two(workdir):
    curves = {}
    for name, every, steps in (("each", 1, 8), ("between", 3, 8), ("short", 20, 8)):
        more = (f"trainer.log_every_steps={every}", f"trainer.max_steps={steps}")
        concentrate("student", f"name={name}", f"workdir={workdir}", *OPTIONS, *more, directory=workdir.parent)
        lines = load_lines(workdir / "students" / name)
        curves[name] = {line["step"]: line for line in lines if "train/loss" in line}
    losses = [line["train/loss"] for line in curves["each"].values()]
    assert list(curves["between"]) == [1, 3, 6, 8]
    assert list(curves["short"]) == [1, 8]
    for name, step, start in (("between", 3, 0), ("between", 6, 3), ("between", 8, 3), ("short", 8, 0)):
        assert curves[name][step]["train/loss"] == pytest.approx(fmean(losses[start:step]), rel=1e-5), (name, step)
    for line in curves["short"].values():
        assert line["train/gradient_norm"] == curves["each"][line["step"]]["train/gradient_norm"]


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


@pytest.mark.parametrize(("name", "every_seconds"), [("board", None), ("resumed", 0), ("anew", 1000)])
def test_tensorboard_gets_the_same_curves(name, every_seconds, workdir):
    """Also of a run that was killed: between two checkpoints, as each is written after the steps' lines; or before the first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ("student", f"name={name}", f"workdir={workdir}", *OPTIONS, "logger=tensorboard")
    if every_seconds is not None:
        plant = Plant("concentration.training.callbacks:ClockCheckpoint.on_train_batch_end", 6)
        more = f"trainer.checkpoint_every_seconds={every_seconds}"
        concentrate(*command, more, directory=workdir.parent, plant=plant, code=-signal.SIGKILL)
    concentrate(*command, directory=workdir.parent)
    run_path = workdir / "students" / name
    folders = {path.parent for path in run_path.rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    for name in ("train/loss", "val/mpvap"):
        expected = [(line["step"], line[name]) for line in load_lines(run_path) if name in line]
        assert [(e.step, pytest.approx(e.value, rel=1e-4, abs=1e-5)) for e in events.Scalars(name)] == expected


def read_offline_runs(run_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run_path / "wandb").glob("offline-run-*/*.wandb"))]


def test_wandb_without_a_key_is_offline_and_resumed_under_the_same_id(workdir):
    command = ("student", "name=offline", f"workdir={workdir}", *OPTIONS, "logger=wandb")
    environment = {"HOME": str(workdir), **NO_WANDB, "WANDB_MODE": "online"}  # asked for, and not to be had
    plant = Plant("concentration.training.loggers:JsonlLogger.log_metrics", 5, "after")
    kill = {"plant": plant, "code": -signal.SIGKILL}
    more = "trainer.checkpoint_every_seconds=0"
    concentrate(*command, more, directory=workdir.parent, **kill, **environment)
    run_path = workdir / "students" / "offline"
    [run_id] = {load_json(run_path / "wandb.json")["id"]}
    finished = concentrate(*command, directory=workdir.parent, **environment)
    assert finished.err.count("wandb sync") == 1
    assert f"wandb sync {run_path}/wandb/offline-run-*" in finished.err
    assert load_json(run_path / "DONE.json")["step"] == 10
    assert [line["step"] for line in load_lines(run_path) if "train/loss" in line] == [1, 2, 4, 6, 8, 10]
    folders = sorted((run_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {path.name.rpartition("-")[2] for path in folders} == {run_id}
    resumed = read_offline_runs(run_path)[1]
    expected = (
        "train/loss",
        "val/mpvap",
        "charts/train/gamma",
        "charts/val/ap",
        "report/index.html",
        "trainer/global_step",
    )
    for text in (*expected, workdir.name, "student", "learning", "tools"):
        assert text.encode() in resumed, text
    assert (run_path / "wandb.json").exists()
    concentrate(*command, "overwrite=true", directory=workdir.parent, **environment)
    assert load_json(run_path / "wandb.json")["id"] != run_id, "another run"


def test_wandb_that_is_switched_off_is_off_without_a_key_too(tmp_path, monkeypatch, capsys):
    from concentration.training.wandb_logger import WandbLogger

    for name, value in {**NO_WANDB, "WANDB_MODE": "disabled"}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    logger = WandbLogger("project", tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.finish([])
    assert capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"wandb.json"}


def test_what_wandb_says_is_one_line_and_its_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    import wandb

    from concentration.training.wandb_logger import WandbLogger

    def fail(**options):
        raise ValueError("one\n  two")

    for name, value in NO_WANDB.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb, "init", fail)
    path = tmp_path / "runs & all" / "students" / "a"
    path.mkdir(parents=True)
    WandbLogger("project", path)
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"wandb: one two; continuing offline: `wandb sync '{path}/wandb'/offline-run-*` sends it later"
    assert second == "wandb: one two; going on without it, curves are in metrics.jsonl"


@pytest.mark.parametrize("project", ["team/birds", "a:b", "", "x" * 129])
def test_a_project_that_wandb_refuses_is_refused_before_training(project):
    with pytest.raises(ConfigError, match=r"project.*expected a name of at most 128 characters, without any of"):
        parse_config(LoggerConfig, {"kind": "wandb", "project": project})


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_a_project_without_wandb_is_refused(kind):
    with pytest.raises(ConfigError, match=rf"project=birds: no effect with logger={kind}; give logger=wandb"):
        parse_config(LoggerConfig, {"kind": kind, "project": "birds"})
    assert parse_config(LoggerConfig, {"kind": "wandb", "project": "birds"}).project == "birds"


@pytest.fixture(params=["refuses", "answers_nothing"])
def no_network(request) -> Iterator[str]:
    """The address of a server that is not there, or takes connections and says nothing, as a firewall may."""
    if request.param == "refuses":
        yield "http://127.0.0.1:9"
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.long
def test_wandb_with_a_key_and_no_network_goes_on_offline(workdir, no_network, request):
    name = request.node.callspec.id
    started = time.monotonic()
    environment = {**NO_WANDB, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "WANDB_BASE_URL": no_network}
    command = (sys.executable, "-m", "concentration.cli", "student", f"name={name}", f"workdir={workdir}")
    finished = run_command(
        *command, *OPTIONS, "logger=wandb", directory=workdir.parent, HOME=str(workdir), **environment
    )
    assert time.monotonic() - started < 120, "20 seconds of trying, and the run"
    assert "continuing offline" in finished.err
    run_path = workdir / "students" / name
    assert load_json(run_path / "DONE.json")["step"] == 10
    assert b"train/loss" in read_offline_runs(run_path)[-1]


def test_a_run_does_not_need_wandbs_service(workdir):
    """It is killed in the middle of the run, as the OOM killer might."""
    options = (*OPTIONS, "logger=wandb", "trainer.max_epochs=15")
    command = ("student", "name=alone", f"workdir={workdir}", *options)
    running = Running(command, workdir.parent, {"HOME": str(workdir), **NO_WANDB})
    run_path = workdir / "students" / "alone"
    running.wait_for(
        lambda: (run_path / "metrics.jsonl").exists() and (run_path / "metrics.jsonl").stat().st_size > 500
    )
    services = list_processes("wandb-core", running.process.pid)
    assert services
    for service in services:
        os.kill(service, signal.SIGKILL)
    finished = running.wait()
    assert finished.code == 0, finished.err
    assert "Traceback" not in finished.err
    assert "going on without it" in finished.err
    assert load_json(run_path / "DONE.json")["step"] == 150


def list_processes(name: str, parent: int) -> list[int]:
    """Children of `parent` whose command names `name`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            of = int(stat.read_text().rpartition(")")[2].split()[1])
            if of == parent and name in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
    return found


@pytest.mark.long
def test_each_job_of_a_multirun_is_a_wandb_run_of_its_own(workdir):
    command = (sys.executable, "-m", "concentration.cli", "teacher", "-m", "vertical=fruit,tools", f"workdir={workdir}")
    options = [option for option in OPTIONS if option != "targets=labels"]
    run_command(*command, *options, "logger=wandb", directory=workdir.parent, HOME=str(workdir), **NO_WANDB)
    for vertical in ("fruit", "tools"):
        runs = list((workdir / "teachers" / vertical / "wandb").glob("offline-run-*/*.wandb"))
        assert len(runs) == 1
        assert f"train/{vertical}/loss".encode() in runs[0].read_bytes()


def test_a_clock_that_is_set_back_stops_neither_status_nor_curves(tmp_path, monkeypatch):
    """A machine's clock is set when its network comes; `status` took such a stage for dead for as long as the clock had lost."""
    now = time.time()
    logger = JsonlLogger(tmp_path / "metrics.jsonl", 0)
    with Progress("student", 10, "steps", tmp_path) as progress:
        monkeypatch.setattr(time, "time", lambda: now - 3600)
        time.sleep(STATUS_SECONDS + 0.1)
        progress.update(5)
        assert load_status(tmp_path)["done"] == 5
    logger.log_metrics({"loss": 1.0}, step=5)
    assert 0 <= load_lines(tmp_path)[0]["seconds"] < 60


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


def test_a_run_that_begins_anew_before_its_first_checkpoint_has_no_line_of_the_one_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.1, "train/fruit/gamma": 2.0}\n')
    JsonlLogger(tmp_path / "metrics.jsonl", first_step=0)
    assert load_metrics(tmp_path) == []


def test_a_line_that_a_kill_cut_off_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 0.1}\n{"step": 2, "sec')
    assert [line["step"] for line in load_metrics(tmp_path)] == [1]


def test_no_logger_is_asked_for_what_it_is_not(workdir):
    finished = concentrate(
        "student", "name=odd", f"workdir={workdir}", "logger=wandbb", directory=workdir.parent, code=2
    )
    assert re.search(r"logger=wandbb: no such choice; did you mean 'wandb'\?", finished.err)
