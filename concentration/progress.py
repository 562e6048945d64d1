"""Progress of long work: a bar on a terminal, a line now and then elsewhere, and a status file that others can read."""

import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import rich.progress
from rich.console import Console

from concentration.errors import DataError, Preempted
from concentration.files import write_atomically
from concentration.preemption import stop_if_asked
from concentration.schema import parse_json
from concentration.temporaries import clear_temporaries

#: Seconds between two writes of the status file, and between two lines where there is no terminal.
STATUS_SECONDS, LINE_SECONDS = 1.0, 15.0

STATUS_FILE = "status.json"
#: What it holds.
_STATUS_KEYS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("title", "state", "unit", "text", "host"), str),
    **dict.fromkeys(("done", "total", "per_second", "process", "started", "updated"), (int, float)),
}


class Progress:
    """Counts done work of a stage; a context manager.

    Args:
        title: what is done, "teacher latin" say.
        total: in units.
        unit: "steps", "images".
        directory: where `status.json` is kept, or None.
        quiet: show nothing (the ranks above 0).
    """

    def __init__(self, title: str, total: int, unit: str, directory: Path | None = None, quiet: bool = False):
        self._title, self._total, self._unit = title, total, unit
        self._directory = directory
        self._quiet = quiet
        self._done = self._done_at_start = 0
        self._text = ""
        # NOTE: durations by a clock that nobody sets: after one that was set back, a running stage showed no sign of life.
        self._started, self._begun = time.time(), time.monotonic()
        self._wrote_status = self._wrote_line = -math.inf
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> "Progress":
        console = Console(stderr=True)
        if console.is_terminal and not self._quiet:
            self._bar = build_bars(console)
            self._task = self._bar.add_task(self._title, total=self._total, amount="", text="")
            self._bar.start()
        if self._directory is not None:
            clear_temporaries(self._directory, STATUS_FILE)
        self._publish("running", force=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._publish("done" if error is None else "stopped" if isinstance(error, Preempted) else "failed", force=True)
        if self._bar is not None:
            self._bar.stop()

    def start_at(self, done: int) -> None:
        """Work that an earlier run had done: it counts as done but not into the rate."""
        self._done = self._done_at_start = done

    def update(self, done: int, text: str = "") -> None:
        self._done, self._text = done, text or self._text
        self._publish("running")

    def advance(self, count: int = 1) -> None:
        """Counts work that is done and kept. Raises: Preempted when a signal has asked to stop."""
        self.update(self._done + count)
        stop_if_asked()

    @property
    def units_per_second(self) -> float:
        return (self._done - self._done_at_start) / max(time.monotonic() - self._begun, 1e-9)

    def _publish(self, state: str, force: bool = False) -> None:
        now = time.monotonic()
        if self._quiet:
            return
        if self._bar is not None:
            amount = f"{self._done}/{self._total} {self._unit}"
            self._bar.update(self._task, completed=self._done, amount=amount, text=self._text)
        elif force or now - self._wrote_line > LINE_SECONDS:
            self._wrote_line = now
            rate = f"{self.units_per_second:.0f} {self._unit}/s" if self._done > self._done_at_start else ""
            print(
                f"{self._title}: {self._done}/{self._total} {self._unit} {rate} {self._text}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
        if self._directory is not None and (force or now - self._wrote_status > STATUS_SECONDS):
            self._wrote_status = now
            status = {
                "title": self._title,
                "state": state,
                "done": self._done,
                "total": self._total,
                "unit": self._unit,
                "per_second": self.units_per_second,
                "text": self._text,
                "process": os.getpid(),
                "host": socket.gethostname(),
                "started": self._started,
                "updated": time.time(),
            }
            write_atomically(self._directory / STATUS_FILE, status)


def build_console() -> Console:
    """For tables; where there is no terminal, lines are long: they are searched, not looked at."""
    console = Console(soft_wrap=True, highlight=False)
    return console if console.is_terminal else Console(soft_wrap=True, highlight=False, width=1000)


def build_bars(console: Console) -> rich.progress.Progress:
    """The look of all progress bars; tasks carry the fields `amount` ("20/400 steps") and `text`."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description:<22}"),
        rich.progress.BarColumn(bar_width=28),
        rich.progress.TextColumn("{task.fields[amount]:>20}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(compact=True),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=console,
    )


def load_status(directory: Path) -> dict | None:
    """The latest status of the stage in `directory`; None where it has not begun.

    A damaged one counts as none: it is only shown, and is written anew when the stage goes on.
    """
    try:
        status = parse_json((directory / STATUS_FILE).read_bytes(), STATUS_FILE)
    except (FileNotFoundError, DataError):
        return None
    is_whole = isinstance(status, dict) and all(isinstance(status.get(key), kind) for key, kind in _STATUS_KEYS.items())
    return status if is_whole else None
