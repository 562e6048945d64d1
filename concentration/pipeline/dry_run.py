"""What a run would do, and what it has given to SLURM: the graph, and the exact commands."""

import shlex
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from rich.table import Table

from concentration.errors import ConfigError
from concentration.pipeline.graph import RunConfig, build_graph, find_due, find_taxonomy
from concentration.pipeline.jobs import JOBS, Job
from concentration.pipeline.records import JobRecords, load_records
from concentration.pipeline.slurm import (
    SCRIPT_FILE,
    Batch,
    SlurmConfig,
    build_batches,
    build_command,
    build_script,
    find_active,
    ids_of,
)
from concentration.pipeline.slurm_queue import load_queue
from concentration.progress import build_console
from concentration.schema import write_override


def print_dry_run(config: RunConfig) -> None:
    """Prints the graph, what is done of it, and the commands that would be run; writes nothing.

    Raises: as `find_taxonomy` and `find_due`.
    """
    graph = build_graph(config, find_taxonomy(config))
    due = find_due(graph)
    if isinstance(config.launcher, SlurmConfig):
        active = _find_active(graph, due, load_records(config.workdir))
        _print_graph(graph, due, active)
        _print_slurm(config.workdir, graph, due, active, config.launcher)
    else:
        _print_graph(graph, due, {})
        print("\nCommands on this machine, each on a job's frozen config:\n")
        for job in graph:
            if job.name in due:
                print(shlex.join(job.command()))


def print_submitted(config: RunConfig, graph: Sequence[Job], submitted: Mapping[Batch, str]) -> None:
    """Prints a table of what was submitted, and how to look at it and end it."""
    console = build_console()
    if not submitted:
        console.print("all that is missing is in SLURM's queue already")
    else:
        position = {job.name: number for number, job in enumerate(graph)}
        table = Table(title="submitted to SLURM", title_justify="left")
        for column in ("id", "jobs", "after"):
            table.add_column(column)
        for batch, number in submitted.items():
            after = sorted({name for job in batch.jobs for name in job.after}, key=position.get)
            table.add_row(number, _list([job.name for job in batch.jobs]), _list(after))
        console.print(table)
        console.print(f"to end them: scancel {' '.join(submitted.values())}")
    console.print(f"to look at them: concentrate status {write_override('workdir', str(config.workdir))}")
    console.print("given again, the same command submits what is missing then")


def _print_graph(graph: Sequence[Job], due: Set[str], active: Mapping[str, str]) -> None:
    table = Table(title="graph", title_justify="left")
    for column in ("job", "state", "after", "what"):
        table.add_column(column)
    for job in graph:
        state = "done" if job.name not in due else f"in the queue: {active[job.name]}" if job.name in active else "due"
        table.add_row(job.name, state, _list(job.after), job.summary)
    build_console().print(table)


def _find_active(graph: Sequence[Job], due: Set[str], records: JobRecords) -> dict[str, str]:
    """The jobs in the queue. A run that was never submitted has none, which is known on a machine without SLURM too."""
    if not any(record.slurm_id for record in records.jobs.values()):
        return {}
    try:
        queue = load_queue(records.user)
    except ConfigError as error:
        raise ConfigError(f"{records.user}'s jobs were submitted from here, and may be on their way: {error}") from None
    return find_active(graph, due, records, queue)[0]


def _print_slurm(
    workdir: Path, graph: Sequence[Job], due: Set[str], active: Mapping[str, str], config: SlurmConfig
) -> None:
    batches = build_batches([job for job in graph if job.name in due - active.keys()], active)
    ids = dict(active)
    print("\nCommands; <NAME> stands for the id that SLURM gives to NAME:\n")
    for batch in batches:
        words = build_command(batch, config, ids, batches)
        print(" ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words))
        ids |= ids_of(batch, f"<{batch.name}>")
    print(f"\n{workdir / JOBS / SCRIPT_FILE}:\n\n{build_script(workdir, config)}", end="")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)})"
