"""The error, and its exit code, when jobs of a graph have failed."""

import signal
from collections.abc import Mapping, Sequence

from concentration.errors import ConcentrationError, Preempted
from concentration.pipeline.jobs import BUSY, CANCELLED, LOG, Job
from concentration.pipeline.states import read_tail

LOG_TAIL_LINES = 5
_KILLED = "was killed, perhaps for want of memory (run the same command again, and it continues)"
_HOW = {None: _KILLED, -signal.SIGKILL: _KILLED, CANCELLED: "was cancelled", BUSY: "found another run at the same work"}


class JobFailed(ConcentrationError):
    """Some jobs failed; carries the worst one's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def describe_failures(
    jobs: Sequence[Job], failed: Mapping[str, int | None], waiting: Sequence[Job], log_starts: Mapping[str, int]
) -> JobFailed:
    """What failed, the last lines of its log, and what could not be run because of it.

    Args:
        failed: exit codes by job name; None, or minus the signal's number, for a job that was killed.
        log_starts: by job name, how many bytes of its log are of earlier runs, whose errors are not this one's.
    """
    lines = []
    for job in jobs:
        if job.name in failed:
            log, code = job.file(LOG), failed[job.name]
            how = _HOW.get(code, f"failed (exit code {code})")
            lines.append(f"{job.name} {how}; the end of {log}:")
            lines.extend(f"    {line}" for line in read_tail(log, LOG_TAIL_LINES, log_starts.get(job.name, 0)))
    if waiting:
        lines.append(f"not run because of it: {', '.join(job.name for job in waiting)}")
    mistakes = {ConcentrationError.exit_code, BUSY, None, -signal.SIGKILL}
    if set(failed.values()) - mistakes - {Preempted.exit_code, CANCELLED}:
        return JobFailed("\n".join(lines), 1)
    is_mistake = mistakes & set(failed.values())
    return JobFailed("\n".join(lines), ConcentrationError.exit_code if is_mistake else Preempted.exit_code)
