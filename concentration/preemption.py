"""Being asked to stop: a signal is only noted, and whoever works looks at the note where stopping loses nothing."""

import contextlib
import multiprocessing.resource_tracker
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from concentration.errors import Preempted

#: SLURM and Kubernetes send SIGTERM, our job scripts SIGUSR1 before the time limit, submitit's SIGUSR2, a closed terminal SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

#: An environment variable: the file that a process leaves which ends with exit code 75. Job scripts look at it, since
#: launchers keep no exit code: torchrun makes 1 of every one, and srun gives the highest of all tasks.
MARKER = "CONCENTRATION_PREEMPTED"

_noted = 0


def note_signals(*more: signal.Signals) -> None:
    """From now on signals are noted and nothing else, whoever handled them before; a second one changes nothing.

    Also those that came while they were `left_to_parent`.
    """
    for number in (*SIGNALS, *more):
        _handle(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, *more))


@contextlib.contextmanager
def left_to_parent(*numbers: signal.Signals) -> Iterator[None]:
    """What begins in here, process or thread, does not see these signals, or all that ask to stop, from its first instruction on.

    A signal to the whole group, as SLURM sends it, must not end a worker in the middle of its work; this thread hears of it
    when the block is left.
    """
    # NOTE: multiprocessing would start its tracker at the first process of a server, and let signals through afterwards.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers or (*SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def noted_signal() -> int:
    """The number of the latest signal that asked this process to stop; 0 where none did."""
    return _noted


def stop_if_asked() -> None:
    """Called between two pieces of work, of which each that is done is kept.

    Raises:
        Preempted: a signal was noted.
    """
    if _noted:
        raise Preempted(f"stopped by {_name(_noted)}; what is done is kept: run the same command again")


def stop_at_once() -> None:
    """From now on a signal raises `Preempted` where it strikes: for a process that only waits for others."""
    for number in SIGNALS:
        _handle(number, _raise)


def leave_marker(why: Preempted) -> None:
    """Leaves the file that a job script looks at, where it has asked for one."""
    if path := os.environ.get(MARKER):
        Path(path).write_text(f"{why}\n")


def requeue_slurm_job() -> None:
    """Has SLURM start this process's job again, and ends the process; returns where it was cancelled, or restarted too often."""
    restarts, most = int(os.environ.get("SLURM_RESTART_COUNT", 0)), int(os.environ.get("MAX_RESTARTS", 100))
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    if _is_cancelled(job, restarts):
        print("concentrate: ended by scancel, not requeued; run the same command again", file=sys.stderr)
        return
    if restarts >= most:
        print(f"concentrate: restarted {restarts} times, not requeued; run the same command again", file=sys.stderr)
        return
    subprocess.run(["scontrol", "requeue", job], check=True)
    sys.stderr.flush()
    os._exit(Preempted.exit_code)


def _is_cancelled(job: str, restarts: int) -> bool:
    """Whether a job that was asked to stop was so by scancel, as `launch/slurm/run_step.sh` finds out."""
    said = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False
    ).stdout
    is_leaving = " JobState=COMPLETING " in said and f" Restarts={restarts} " in said
    return is_leaving and not re.search(" (Reason=TimeLimit|PreemptTime=2)", said)


def _note(number: int, frame) -> None:
    global _noted
    _noted = number


def _raise(number: int, frame) -> None:
    raise Preempted(f"stopped by {_name(number)} while waiting for jobs; run the same command again")


def _handle(number: signal.Signals, handler: Callable) -> None:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has it ignored, and means it
        signal.signal(number, handler)


def _name(number: int) -> str:
    return signal.Signals(number).name
