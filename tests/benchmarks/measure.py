"""What the benchmarks share: timing both sides of a comparison in turns, and a table that is printed and kept as JSON.

Machines are shared, and slow down for seconds: so sides are timed in turns, and the best of each counts.
"""

import datetime
import json
import os
import platform
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

#: Relative to the root of the repository, where `make bench` runs.
RESULTS = Path("runs/bench")
LIBRARIES = ("numpy", "pillow", "torch", "webdataset")


@dataclass(frozen=True)
class Comparison:
    """One measure of ours and of a reference, from one run; what the unit says may be better high or low."""

    what: str
    unit: str
    ours: float
    reference: float
    reference_is: str

    @property
    def ratio(self) -> float:
        return self.ours / self.reference


def time_in_turns(sides: Mapping[str, Callable[[], object]], num_turns: int = 3) -> dict[str, float]:
    """The least seconds that each side took."""
    return take_best({name: lambda side=side: time_once(side) for name, side in sides.items()}, num_turns)


def take_best(sides: Mapping[str, Callable[[], float]], num_turns: int = 3) -> dict[str, float]:
    """The least number that each side returned, all sides taking turns."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(num_turns):
        for name, side in sides.items():
            best[name] = min(best[name], side())
    return best


def time_once(side: Callable[[], object]) -> float:
    started = time.perf_counter()
    side()
    return time.perf_counter() - started


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of the processor: what others do at the same time is not counted, but what they take of caches and memory is felt."""
    started = time.process_time()
    call()
    return time.process_time() - started


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """The memory that this process has, or had at most.

    NOTE: not `ru_maxrss`, in which a process begins with what its parent had.
    """
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024


def measure_mb(call: Callable[[], object]) -> float:
    """The most memory that the call holds at a time, without what it was given."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def publish(name: str, title: str, comparisons: Sequence[Comparison]) -> None:
    """Prints the table and writes `runs/bench/NAME.json`."""
    table = Table(title=title, title_justify="left")
    for column in ("measure", "unit", "ours", "reference", "ours / reference", "the reference is"):
        table.add_column(column, justify="right" if column.startswith(("ours", "reference")) else "left")
    for c in comparisons:
        table.add_row(c.what, c.unit, _short(c.ours), _short(c.reference), f"{c.ratio:.3g}", c.reference_is)
    Console(width=150).print(table)
    content = {
        "name": name,
        "commit": _git("rev-parse", "HEAD"),
        "has_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _describe_machine(),
        "comparisons": [{**asdict(c), "ratio": c.ratio} for c in comparisons],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _git(*arguments: str) -> str:
    """Nothing where there is no repository, as on a machine to which only the files were copied."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def _describe_machine() -> dict:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{library: metadata.version(library) for library in LIBRARIES},
    }
