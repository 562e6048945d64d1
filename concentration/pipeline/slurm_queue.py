"""What SLURM's commands say: the jobs in its queue, and the id of one that is submitted."""

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from concentration.errors import ConfigError

#: States of a job that has not ended; all other states are ends.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
#: A job that waits for one that failed: SLURM cancels it in its own time.
_IN_VAIN = "DependencyNeverSatisfied"
#: The job is leaving its machine, either for good or to be started again.
_LEAVING = "COMPLETING"
#: How long to wait until it has left, and the time between two looks.
_MOST_SECONDS, _POLL_SECONDS = 60.0, 0.5


class QueuedJob(NamedTuple):
    """A job as `squeue` shows it: its state, and why it waits or how it ended ("Resources", "OutOfMemory")."""

    state: str
    reason: str

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING and self.reason != _IN_VAIN

    @property
    def is_running(self) -> bool:
        return self.state in _RUNNING


def load_queue(user: str) -> Mapping[str, QueuedJob]:
    """The jobs of a user by id, each task of an array by its own; jobs that have ended recently are among them.

    Raises:
        ConfigError: SLURM is not here, or does not answer.
    """
    said = _call(["squeue", f"--user={user}", "--array", "--states=all", "--noheader", "--format=%i|%T|%r"])
    rows = (line.strip().split("|", 2) for line in said.splitlines() if line.strip())
    return {slurm_id: QueuedJob(state, reason) for slurm_id, state, reason in rows}


def load_settled_queue(user: str, slurm_ids: Sequence[str]) -> Mapping[str, QueuedJob]:
    """The queue once none of these jobs is leaving, because only then is it known whether it has ended; at most a minute later.

    Raises:
        ConfigError: SLURM is not here, or does not answer.
    """
    deadline = time.monotonic() + _MOST_SECONDS
    while True:
        queue = load_queue(user)
        is_settled = all(queue[slurm_id].state != _LEAVING for slurm_id in slurm_ids if slurm_id in queue)
        if is_settled or time.monotonic() > deadline:
            return queue
        time.sleep(_POLL_SECONDS)


def submit_script(command: Sequence[str]) -> str:
    """Runs `sbatch --parsable ...` and returns the job's id.

    Raises:
        ConfigError: SLURM refused it.
    """
    said = _call(command)
    found = re.match(r"(\d+)", said)
    assert found, f"sbatch said {said!r}"
    return found[1]


def cancel_jobs(slurm_ids: Sequence[str]) -> None:
    """Raises: ConfigError where SLURM refuses."""
    _call(["scancel", *slurm_ids])


def _call(command: Sequence[str]) -> str:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"no {command[0]} here: launcher=slurm runs on a machine from which jobs are submitted; there, or with "
            "launcher=local on this machine"
        ) from None
    if finished.returncode:
        said = " ".join(finished.stderr.split()).removeprefix(f"{command[0]}: error: ")
        raise ConfigError(f"{command[0]} failed: {said}; correct launcher.* (`concentrate run --help` shows all)")
    return finished.stdout
