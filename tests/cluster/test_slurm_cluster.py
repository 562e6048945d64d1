"""The cluster of these tests is one: two nodes, job arrays, dependencies, preemption and requeueing."""

import pytest
from cluster.slurm_cluster import NODES, PREEMPTIBLE, URGENT

pytestmark = pytest.mark.cluster


def test_a_step_runs_on_two_nodes(slurm):
    output = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID")
    assert sorted(output.splitlines()) == [f"{node} {number}" for number, node in enumerate(NODES)]


def test_a_job_that_makes_room_for_an_urgent_one_is_told_and_may_requeue_itself(slurm, tmp_path):
    """SIGTERM goes to the steps, not to the script, and a script that then exits with 0 counts as COMPLETED."""
    script = """
        if [ "${SLURM_RESTART_COUNT:-0}" = 1 ]; then echo second; exit 0; fi
        srun --ntasks=1 --nodes=1 sh -c 'trap "exit 0" TERM; echo first; while :; do sleep 0.1; done'
        scontrol requeue $SLURM_JOB_ID; sleep 60"""
    log = tmp_path / "log"
    job = slurm.submit(f"--partition={PREEMPTIBLE}", "--nodes=2", "--exclusive", "--open-mode=append", "--requeue",
                       f"--output={log}", f"--wrap={script}")  # fmt: skip
    slurm.wait_until(lambda: log.exists() and "first" in log.read_text(), "the first start")
    slurm.run("srun", f"--partition={URGENT}", "--nodes=2", "--exclusive", "true")
    described = slurm.wait_for_end(job)
    assert described["JobState"] == "COMPLETED"
    assert described["Restarts"] == "1"
    assert log.read_text().splitlines()[-1] == "second"


def test_a_job_starts_only_after_one_that_succeeded(slurm):
    failing = slurm.submit("--wrap=exit 3")
    waiting = slurm.submit(f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes", "--wrap=true")
    following = slurm.submit(f"--dependency=afternotok:{failing}", "--wrap=true")
    assert slurm.wait_for_end(failing)["ExitCode"] == "3:0"
    assert slurm.wait_for_end(waiting)["JobState"] == "CANCELLED"
    assert slurm.wait_for_end(following)["JobState"] == "COMPLETED"


def test_an_array_is_several_jobs(slurm, tmp_path):
    job = slurm.submit("--array=0-2", f"--output={tmp_path}/%a", "--wrap=echo $SLURM_ARRAY_TASK_ID")
    for number in range(3):
        assert slurm.wait_for_end(f"{job}_{number}")["JobState"] == "COMPLETED"
        assert (tmp_path / str(number)).read_text() == f"{number}\n"
