"""`concentrate status`: what stands where in a working directory."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from concentration.errors import ConfigError, DataError
from concentration.pipeline.jobs import JOBS
from concentration.pipeline.records import load_records
from concentration.pipeline.slurm_queue import load_queue
from concentration.pipeline.states import StageState, describe_directory, find_states
from concentration.progress import STATUS_FILE, build_console, load_status
from concentration.schema import Config
from concentration.stages.earlier_networks import is_of_earlier, list_verticals
from concentration.stages.replaced import REPLACED_FOLDER


class StatusConfig(Config):
    """Which working directory to look at."""

    workdir: Path


def status(config: StatusConfig) -> None:
    """Prints a line per stage: those of `concentrate run`, and those that were begun without it.

    Raises:
        ConfigError: there is no such directory.
        DataError: the list of the jobs is damaged. What else is, is told in the table.
    """
    workdir = config.workdir
    if not workdir.is_dir():
        raise ConfigError(f"workdir={workdir}: no such directory; `concentrate run` makes it")
    records = load_records(workdir)
    queue, note = {}, ""
    if any(record.slurm_id for record in records.jobs.values()):
        try:
            queue = load_queue(records.user)
        except ConfigError as error:
            note = (
                f"without SLURM's queue, so that waiting and running jobs may be shown as failed or cancelled: {error}"
            )
    by_directory: dict[Path, StageState] = {}
    begun = {path.parent for path in workdir.rglob(STATUS_FILE) if path.parent.name != REPLACED_FOLDER}
    states = find_states(workdir, records, queue)
    of_run = {workdir / record.directory: states[name] for name, record in records.jobs.items()}
    for directory in [*sorted(begun, key=_age), *of_run]:
        by_directory[directory] = of_run.get(directory) or describe_directory(directory)
    verticals: list[str] = []
    with contextlib.suppress(DataError):  # a damaged record of the shards is told in their line
        verticals = list_verticals(workdir)
    table = Table(title=str(workdir), title_justify="left")
    for column in ("stage", "state", "done", "rate", "left", "why"):
        table.add_column(column)
    for directory, state in by_directory.items():
        name = str(directory.relative_to(workdir))
        shown, why = (
            ("done", f"the latest command was refused: {state.why}") if state.is_refused else (state.state, state.why)
        )
        if state.state == "done":
            why = _describe_earlier(workdir, directory, verticals) or why
        table.add_row(name, shown, state.amount, state.rate, state.left, escape(why))
    console = build_console()
    console.print(table)
    if any(state.state == "failed" for state in by_directory.values()):
        console.print(f"logs of the jobs: {workdir / JOBS}")
    if note:
        console.print(note)


def _describe_earlier(workdir: Path, directory: Path, verticals: Sequence[str]) -> str:
    """That a finished stage is of a network which was trained anew since, or why that cannot be told; else empty."""
    try:
        is_earlier = is_of_earlier(workdir, directory, verticals)
    except DataError as error:
        return str(error)
    told = "of an earlier network, which was trained anew since; overwrite=changed makes it of the present one"
    return told if is_earlier else ""


def _age(directory: Path) -> float:
    latest = load_status(directory)
    return 0.0 if latest is None else latest["started"]
