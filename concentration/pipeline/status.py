"""`concentrate status`: what stands where in a working directory."""

import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from concentration.errors import ConfigError
from concentration.progress import STATUS_FILE, load_status
from concentration.schema import Config


class StatusConfig(Config):
    """Which working directory to look at."""

    workdir: Path


def status(config: StatusConfig) -> None:
    """Prints a line per stage that has begun.

    Raises:
        ConfigError: there is no such directory.
    """
    if not config.workdir.is_dir():
        raise ConfigError(f"workdir={config.workdir}: no such directory; `concentrate run` makes it")
    table = Table(title=str(config.workdir), title_justify="left")
    for column in ("stage", "state", "done", "rate", "left"):
        table.add_column(column)
    for directory in sorted({path.parent for path in config.workdir.rglob(STATUS_FILE)}, key=_age):
        table.add_row(str(directory.relative_to(config.workdir)), *describe_stage(directory))
    Console(soft_wrap=True).print(table)


def describe_stage(directory: Path) -> tuple[str, str, str, str]:
    """State, work done, rate and time left of the stage in `directory`."""
    latest = load_status(directory)
    assert latest is not None
    done = f"{latest['done']}/{latest['total']} {latest['unit']}"
    is_only_a_sum = not (directory / "config.json").exists()  # of several stages: `targets` of all verticals
    if (directory / "DONE.json").exists() or (is_only_a_sum and latest["state"] == "done"):
        return "done", done, "", ""
    if latest["state"] != "running" or not _is_alive(latest["process"]):
        return ("failed" if latest["state"] == "failed" else "stopped"), done, "", ""
    rate = latest["per_second"]
    left = (latest["total"] - latest["done"]) / rate if rate else float("inf")
    left_text = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else "-"
    return "running", done, f"{rate:.1f} {latest['unit']}/s", left_text


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age(directory: Path) -> float:
    return load_status(directory)["started"]
