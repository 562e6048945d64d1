"""Asked to stop at any moment, a run saves and exits with 75; exit code 0 means finished; nothing waits for a dead rank."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_runs import (
    TINY,
    Plant,
    Running,
    concentrate,
    load_json,
    load_lines,
    load_weights,
    prepare_shards,
    start_ranks,
    write_shards,
)

OPTIONS = (*TINY, "targets=labels", "trainer.checkpoint_every_seconds=60")
SAVE = "concentration.training.checkpoints:CheckpointDirectory.save"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("preemption"))


@pytest.fixture(scope="module")
def undisturbed(prepared) -> Path:
    concentrate("student", "name=undisturbed", f"workdir={prepared}", *OPTIONS, directory=prepared.parent)
    return prepared / "students" / "undisturbed"


@pytest.fixture
def workdir(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "work"))


def assert_same_weights(run_path: Path, expected: Path) -> None:
    assert (run_path / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def validations(run_path: Path) -> dict[int, float]:
    """val/mpvap by step."""
    lines = load_lines(run_path) if (run_path / "metrics.jsonl").exists() else []
    found = [(line["step"], line["val/mpvap"]) for line in lines if "val/mpvap" in line]
    assert len(dict(found)) == len(found), "a step has two results"
    return dict(found)


@pytest.mark.parametrize(
    ("plant", "step"),
    [
        (Plant("concentration.stages.student:load_prepared", signal=signal.SIGTERM), 0),
        (Plant("concentration.training.fit:_build_trainer", when="after", signal=signal.SIGUSR1), 0),
        (Plant("lightning.pytorch.strategies.strategy:Strategy.setup", signal=signal.SIGTERM), 0),
        (Plant("concentration.training.module:StudentModule.training_step", 4, signal=signal.SIGUSR2), 4),
        (Plant("concentration.training.module:StudentModule.on_validation_epoch_start", signal=signal.SIGTERM), 13),
        (Plant("concentration.training.module:StudentModule.validation_step", 5, signal=signal.SIGUSR1), 26),
        (Plant("concentration.training.module:StudentModule.on_validation_epoch_end", signal=signal.SIGTERM), 13),
        (Plant("concentration.training.module:StudentModule.training_step", 26, signal=signal.SIGTERM), 26),
    ],
    ids=["before the data", "before training", "in Lightning", "in a step", "in a validation", "in the last validation",
         "after a validation", "in the last step"],
)  # fmt: skip
def test_a_signal_stops_with_75_and_the_next_run_ends_with_the_same_weights(
    undisturbed, workdir, tmp_path, plant, step
):
    command = ("student", "name=stopped", f"workdir={workdir}", *OPTIONS)
    marker = tmp_path / "marker"
    stopped = Running(command, tmp_path, {"CONCENTRATION_PREEMPTED": str(marker)}, plant).wait()
    assert stopped.code == 75, stopped.err
    assert "Traceback" not in stopped.err
    assert "run the same command again" in marker.read_text()
    run_path = workdir / "students" / "stopped"
    assert not (run_path / "DONE.json").exists()
    kept = [path.name for path in run_path.glob("checkpoints/*")]
    assert kept == ([f"step-{step:09d}.ckpt"] if step else [])
    # A validation that is stopped has no result, and is made anew; one that has ended is not made again.
    validated = [13] if (step == 13 and "epoch_end" in plant.where) or step == 26 else []
    assert validations(run_path).keys() == set(validated)
    concentrate(*command, directory=tmp_path)
    assert_same_weights(run_path, undisturbed)
    assert validations(run_path) == validations(undisturbed)


def train_stopped(workdir: Path, name: str, plants: list[Plant], *options: str) -> Path:
    """A student that meets the plants' signals one run after the other, and is then trained to its end."""
    command = ("student", f"name={name}", f"workdir={workdir}", *OPTIONS, *options)
    for plant in plants:
        concentrate(*command, directory=workdir.parent, plant=plant, code=75)
    concentrate(*command, directory=workdir.parent)
    return workdir / "students" / name


@pytest.mark.parametrize(
    ("options", "plants", "steps"),
    [
        (("trainer.max_epochs=1",), [("end", 1)], [13]),
        (("trainer.max_epochs=1.5",), [("start", 2)], [13, 20]),
        (("trainer.max_epochs=3",), [("start", 1), ("end", 2)], [13, 26, 39]),
    ],
    ids=["behind the only one", "in one that is no multiple of the interval", "in one, and behind the next"],
)
def test_a_signal_around_a_validation_loses_neither_it_nor_the_best_network(workdir, options, plants, steps):
    options = (*options, "trainer.keep_best=true")
    whole = train_stopped(workdir, "whole", [], *options)
    hook = "concentration.training.module:StudentModule.on_validation_epoch_"
    moments = [Plant(f"{hook}{which}", call, "after", signal.SIGTERM) for which, call in plants]
    stopped = train_stopped(workdir, "stopped", moments, *options)
    assert list(validations(whole)) == steps
    assert validations(stopped) == validations(whole)
    assert_same_weights(stopped, whole)
    assert (stopped / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()


def test_a_run_without_validation_images_is_saved_and_stopped_at_the_end_of_an_epoch(tmp_path):
    """Each of its steps is one, as no validation would be due at any other."""
    given = write_shards(tmp_path / "given")
    (given / "val-000000.tar").unlink()
    concentrate(
        "prepare", "data=shards", f"data.path={given}", "data.image_size=16", "workdir=work", directory=tmp_path
    )
    command = ("student", "workdir=work", *OPTIONS, "trainer.batch_size=200", "trainer.max_epochs=40")
    plant = Plant("concentration.training.module:StudentModule.training_step", 3, signal=signal.SIGTERM)
    concentrate(*command, directory=tmp_path, plant=plant, code=75)
    assert [path.name for path in (tmp_path / "work/students/student/checkpoints").iterdir()] == ["step-000000003.ckpt"]


def test_a_second_signal_while_it_saves_changes_nothing(undisturbed, workdir, tmp_path):
    command = ("student", "name=stopped", f"workdir={workdir}", *OPTIONS)
    running = Running(command, tmp_path, plant=Plant(SAVE, signal=signal.SIGTERM))
    running.wait_for((workdir / "students/stopped/status.json").exists)
    running.send(signal.SIGUSR1)
    assert running.wait().code == 75
    concentrate(*command, directory=tmp_path)
    assert_same_weights(workdir / "students/stopped", undisturbed)


def test_a_signal_after_the_last_step_does_not_keep_it_from_finishing(undisturbed, workdir, tmp_path):
    plant = Plant("concentration.networks.student:Student.save", signal=signal.SIGTERM)
    marker = tmp_path / "marker"
    concentrate("student", "name=late", f"workdir={workdir}", *OPTIONS, directory=tmp_path, plant=plant,
                CONCENTRATION_PREEMPTED=str(marker))  # fmt: skip
    assert load_json(workdir / "students/late/DONE.json")["step"] == 26
    assert not marker.exists()
    assert_same_weights(workdir / "students/late", undisturbed)


def test_a_signal_before_torch_is_imported_is_not_lost(workdir, tmp_path):
    command = [sys.executable, "-m", "concentration.cli", "student", f"workdir={workdir}", *OPTIONS]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    while not _catches(process.pid, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "too late to test anything"
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert not (workdir / "students/student/DONE.json").exists()


def test_other_verbs_stop_between_two_pieces_of_work(workdir, tmp_path):
    for vertical in ("fruit", "tools"):
        concentrate("teacher", f"vertical={vertical}", f"workdir={workdir}", *TINY, directory=tmp_path)
    plant = Plant("concentration.targets:TargetRecords.save", 2, "before", signal.SIGTERM)
    stopped = concentrate("targets", f"workdir={workdir}", directory=tmp_path, plant=plant, code=75)
    assert "stopped by SIGTERM; what is done is kept" in stopped.err
    assert len(list((workdir / "targets").rglob("train-*.safetensors"))) == 2
    concentrate("targets", f"workdir={workdir}", directory=tmp_path)


def test_one_rank_that_is_asked_to_stop_stops_all_and_they_go_on_exactly(prepared, tmp_path):
    command = ["student", f"workdir={prepared}", *OPTIONS, "trainer.devices=2", "trainer.max_epochs=3"]
    in_validation = Plant(
        "concentration.training.module:StudentModule.on_validation_epoch_start", signal=signal.SIGTERM
    )
    for name in ("together", "in a step", "in a validation"):
        plant = in_validation if name == "in a validation" else None
        ranks = start_ranks([*command, f"name={name}"], tmp_path, 2, [{}, {}], plant)
        if name != "together":
            if plant is None:
                ranks[0].wait_for((prepared / "students" / name / "metrics.jsonl").exists)
                ranks[1].send(signal.SIGUSR1)
            assert [rank.wait().code for rank in ranks] == [75, 75]
            ranks = start_ranks([*command, f"name={name}"], tmp_path, 2, [{}, {}])
        assert [rank.wait().code for rank in ranks] == [0, 0]
        assert_same_weights(prepared / "students" / name, prepared / "students/together")
        assert validations(prepared / "students" / name) == validations(prepared / "students/together")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["is dead", "hangs"])
def test_a_rank_does_not_wait_for_ever_for_one_that(prepared, tmp_path, number):
    command = ["student", f"name={number.name}", f"workdir={prepared}", *OPTIONS, "trainer.devices=2"]
    ranks = start_ranks([*command, "trainer.max_epochs=400", "trainer.timeout_seconds=4"], tmp_path, 2, [{}, {}])
    ranks[0].wait_for((prepared / f"students/{number.name}/metrics.jsonl").exists)
    ranks[1].send(number)
    started = time.monotonic()
    code = ranks[0].wait(60).code
    if number == signal.SIGSTOP:
        ranks[1].send(signal.SIGKILL)
    ranks[1].wait()
    assert code not in (0, 2, 75)
    assert time.monotonic() - started < 30


def test_a_run_goes_on_with_as_many_ranks_as_are_started(prepared, tmp_path):
    command = ["student", "name=elastic", f"workdir={prepared}", *OPTIONS, "trainer.max_epochs=3", "optimizer.lr=0.01"]
    auto = [*command, "trainer.devices=auto", "trainer.num_nodes=auto"]
    for world_size in (2, 3):
        ranks = start_ranks(auto, tmp_path, world_size, [{}] * world_size)
        if world_size == 2:
            ranks[0].wait_for((prepared / "students/elastic/metrics.jsonl").exists)
            ranks[0].send(signal.SIGTERM)
        assert {rank.wait().code for rank in ranks} == ({75} if world_size == 2 else {0})
    concentrate(*command[:1], "name=alone", *command[2:], directory=tmp_path)
    alone, elastic = (load_weights(prepared / "students" / name) for name in ("alone", "elastic"))
    assert max(abs(alone[name] - elastic[name]).max() for name in alone) < 1e-4


def test_auto_is_for_both_or_none(prepared, tmp_path):
    finished = concentrate(
        "student", f"workdir={prepared}", *OPTIONS, "trainer.devices=auto", directory=tmp_path, code=2
    )
    assert "set both to auto, or none" in finished.err


def _catches(process: int, number: int) -> bool:
    [mask] = [line.split()[1] for line in Path(f"/proc/{process}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)
