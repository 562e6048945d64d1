"""`concentrate run`: the whole pipeline, skipping what is done."""

import shlex
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.pipeline.compare import COMPARED, GENERALIST
from concentration.pipeline.dry_run import print_dry_run, print_submitted
from concentration.pipeline.graph import (
    RunConfig,
    build_graph,
    build_jobs,
    build_prepare_job,
    find_due,
    find_needs,
    find_taxonomy,
)
from concentration.pipeline.jobs import Job
from concentration.pipeline.local import LocalLauncher
from concentration.pipeline.plan import print_run_plan
from concentration.pipeline.records import record_jobs
from concentration.pipeline.slurm import SlurmConfig, SlurmLauncher, refuse_beside_queue
from concentration.processes import count_cores
from concentration.schema import parse_json, write_override
from concentration.stages.folders import EVALUATIONS, REPORT, SHARDS
from concentration.stages.group_classes import check_groups
from concentration.stages.identities import SPECIALISTS
from concentration.stages.prepare_needs import check_needs
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.report import COMMAND_FILE
from concentration.stages.report_headline import find_unmeasured
from concentration.stages.run_directory import describe_lost
from concentration.stages.short_trainings import describe_short_trainings
from concentration.taxonomy import Taxonomy
from concentration.temporaries import clear_temporaries

__all__ = ["RunConfig", "run", "run_together"]


def run(config: RunConfig) -> None:
    """Runs all stages and prints the results; with `launcher=slurm` submits them; or only prints what would be done.

    Raises:
        ConfigError: with `plan`, nothing is known of the data yet; with SLURM, it refuses a job, or a stage was begun with
            another config; without SLURM, it has jobs of this directory.
        JobFailed: a job failed; says which and why.
        Preempted: a signal asked to stop.
    """
    if config.plan:
        print_run_plan(config)
    elif config.dry_run:
        print_dry_run(config)
    elif isinstance(config.launcher, SlurmConfig):
        _run_on_slurm(config, config.launcher)
    else:
        _run_here(config)


def _run_here(config: RunConfig) -> None:
    refuse_beside_queue(config.workdir)
    _record_command(config)
    num_new = run_together([config], has_report=True)
    if num_new == 1:  # the report
        print("everything was done already: nothing is to do but to draw the report anew")
    _print_result(config)


def run_together(configs: Sequence[RunConfig], has_report: bool) -> int:
    """Runs several students, which share a working directory, data, teachers and generalist, as one graph on this machine.

    has_report: whether to draw the report too, with the last student in front.

    Returns:
        The number of jobs whose results are new.

    Raises:
        ConfigError: there are no test images, or no validation images for a job that needs some; or there are too few classes.
        JobFailed, Preempted: as `run`.
    """
    workdir = configs[0].workdir
    launcher = LocalLauncher(configs[0].num_processes or count_cores())
    num_new = launcher.run([build_prepare_job(configs[0])])
    _, taxonomy, _ = load_prepared(workdir, DataOverrides())
    for config in configs:
        check_needs(workdir / SHARDS, find_needs(config))
        _check_groups(config, taxonomy)
    jobs: dict[str, Job] = {}
    for config in configs:
        record_jobs(workdir, build_graph(config, taxonomy))
        jobs |= {job.name: job for job in build_jobs(config, taxonomy) if has_report or job.verb != "report"}
    num_new += launcher.run(list(jobs.values()))
    _tell_lost(jobs.values())
    return num_new


def _tell_lost(jobs: Iterable[Job]) -> None:
    """Tells of finished networks whose files are gone: no job that is due needs them, but the user may count on them."""
    for job in jobs:
        if lost := describe_lost(job.directory):
            print(f"{job.name}: {job.directory}: {lost}", file=sys.stderr)


def _check_groups(config: RunConfig, taxonomy: Taxonomy) -> None:
    """Raises: ConfigError where there are too few classes to find the groups that `compare` asks for."""
    if config.compare is not None:
        check_groups(config.compare.groups, taxonomy.num_classes, "compare.groups")


def _run_on_slurm(config: RunConfig, launcher_config: SlurmConfig) -> None:
    taxonomy = find_taxonomy(config)
    graph = build_graph(config, taxonomy)
    due = find_due(graph)
    _check_groups(config, taxonomy)
    if "prepare" not in due:
        check_needs(config.workdir / SHARDS, find_needs(config))
    if not due:
        print("everything was done already: nothing is to do")
        _tell_lost(graph)
        _print_result(config)
        return
    launcher = SlurmLauncher(launcher_config, config.workdir)
    _record_command(config)
    submitted = launcher.submit(graph, due)
    print_submitted(config, graph, submitted)
    if launcher_config.wait:
        launcher.wait([job for job in graph if job.name in due])
        _print_result(config)


def _record_command(config: RunConfig) -> None:
    clear_temporaries(config.workdir, COMMAND_FILE)
    write_atomically(config.workdir / COMMAND_FILE, {"command": shlex.join(["concentrate", *sys.argv[1:]])})


def _print_result(config: RunConfig) -> None:
    console = Console(soft_wrap=True)
    names = (GENERALIST, config.name, *(COMPARED if config.compare else ()), SPECIALISTS)
    results = {name: _load_result(config, name) for name in names}
    measured = results[config.name]
    table = Table(title=f"{config.workdir}: {measured['num_samples']:,} test images", title_justify="left")
    for column in ("", "mpvap", "top-1", "parameters", "networks"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        top1 = "-" if result["top1"] is None else f"{100 * result['top1']:.1f} %"
        total = result["num_parameters"]["total"]
        parameters = "-" if total is None else f"{total:,}"
        table.add_row(name, f"{100 * result['mpvap']:.1f} %", top1, parameters, str(result["num_networks"]))
    console.print(table)
    if left_out := find_unmeasured(measured):
        shown = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
        num_verticals = len(left_out) + len(measured["pvap"])
        print(f"mpvap leaves out the verticals without a test image: {shown} ({len(left_out)} of {num_verticals})")
    if short := describe_short_trainings(config.workdir, (GENERALIST, config.name)):
        print(short)
    console.print(f"report: {(config.workdir / REPORT / 'index.html').resolve()}")
    where = f"{write_override('name', config.name)} {write_override('workdir', str(config.workdir))}"
    next_verb = f"demo {where}" if config.export else f"export {where}"
    console.print(f"next: concentrate {next_verb}")


def _load_result(config: RunConfig, name: str) -> dict:
    path = config.workdir / EVALUATIONS / f"{name}.json"
    if not path.exists():
        again = f"concentrate evaluate {write_override('name', name)} {write_override('workdir', str(config.workdir))}"
        raise DataError(f"{path}: no such file, though its evaluation is finished; run `{again}`")
    return parse_json(path.read_bytes(), str(path))
