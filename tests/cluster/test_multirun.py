"""Several runs as one job array, by `concentrate VERB -m` or by the job script, or as processes of this machine."""

import sys
from pathlib import Path

import pytest
from cluster.pipelines import copy_stages, recording
from cluster.slurm_cluster import REPOSITORY, SlurmCluster
from real_runs import TINY, Finished, Running, concentrate, load_json, run_command, wait_for_hold

pytestmark = pytest.mark.cluster

#: `vertical=fruit` and `vertical=tools`, trained to the end as in `concentrate run`.
TEACHERS = ("teacher", "-m", "vertical=fruit,tools", *TINY)
SUBMITIT = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
KINDS = ("fc_fc", "fc_sc", "sc_sc", "fc_sc_generic")
STRUCTURES = ("student", "-m", f"top={','.join(KINDS)}", "name=${top.kind}", "targets=labels", "top.norm=layer",
              "top.top1=12", "top.top2=12", *(option for option in TINY if not option.startswith("top.")))  # fmt: skip


@pytest.fixture
def workdir(undisturbed, tmp_path) -> Path:
    """With shards, and nothing else."""
    return copy_stages(undisturbed, tmp_path / "work", "shards")


def start(workdir: Path, slurm: SlurmCluster, *arguments: str) -> Running:
    return Running((*arguments, f"workdir={workdir}", *SUBMITIT), workdir.parent, slurm.environment)


def finish(workdir: Path, launcher: Running) -> Finished:
    finished = launcher.wait(400)  # a machine may have much other work
    assert finished.code == 0, finished.err + "\n".join(p.read_text() for p in (workdir / ".submitit").rglob("*.err"))
    return finished


def run_by_joblib(workdir: Path, *arguments: str) -> None:
    """As a user types it: a process that multiprocessing has forked would wait at its end for joblib's idle processes."""
    command = (sys.executable, "-m", "concentration.cli", *arguments, f"workdir={workdir}", *JOBLIB)
    run_command(*command, directory=workdir.parent, PYTHONPATH=str(REPOSITORY))


def tasks_of(workdir: Path) -> list[str]:
    """The folders of the array's tasks, which have their names: NUMBER_TASK."""
    return sorted(path.name for path in (workdir / ".submitit").glob("*_*") if path.is_dir())


def assert_same_weights(workdir: Path, expected: Path, *runs: str) -> None:
    for run in runs:
        assert load_json(workdir / run / "DONE.json")["step"] > 0
        found, wanted = ((root / run / "model.safetensors").read_bytes() for root in (workdir, expected))
        assert found == wanted, run


def test_two_teachers_are_one_array_of_two_tasks(slurm, workdir, undisturbed):
    finish(workdir, start(workdir, slurm, *TEACHERS))
    [array] = {task.partition("_")[0] for task in tasks_of(workdir)}
    assert tasks_of(workdir) == [f"{array}_0", f"{array}_1"]
    assert_same_weights(workdir, undisturbed, "teachers/fruit", "teachers/tools")


@pytest.mark.long
def test_a_task_of_the_array_that_is_told_to_stop_is_requeued_and_ends_with_the_same_weights(slurm, workdir, tmp_path):
    """SIGUSR2 is submitit's signal of a time limit; its own handler would have left in the middle of a step."""
    options = (*TEACHERS, "trainer.max_epochs=40", "trainer.checkpoint_every_seconds=600")
    expected = copy_stages(workdir, tmp_path / "expected", "shards")
    concentrate(*options, f"workdir={expected}", directory=tmp_path)
    launcher = start(workdir, slurm, *options)
    slurm.wait_until((workdir / "teachers/fruit/metrics.jsonl").exists, "training", 90)
    task = next(task for task in tasks_of(workdir) if task.endswith("_0"))
    slurm.run("scancel", "--signal=USR2", task)
    slurm.wait_until(lambda: slurm.describe(task).get("Restarts") == "1", "a restart")
    assert not (workdir / "teachers/fruit/DONE.json").exists()
    slurm.wait_until(lambda: slurm.start_soon(task)["JobState"] == "RUNNING", "its second start")
    finish(workdir, launcher)
    assert_same_weights(workdir, expected, "teachers/fruit", "teachers/tools")


@pytest.mark.long
def test_a_task_of_the_array_that_is_cancelled_stays_so_and_the_multirun_given_again_finishes(
    slurm, workdir, undisturbed
):
    options = (*TEACHERS, "trainer.checkpoint_every_seconds=600")
    records = workdir / "records"
    environment = {**slurm.environment, **recording(records, "teachers-fruit:8")}
    launcher = Running((*options, f"workdir={workdir}", *SUBMITIT), workdir.parent, environment)
    wait_for_hold(records, "teachers-fruit")
    task = next(task for task in tasks_of(workdir) if task.endswith("_0"))
    slurm.run("scancel", task)
    finished = launcher.wait(200)
    assert finished.code == 75, finished.err
    described = slurm.wait_for_end(task)
    assert (described["JobState"], described["Restarts"]) == ("CANCELLED", "0")
    assert not (workdir / "teachers/fruit/DONE.json").exists()
    finish(workdir, Running((*options, f"workdir={workdir}", *SUBMITIT), workdir.parent, environment))
    assert_same_weights(workdir, undisturbed, "teachers/fruit", "teachers/tools")


@pytest.mark.long
def test_all_structures_are_one_array_on_slurm_and_two_at_a_time_here(slurm, workdir, tmp_path):
    finish(workdir, start(workdir, slurm, *STRUCTURES))
    assert len(tasks_of(workdir)) == len(KINDS)
    here = copy_stages(workdir, tmp_path / "here", "shards")
    run_by_joblib(here, *STRUCTURES)
    assert_same_weights(workdir, here, *(f"students/{kind}" for kind in KINDS))
    assert load_json(here / "students/fc_sc_generic/DONE.json")["step"] == 26


@pytest.mark.long
def test_joblib_trains_the_teachers_two_at_a_time(workdir, undisturbed):
    run_by_joblib(workdir, *TEACHERS)
    assert_same_weights(workdir, undisturbed, "teachers/fruit", "teachers/tools")


@pytest.mark.long
def test_the_job_script_of_the_array_trains_the_teachers_and_returns_at_once_when_they_are_there(
    slurm, workdir, undisturbed
):
    script = REPOSITORY / "launch/slurm/teacher_array.sh"
    for expected in ("", "finished already, nothing is to do"):
        job = slurm.submit("--array=0-1", "--cpus-per-task=1", f"--chdir={workdir}", "--export=ALL,TRAINER=cpu",
                           f"--output={workdir}/%A_%a.log", script, f"workdir={workdir}", *TINY)  # fmt: skip
        for task in range(2):
            assert slurm.wait_for_end(f"{job}_{task}")["JobState"] == "COMPLETED"
            assert expected in (workdir / f"{job}_{task}.log").read_text()
        assert_same_weights(workdir, undisturbed, "teachers/fruit", "teachers/tools")
