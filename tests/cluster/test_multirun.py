"""`concentrate teacher -m`: the teachers as one job array, or as processes of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import TINY, concentrate, load_json, prepare_shards

pytestmark = pytest.mark.cluster

#: `vertical=fruit` and `vertical=tools`, trained to the end.
TEACHERS = ("teacher", "-m", "vertical=fruit,tools", *TINY)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("multirun"))


@pytest.fixture(scope="module")
def undisturbed(prepared) -> dict[str, bytes]:
    """The weights of both teachers, trained in this process's children one after the other."""
    concentrate(*TEACHERS, f"workdir={prepared}", directory=prepared.parent)
    return _take_weights(prepared)


def test_two_teachers_are_one_array_of_two_tasks(slurm, prepared, undisturbed):
    submitit = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    command = [sys.executable, "-m", "concentration.cli", *TEACHERS, f"workdir={prepared}", *submitit]
    done = subprocess.run(command, env=slurm.environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr + _show_logs(prepared)
    [array] = {path.name.partition("_")[0] for path in (prepared / ".submitit").glob("*_[01]")}
    assert sorted(path.name for path in (prepared / ".submitit").glob("*_[01]")) == [f"{array}_0", f"{array}_1"]
    assert _take_weights(prepared) == undisturbed


def _take_weights(workdir: Path) -> dict[str, bytes]:
    """The weights of the finished teachers, which are then gone."""
    found = {}
    for path in sorted((workdir / "teachers").iterdir()):
        assert load_json(path / "DONE.json")["step"] > 0
        found[path.name] = (path / "model.safetensors").read_bytes()
    (workdir / "teachers").rename(workdir / f"teachers-{len(list(workdir.iterdir()))}")
    return found


def _show_logs(workdir: Path) -> str:
    return "\n".join(path.read_text() for path in (workdir / ".submitit").rglob("*.err"))


@pytest.mark.long
def test_a_task_of_the_array_that_is_told_to_stop_is_requeued_and_ends_with_the_same_weights(slurm, prepared):
    """SIGUSR2 is submitit's signal of a time limit; its own handler would have left in the middle of a step."""
    options = [*TEACHERS, f"workdir={prepared}", "trainer.max_epochs=40", "trainer.checkpoint_every_seconds=600"]
    concentrate(*options, directory=prepared.parent)
    expected = _take_weights(prepared)
    submitit = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "concentration.cli", *options, *submitit],
        env=slurm.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    earlier = {path.name for path in (prepared / ".submitit").glob("*_0")}
    slurm.wait_until((prepared / "teachers/fruit/metrics.jsonl").exists, "training", 90)
    [task] = {path.name for path in (prepared / ".submitit").glob("*_0")} - earlier
    slurm.run("scancel", "--signal=USR2", task)
    slurm.wait_until(lambda: slurm.describe(task).get("Restarts") == "1", "a restart")
    assert not (prepared / "teachers/fruit/DONE.json").exists()
    slurm.wait_until(lambda: slurm.describe(task)["Reason"] == "BeginTime", "its place in the queue")
    slurm.start_now(task)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output + _show_logs(prepared)
    assert _take_weights(prepared) == expected


@pytest.mark.long
def test_joblib_runs_all_structures_two_at_a_time(prepared):
    sweep = ("student", "-m", "top=fc_fc,fc_sc,sc_sc,fc_sc_generic", "name=${top.kind}", *TINY, "targets=labels")
    options = [option for option in sweep if not option.startswith("top.")]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "top.top1=12", "top.top2=12", "top.norm=layer"]
    concentrate(*options, f"workdir={prepared}", *joblib, directory=prepared.parent)
    for name in ("fc_fc", "fc_sc", "sc_sc", "fc_sc_generic"):
        assert load_json(prepared / "students" / name / "DONE.json")["step"] == 26
