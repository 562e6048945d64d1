"""A student of two machines by launch/slurm/student.sh, disturbed in every way that a cluster knows: the same weights."""

from pathlib import Path

import pytest
from cluster.pipelines import copy_stages
from cluster.slurm_cluster import PREEMPTIBLE, REPOSITORY, URGENT, SlurmCluster
from real_runs import TINY, load_json, start_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

STUDENT = REPOSITORY / "launch" / "slurm" / "student.sh"
#: 104 steps, each as short as two processes that talk by gloo make it.
OPTIONS = (*TINY, "targets=labels", "trainer.max_epochs=8", "optimizer=adamw", "trainer.checkpoint_every_seconds=1")


class Students:
    """Submits students of one working directory, and compares them with one that nothing disturbs."""

    def __init__(self, slurm: SlurmCluster, workdir: Path):
        self.slurm, self.workdir = slurm, workdir

    def submit(self, name: str, *sbatch: str, options: tuple[str, ...] = OPTIONS) -> str:
        return self.slurm.submit(
            f"--partition={PREEMPTIBLE}", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10",
            "--export=ALL,TRAINER=cpu,MASTER_ADDR=127.0.0.1", *sbatch,
            f"--output={self.workdir}/{name}.log", f"--chdir={self.workdir}",
            STUDENT, f"workdir={self.workdir}", f"name={name}", *options, "trainer.devices=auto", "trainer.num_nodes=auto",
        )  # fmt: skip

    def path(self, name: str) -> Path:
        return self.workdir / "students" / name

    def log(self, name: str) -> str:
        path = self.workdir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def step(self, name: str) -> int:
        path = self.path(name) / "status.json"
        return load_json(path)["done"] if path.exists() else -1

    def wait_for_step(self, name: str, step: int) -> None:
        self.slurm.wait_until(lambda: self.step(name) >= step, f"step {step} of {name}", 90)

    def assert_finished_as(self, job: str, name: str, expected: str, restarts: int) -> None:
        described = self.slurm.wait_for_end(job)
        assert described["JobState"] == "COMPLETED", self.log(name)
        assert described["Restarts"] == str(restarts), self.log(name)
        weights = (self.path(name) / "model.safetensors").read_bytes()
        assert weights == (self.path(expected) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def students(slurm, undisturbed, tmp_path_factory) -> Students:
    return Students(slurm, copy_stages(undisturbed, tmp_path_factory.mktemp("students") / "work", "shards"))


@pytest.fixture(scope="module")
def alone(students) -> str:
    """Trained by the same number of ranks, which the tests have started and SLURM has not."""
    command = ["student", f"workdir={students.workdir}", "name=alone", *OPTIONS, "trainer.devices=2"]
    codes = [rank.wait().code for rank in start_ranks(command, students.workdir, 2, [{}, {}])]
    assert codes == [0, 0]
    assert load_json(students.path("alone") / "DONE.json")["step"] == 104
    return "alone"


def test_a_student_that_makes_room_is_requeued_and_ends_with_the_same_weights(students, alone):
    job = students.submit("preempted")
    students.wait_for_step("preempted", 20)
    students.slurm.run("srun", f"--partition={URGENT}", "--nodes=2", "--exclusive", "true")
    assert not (students.path("preempted") / "DONE.json").exists(), "it ended before it could be preempted"
    students.assert_finished_as(job, "preempted", alone, restarts=1)
    assert "which is saved" in students.log("preempted")


@pytest.mark.long
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_by_scancel_has_it_requeued(students, alone, name):
    """To the step, as at a preemption, or to the script, as before a time limit; a second one changes nothing."""
    job = students.submit(name)
    students.wait_for_step(name, 20)
    where = ["--batch"] if name == "USR1" else []
    students.slurm.run("scancel", *where, f"--signal={name}", job)
    students.slurm.run("scancel", f"--signal={name}", job)
    students.assert_finished_as(job, name, alone, restarts=1)


@pytest.mark.long
def test_a_time_limit_has_it_requeued(students, alone):
    """The shortest limit of SLURM's is a minute, and the signal comes up to a minute early."""
    options = (*OPTIONS, "trainer.max_epochs=400")
    job = students.submit("limited", "--time=1", "--signal=B:USR1@20", options=options)
    students.slurm.wait_until(lambda: students.slurm.describe(job)["Restarts"] == "1", "a restart", 150)
    assert "requeued (restart 1 of at most 100)" in students.log("limited")
    step = students.step("limited")
    assert list((students.path("limited") / "checkpoints").glob(f"step-{step:09d}.ckpt"))
    students.slurm.run("scancel", job)


@pytest.mark.long
def test_a_task_that_is_killed_hard_fails_the_job_and_submitted_again_it_ends_with_the_same_weights(students, alone):
    job = students.submit("killed")
    students.wait_for_step("killed", 20)
    students.slurm.run("scancel", "--signal=KILL", f"{job}.0")
    assert students.slurm.wait_for_end(job)["JobState"] == "FAILED"
    assert not (students.path("killed") / "DONE.json").exists()
    students.assert_finished_as(students.submit("killed"), "killed", alone, restarts=0)


@pytest.mark.long
def test_it_is_requeued_no_more_often_than_allowed(students):
    job = students.submit("capped", "--export=ALL,TRAINER=cpu,MASTER_ADDR=127.0.0.1,MAX_RESTARTS=0")
    students.wait_for_step("capped", 10)
    students.slurm.run("scancel", "--signal=TERM", job)
    described = students.slurm.wait_for_end(job)
    assert (described["JobState"], described["ExitCode"]) == ("FAILED", "75:0")
    assert "submit it again and it continues" in students.log("capped")
