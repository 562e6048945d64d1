"""A student of two machines by launch/slurm/student.sh, disturbed in every way that a cluster knows: the same weights."""

import shutil
from pathlib import Path

import pytest
from cluster.pipelines import assert_each_sample_once, copy_stages, recording, terminating_at_first
from cluster.slurm_cluster import PREEMPTIBLE, REPOSITORY, URGENT, SlurmCluster
from real_runs import RECORD, TINY, load_json, load_taken, start_ranks, wait_for_hold

pytestmark = pytest.mark.cluster

STUDENT = REPOSITORY / "launch" / "slurm" / "student.sh"
#: 26 steps, with a validation after the 13th.
OPTIONS = (*TINY, "targets=labels", "optimizer=adamw", "trainer.checkpoint_every_seconds=0")
NUM_STEPS, NUM_EPOCHS = 26, 2


class Students:
    """Submits students of one working directory, and compares them with one that nothing disturbs."""

    def __init__(self, slurm: SlurmCluster, workdir: Path):
        self.slurm, self.workdir = slurm, workdir

    def submit(self, name: str, *sbatch: str, hold: int = -1, options: tuple[str, ...] = OPTIONS, **more: str) -> str:
        """The job's number; its ranks wait before step `hold` until something happens to them."""
        environment = {
            "TRAINER": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            **recording(self.records(name), f"students-{name}:{hold}"),
        }
        values = ",".join(f"{key}={value}" for key, value in {**environment, **more}.items())
        return self.slurm.submit(
            f"--partition={PREEMPTIBLE}", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10",
            f"--export=ALL,{values}", *sbatch, f"--output={self.workdir}/{name}.log", f"--chdir={self.workdir}",
            STUDENT, f"workdir={self.workdir}", f"name={name}", *options, "trainer.devices=auto", "trainer.num_nodes=auto",
        )  # fmt: skip

    def path(self, name: str) -> Path:
        return self.workdir / "students" / name

    def records(self, name: str) -> Path:
        return self.workdir / "records" / name

    def log(self, name: str) -> str:
        path = self.workdir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_hold(self, name: str) -> None:
        wait_for_hold(self.records(name), f"students-{name}", num_ranks=2)
        assert not (self.path(name) / "DONE.json").exists()

    def assert_finished_as(self, job: str, name: str, expected: str, restarts: int, may_repeat: bool = False) -> None:
        described = self.slurm.wait_for_end(job)
        assert described["JobState"] == "COMPLETED", self.log(name)
        assert described["Restarts"] == str(restarts), self.log(name)
        weights = (self.path(name) / "model.safetensors").read_bytes()
        assert weights == (self.path(expected) / "model.safetensors").read_bytes()
        taken, wanted = (load_taken(self.records(each), f"students-{each}") for each in (name, expected))
        assert_each_sample_once(taken, wanted, NUM_EPOCHS, may_repeat)


@pytest.fixture(scope="module")
def students(slurm, undisturbed, tmp_path_factory) -> Students:
    return Students(slurm, copy_stages(undisturbed, tmp_path_factory.mktemp("students") / "work", "shards"))


@pytest.fixture(scope="module")
def alone(students) -> str:
    """Trained by the same number of ranks, which the tests have started and SLURM has not."""
    command = ["student", f"workdir={students.workdir}", "name=alone", *OPTIONS, "trainer.devices=2"]
    environment = {RECORD: str(students.records("alone"))}
    ranks = start_ranks(command, students.workdir, 2, [environment, environment])
    assert [rank.wait().code for rank in ranks] == [0, 0]
    assert load_json(students.path("alone") / "DONE.json")["step"] == NUM_STEPS
    return "alone"


def test_a_student_that_makes_room_is_requeued_and_ends_with_the_same_weights(students, alone):
    job = students.submit("preempted", hold=10)
    students.wait_for_hold("preempted")
    students.slurm.run("srun", f"--partition={URGENT}", "--nodes=2", "--exclusive", "true")
    students.assert_finished_as(job, "preempted", alone, restarts=1)
    assert "which is saved" in students.log("preempted")


@pytest.mark.long
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_by_scancel_has_it_requeued(students, alone, name):
    """To the step, as at a preemption, or to the script, as before a time limit; a second one changes nothing."""
    job = students.submit(name, hold=15)
    students.wait_for_hold(name)
    where = ["--batch"] if name == "USR1" else []
    students.slurm.run("scancel", *where, f"--signal={name}", job)
    students.slurm.run("scancel", f"--signal={name}", job)
    students.assert_finished_as(job, name, alone, restarts=1)


@pytest.mark.long
def test_a_time_limit_has_it_requeued(students, alone):
    """The shortest limit of SLURM's is a minute, in which a slow machine does not come to a step: that is no matter."""
    job = students.submit("limited", "--time=1", "--signal=B:USR1@20", hold=10)
    students.slurm.wait_until(lambda: students.slurm.describe(job)["Restarts"] == "1", "a restart", 180)
    students.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # enough for a slow machine
    students.assert_finished_as(job, "limited", alone, restarts=1)
    assert "requeued (restart 1 of at most 100)" in students.log("limited")


@pytest.mark.long
def test_a_task_that_is_killed_hard_fails_the_job_and_submitted_again_it_ends_with_the_same_weights(students, alone):
    job = students.submit("killed", hold=22)
    students.wait_for_hold("killed")
    students.slurm.run("scancel", "--signal=KILL", f"{job}.0")
    assert students.slurm.wait_for_end(job)["JobState"] == "FAILED"
    assert not (students.path("killed") / "DONE.json").exists()
    assert list((students.path("killed") / "checkpoints").glob("step-000000020.ckpt"))
    students.assert_finished_as(students.submit("killed"), "killed", alone, restarts=0, may_repeat=True)


@pytest.mark.long
def test_a_student_that_is_cancelled_stays_so_and_submitted_again_it_ends_with_the_same_weights(students, alone):
    job = students.submit("cancelled", hold=10)
    students.wait_for_hold("cancelled")
    students.slurm.run("scancel", job)
    described = students.slurm.wait_for_end(job)
    assert (described["JobState"], described["Restarts"]) == ("CANCELLED", "0"), students.log("cancelled")
    assert "ended by scancel" in students.log("cancelled")
    students.assert_finished_as(students.submit("cancelled"), "cancelled", alone, restarts=0)


@pytest.mark.long
def test_a_signal_while_the_script_sets_up_has_it_requeued(students, alone, tmp_path):
    launch = Path(shutil.copytree(STUDENT.parent, tmp_path / "launch"))
    with open(launch / "environment.sh", "a") as environment:
        environment.write(f'[ "${{SLURM_RESTART_COUNT:-0}}" = 1 ] || {{ touch {tmp_path}/begun; sleep 5; }}\n')
    job = students.submit("early", CONCENTRATION_LAUNCH=str(launch))
    students.slurm.wait_until((tmp_path / "begun").exists, "the setup")
    students.slurm.run("scancel", "--batch", "--signal=USR1", job)
    students.assert_finished_as(job, "early", alone, restarts=1)


@pytest.mark.long
def test_a_signal_before_a_rank_can_note_it_has_it_requeued(students, alone, tmp_path):
    job = students.submit("first", **terminating_at_first(tmp_path / "site"))
    students.assert_finished_as(job, "first", alone, restarts=1)


@pytest.mark.long
def test_it_is_requeued_no_more_often_than_allowed(students):
    job = students.submit("capped", hold=10, MAX_RESTARTS="0")
    students.wait_for_hold("capped")
    students.slurm.run("scancel", "--signal=TERM", job)
    described = students.slurm.wait_for_end(job)
    assert (described["JobState"], described["ExitCode"]) == ("FAILED", "75:0")
    assert "submit it again and it continues" in students.log("capped")
