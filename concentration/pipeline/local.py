"""Runs the jobs of a graph on this machine, several at a time, each in its own process."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from concentration import preemption
from concentration.errors import Preempted
from concentration.pipeline.failures import describe_failures
from concentration.pipeline.jobs import BUSY, LOG, OWN_EXIT_CODE, Job, run_forked
from concentration.progress import build_bars, load_status
from concentration.schema import Config
from concentration.stages.run_directory import RunDirectory

POLL_SECONDS = 0.2
#: Time between two looks at a directory that another run works in.
BUSY_SECONDS = 1.0
#: Imported once, by the server from which job processes are forked: so a job starts in milliseconds, not in seconds.
PRELOAD = ["concentration.pipeline.graph", "concentration.training.fit"]


class LocalConfig(Config):
    """Jobs run on this machine, `num_processes` at a time, until all are done."""

    kind: Literal["local"] = "local"


class LocalLauncher:
    """Runs graphs of jobs with at most `num_processes` at a time; a failed job stops only what depends on it."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._exit_codes = tempfile.TemporaryDirectory(prefix="concentration-")

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs all jobs; returns the number of those whose results are new.

        Raises:
            JobFailed: some failed; all that do not depend on them were run.
            Preempted: a signal asked to stop, and the running jobs have ended.
        """
        waiting = list(jobs)
        running: list[_Running] = []
        finished: set[str] = set()
        failed: dict[str, int] = {}
        log_starts: dict[str, int] = {}
        look_at: dict[str, float] = {}
        num_new = 0
        preemption.note_signals(signal.SIGINT)
        with _Display(len(jobs)) as display, _ending(running):
            while running or (waiting and not preemption.noted_signal()):
                for job in [job for job in waiting if finished.issuperset(job.after)]:
                    has_place = len(running) < self._num_processes and not preemption.noted_signal()
                    if has_place and not _is_held(job, look_at):
                        waiting.remove(job)
                        log = job.file(LOG)
                        log_starts[job.name] = log.stat().st_size if log.exists() else 0
                        running.append(self._start(job))
                        display.start(job)
                for process in list(running):
                    if preemption.noted_signal():
                        process.tell_to_stop()
                    display.update(process.job)
                    if (code := process.poll()) is not None:
                        running.remove(process)
                        num_new += process.has_new_result()
                        display.end(process, code)
                        if code == 0:
                            finished.add(process.job.name)
                        elif code == BUSY:
                            look_at[process.job.name] = time.monotonic() + BUSY_SECONDS
                            waiting.append(process.job)
                        else:
                            failed[process.job.name] = code
                if not running and not any(finished.issuperset(job.after) for job in waiting):
                    break
                time.sleep(POLL_SECONDS)
        preemption.stop_if_asked()
        if failed:
            raise describe_failures(jobs, failed, waiting, log_starts)
        return num_new

    def _start(self, job: Job) -> "_Running":
        frozen, earlier = job.freeze(), job.finished_at()
        own_exit_code = Path(self._exit_codes.name, job.file_name)
        own_exit_code.unlink(missing_ok=True)
        if job.resources.num_processes == 1:
            process = self._context.Process(target=run_forked, args=(frozen,), name=job.name)
            # The first job starts the fork server, which must survive a signal to all processes: it reports how jobs end.
            with preemption.left_to_parent():
                process.start()
        else:
            # torchrun passes SIGTERM on to its processes, but these two signals would kill it and leave them behind.
            with open(job.file(LOG), "ab") as log, preemption.left_to_parent(signal.SIGUSR1, signal.SIGUSR2):
                environment = {**os.environ, OWN_EXIT_CODE: str(own_exit_code)}
                process = subprocess.Popen(job.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)
        return _Running(job, process, time.monotonic(), earlier, own_exit_code)


def _is_held(job: Job, look_at: dict[str, float]) -> bool:
    """Whether another run works on a job that was found busy; it is looked at once a second, without starting a process."""
    if job.name not in look_at:
        return False
    if look_at[job.name] > time.monotonic():
        return True
    look_at[job.name] = time.monotonic() + BUSY_SECONDS
    return RunDirectory(job.directory).is_held


@dataclass
class _Running:
    job: Job
    process: "multiprocessing.Process | subprocess.Popen"
    started: float
    earlier: int | None
    own_exit_code: Path
    is_told: bool = False

    def tell_to_stop(self) -> None:
        """Asks the job, once, to save what it can and end."""
        if not self.is_told:
            self.is_told = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def has_new_result(self) -> bool:
        return self.job.finished_at() != self.earlier

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            code = self.process.poll()
            # torchrun ends with a code of its own, and the file in `jobs/` may be written by another run's same job.
            return int(self.own_exit_code.read_text()) if code and self.own_exit_code.exists() else code
        return self.process.exitcode


@contextlib.contextmanager
def _ending(running: "list[_Running]") -> Iterator[None]:
    """If an error ends this process, lets the running jobs save what they have and end first."""
    try:
        yield
    except BaseException:
        for process in running:
            process.tell_to_stop()
        while any(process.poll() is None for process in running):
            time.sleep(POLL_SECONDS)
        raise


class _Display:
    """A line when a job starts and ends; on a terminal also a bar for each running job."""

    def __init__(self, num_jobs: int):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = build_bars(self._console)
        self._tasks: dict[str, int] = {}
        self._num_jobs = num_jobs
        self._num_started = 0
        self._held: set[str] = set()

    def __enter__(self) -> "_Display":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def start(self, job: Job) -> None:
        if job.name not in self._held:
            self._num_started += 1
            self._console.print(f"\\[{self._num_started}/{self._num_jobs}] {job.name}: {job.summary}")
        self._tasks[job.name] = self._bars.add_task(job.name, total=None, amount="", text="")

    def update(self, job: Job) -> None:
        status = load_status(job.directory)
        if status is not None and self._console.is_terminal:
            amount = f"{status['done']}/{status['total']} {status['unit']}"
            values = {"completed": status["done"], "total": status["total"], "text": status["text"]}
            self._bars.update(self._tasks[job.name], amount=amount, **values)

    def end(self, process: _Running, code: int) -> None:
        self._bars.remove_task(self._tasks[process.job.name])
        if code == BUSY:
            if process.job.name not in self._held:
                self._console.print(f"      {process.job.name}: another run works on it, and is waited for")
            self._held.add(process.job.name)
            return
        outcome = {0: "done", Preempted.exit_code: "stopped"}.get(code, f"FAILED (exit code {code})")
        if code == 0 and process.earlier is not None and not process.has_new_result():
            outcome = "was done already, looked through"
        self._console.print(f"      {process.job.name}: {outcome} in {time.monotonic() - process.started:.0f} s")
