"""The state of every stage of a working directory, from what the stages, the jobs and SLURM's queue say."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from concentration.errors import ConcentrationError, DataError, Preempted
from concentration.pipeline.jobs import BUSY, CANCELLED, EXIT_CODE, JOBS, LOG
from concentration.pipeline.records import JobRecord, JobRecords
from concentration.pipeline.slurm_queue import QueuedJob
from concentration.progress import STATUS_FILE, load_status
from concentration.stages.run_directory import describe_lost

#: A process on another machine counts as running for so long after its last sign of life.
SILENT_SECONDS = 600.0
#: A job that was submitted so recently may not be in SLURM's queue yet.
_UNSEEN_SECONDS = 5.0

State = Literal["waiting", "running", "preempted", "cancelled", "failed", "done"]


@dataclass(frozen=True)
class StageState:
    """The state of a stage. `amount`, `rate` and `left` are empty where nothing is known.

    why: what it waits for, or what went wrong.
    is_in_vain: it waits for a job that has failed, was cancelled, or waits in vain itself.
    is_refused: its latest command was a mistake and was refused, but what it had finished before is untouched.
    """

    state: State
    amount: str = ""
    rate: str = ""
    left: str = ""
    why: str = ""
    is_in_vain: bool = False
    is_refused: bool = False


def find_states(workdir: Path, records: JobRecords, queue: Mapping[str, QueuedJob]) -> dict[str, StageState]:
    """The state of every recorded job, by name, in the order of the graph."""
    states: dict[str, StageState] = {}
    for name, record in records.jobs.items():
        state = _find_state(workdir, record, queue)
        if not state.why and state.state in ("waiting", "cancelled"):
            state = _explain(state, {n: states[n] for n in record.after if n in states})
        states[name] = state
    return states


def describe_directory(directory: Path) -> StageState:
    """The state of a stage that belongs to no known run, from its directory, which has a `status.json`."""
    latest = load_status(directory)
    if latest is None:
        if (directory / "DONE.json").exists():
            return _describe_done(directory, "")
        return StageState("failed", why=f"{STATUS_FILE} is damaged; the same command continues")
    amount = _describe_amount(latest)
    is_only_a_sum = not (directory / "config.json").exists()  # of several stages: `targets` of all verticals
    if (directory / "DONE.json").exists() or (is_only_a_sum and latest["state"] == "done"):
        return _describe_done(directory, amount)
    if latest["state"] == "stopped":
        return StageState("preempted", amount, why="saved; the same command continues")
    if latest["state"] != "running":
        return StageState("failed", amount)
    if not _is_alive(latest):
        return StageState("failed", amount, why="ended without a word; the same command continues")
    return _describe_running(latest)


def read_tail(path: Path, num_lines: int, start: int = 0) -> list[str]:
    """The last lines of a log from the byte `start` on; none where there is no log."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - 200 * num_lines - 10_000))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def _find_state(workdir: Path, record: JobRecord, queue: Mapping[str, QueuedJob]) -> StageState:
    directory = workdir / record.directory
    latest = load_status(directory)
    amount = "" if latest is None else _describe_amount(latest)
    queued = queue.get(record.slurm_id) if record.slurm_id else None
    if queued is not None and queued.is_running:
        return StageState("running") if latest is None else _describe_running(latest)
    if queued is not None and queued.is_waiting:
        has_begun = latest is not None and latest["started"] > record.submitted
        return StageState("preempted" if has_begun else "waiting", amount, why=_describe_reason(queued))
    exit_code, ended_at = _read_exit_code(workdir, record)
    proof = directory / record.proof
    is_proven = proof.exists() and (exit_code is None or exit_code == 0 or proof.stat().st_mtime > ended_at)
    if is_proven:
        return _describe_done(directory, amount)
    if exit_code == Preempted.exit_code:
        return StageState("preempted", amount, why="saved; `concentrate run` continues")
    is_cancelled = exit_code is None and queued is not None and queued.state == "CANCELLED"
    has_log = _written_at(workdir / JOBS / f"{record.file_name}{LOG}") > record.submitted
    if exit_code == CANCELLED or (is_cancelled and has_log):
        return StageState("cancelled", amount, why="by scancel; what is saved is kept: `concentrate run` continues")
    if exit_code:
        is_refused = exit_code == ConcentrationError.exit_code and proof.exists()
        why = _find_reason(workdir, record) or f"exit code {exit_code}"
        return StageState("failed", amount, why=why, is_refused=is_refused)
    if latest is not None and latest["state"] == "running" and record.slurm_id is None and _is_alive(latest):
        return _describe_running(latest)
    if record.slurm_id is None:
        has_begun = latest is not None
    else:
        has_begun = has_log
        if not has_begun and queued is None and time.time() - record.submitted < _UNSEEN_SECONDS:
            return StageState("waiting", amount, why="submitted")
    if has_begun:
        # A local job without an exit code was killed, and what its log has says nothing of that.
        reason = "" if record.slurm_id is None else _find_reason(workdir, record)
        ended = f"{queued.state.lower()}: " if queued is not None else ""
        return StageState("failed", amount, why=f"{ended}{reason or 'ended without a word; run again to continue'}")
    return StageState("waiting" if record.slurm_id is None else "cancelled", amount)


def _describe_done(directory: Path, amount: str) -> StageState:
    try:
        return StageState("done", amount, why=describe_lost(directory))
    except DataError as error:  # later stages will not read it either
        return StageState("failed", amount, why=str(error))


def _describe_running(latest: Mapping[str, Any]) -> StageState:
    rate = latest["per_second"]
    left = (latest["total"] - latest["done"]) / rate if rate else float("inf")
    left_text = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else "-"
    return StageState("running", _describe_amount(latest), f"{rate:.1f} {latest['unit']}/s", left_text)


def _describe_amount(latest: Mapping[str, Any]) -> str:
    return f"{latest['done']}/{latest['total']} {latest['unit']}"


def _describe_reason(queued: QueuedJob) -> str:
    return "" if queued.reason in ("Dependency", "None") else queued.reason


def _explain(state: StageState, awaited: Mapping[str, StageState]) -> StageState:
    """The state with what the job waits for, or why it waits in vain. A job that left the queue for neither was cancelled."""
    failed = [name for name, other in awaited.items() if other.state == "failed" and not other.is_refused]
    refused = [name for name, other in awaited.items() if other.is_refused]
    cancelled = [name for name, other in awaited.items() if other.state == "cancelled"]
    in_vain = [name for name, other in awaited.items() if other.state == "waiting" and other.is_in_vain]
    for names, why in (
        (failed, "failed"),
        (refused, "was refused"),
        (cancelled, "was cancelled"),
        (in_vain, "waits in vain"),
    ):
        if names:
            return replace(state, state="waiting", why=f"for {_list(names)}, which {why}", is_in_vain=True)
    if state.state == "cancelled":
        return replace(state, why="before it began; `concentrate run` submits it again")
    coming = [name for name, other in awaited.items() if other.state != "done"]
    return replace(state, why=f"for {_list(coming)}" if coming else "")


def _list(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} jobs, {names[0]} first"


def _read_exit_code(workdir: Path, record: JobRecord) -> tuple[int | None, float]:
    """The exit code and when it was written; None for the code where there is none, or it is not the job's own."""
    path = workdir / JOBS / f"{record.file_name}{EXIT_CODE}"
    try:
        code = int(path.read_text())
        return None if code == BUSY else code, path.stat().st_mtime
    except (FileNotFoundError, ValueError):
        return None, 0.0


def _find_reason(workdir: Path, record: JobRecord) -> str:
    """The last line of the job's log; its own error message, if there is one, before what started it says."""
    lines = [line for line in read_tail(workdir / JOBS / f"{record.file_name}{LOG}", 50) if line.strip()]
    own = [line.removeprefix("concentrate: ") for line in lines if line.startswith("concentrate: ")]
    return (own or [line.strip() for line in lines] or [""])[-1]


def _written_at(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _is_alive(latest: Mapping[str, Any]) -> bool:
    if latest["host"] != socket.gethostname():
        return time.time() - latest["updated"] < SILENT_SECONDS
    try:
        os.kill(latest["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
