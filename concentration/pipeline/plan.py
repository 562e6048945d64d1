"""`concentrate run plan=true`: what every stage would process and write, and how long it would take; nothing is run."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from concentration.networks.cost import build_without_weights
from concentration.pipeline.graph import RunConfig, build_jobs, build_prepare_job, find_due
from concentration.pipeline.jobs import Job
from concentration.pipeline.planned_data import NUM_PROBED, PlannedData, look_at_data
from concentration.pipeline.probe import NUM_TIMED, NUM_WARM_UP, Speed, find_obstacle, measure_speed
from concentration.processes import count_cores
from concentration.progress import build_console
from concentration.stages.evaluate import EvaluateConfig
from concentration.stages.expert import ExpertConfig
from concentration.stages.expert import describe_step as describe_expert_step
from concentration.stages.identities import SPECIALISTS
from concentration.stages.prepare import PrepareConfig
from concentration.stages.report import ReportConfig
from concentration.stages.student import StudentConfig
from concentration.stages.student import describe_step as describe_student_step
from concentration.stages.targets import TargetsConfig
from concentration.stages.teacher import TeacherConfig
from concentration.stages.teacher import describe_step as describe_teacher_step
from concentration.stages.train_network import NetworkStageConfig, describe_network
from concentration.targets import count_target_bytes
from concentration.training.configs import count_steps
from concentration.training.memory import plan_memory

#: How many copies of the weights an optimizer keeps as its state.
_STATE_COPIES = {"adagrad": 1, "adamw": 2, "sgd": 1}


@dataclass(frozen=True)
class StagePlan:
    """What one job would process, write and take; None where that is not known or not estimated.

    Attributes:
        num_images: the images that it reads; for a training, in all passes together.
        stored_bytes: bytes of its results.
        passing_bytes: bytes of the checkpoints that it keeps besides while it runs.
        seconds: the time it takes when nothing else runs.
        note: why there are no seconds.
        is_due: whether it is still to be done, or to be done anew.
    """

    job: Job
    num_images: int | None = None
    stored_bytes: int | None = None
    passing_bytes: int | None = None
    seconds: float | None = None
    note: str = ""
    is_due: bool = True


def print_run_plan(config: RunConfig) -> None:
    """Measures for some seconds, and prints a line a stage.

    Raises:
        ConfigError: nothing is known of the data yet; a stage was begun with another config, and `overwrite` is false; or as the
            stages.
    """
    start = time.perf_counter()
    data = look_at_data(config)
    jobs = [build_prepare_job(config), *build_jobs(config, data.taxonomy)]
    due = find_due(jobs)
    plans = [replace(plan, is_due=plan.job.name in due) for plan in _Planner(config, data).plan(jobs)]
    console = build_console()
    console.print(_tabulate(config, plans))
    num_processes = config.num_processes or count_cores()
    for line in _describe(config, data, plans, num_processes, time.perf_counter() - start):
        console.print(line)


class _Planner:
    """Plans jobs in their order: a later one may need the speed of an earlier one's network."""

    def __init__(self, config: RunConfig, data: PlannedData):
        self._config = config
        self._data = data
        self._speeds: dict[str, Speed] = {}  # by the name of the job that trains
        self._obstacles: dict[str, str | None] = {}  # by student's job, and of all teachers

    def plan(self, jobs: Sequence[Job]) -> list[StagePlan]:
        return [self._plan_job(job) for job in jobs]

    def _plan_job(self, job: Job) -> StagePlan:
        config = job.config
        if isinstance(config, PrepareConfig):
            return self._plan_prepare(job)
        if isinstance(config, NetworkStageConfig):
            return self._plan_training(job, config)
        if isinstance(config, TargetsConfig):
            return self._plan_targets(job, config)
        if isinstance(config, EvaluateConfig):
            return self._plan_evaluation(job, config)
        return StagePlan(job, note="" if isinstance(config, ReportConfig) else "not planned")

    def _plan_prepare(self, job: Job) -> StagePlan:
        data, num_images = self._data, sum(self._data.num_samples.values())
        num_processes = self._config.num_processes or count_cores()
        seconds = None if data.write_seconds is None else num_images * data.write_seconds / num_processes
        return StagePlan(job, num_images, data.stored_bytes, seconds=seconds)

    def _plan_training(self, job: Job, config: NetworkStageConfig) -> StagePlan:
        data, trainer = self._data, config.trainer
        if isinstance(config, TeacherConfig):
            taxonomy = data.taxonomy.restrict(config.vertical)
            of_vertical = data.num_fine if config.coarse_labels == "skip" else data.num_routed
            num_samples, shape = of_vertical[config.vertical], describe_teacher_step(config, taxonomy)
            key = "teacher"  # the first is that of the largest vertical, and stands for all
        elif isinstance(config, ExpertConfig):
            taxonomy, num_experts = data.taxonomy, self._config.compare.features.num_groups
            num_samples, shape = data.num_samples["train"] // num_experts, describe_expert_step(config, taxonomy)
            key = "expert"
        else:
            assert isinstance(config, StudentConfig)
            taxonomy, num_samples = data.taxonomy, data.num_samples["train"]
            if config.coarse_labels == "skip":
                num_samples = data.num_fine[None]
            shape, key = describe_student_step(config, taxonomy), f"student {config.name}"
        batch_size = min(trainer.batch_size, num_samples)
        trainer = trainer.model_copy(update={"batch_size": batch_size})
        num_steps = count_steps(trainer, -(-num_samples // batch_size))
        network = describe_network(config, taxonomy, data.image_size)
        weight_bytes = sum(t.nbytes for t in build_without_weights(network).state_dict().values())
        copies = 1 + _STATE_COPIES[config.optimizer.kind] + trainer.has_average
        num_kept = trainer.keep_checkpoints + trainer.keep_best
        written = StagePlan(job, num_steps * batch_size, weight_bytes, num_kept * copies * weight_bytes)
        if key not in self._obstacles:
            memory = plan_memory(network, config.optimizer, trainer, shape)
            self._obstacles[key] = find_obstacle(trainer, memory)
        if obstacle := self._obstacles[key]:
            return replace(written, note=obstacle)
        world_size = trainer.num_processes
        local_batch = -(-batch_size // (world_size * trainer.accumulate))
        speed = self._speeds[job.name] = measure_speed(network, config.optimizer, trainer, shape, local_batch)
        num_read = local_batch * trainer.accumulate
        read_seconds = data.read_seconds or 0
        first_seconds = num_samples * read_seconds / max(1, trainer.num_workers) if trainer.resident else 0
        step_seconds = _overlap(
            speed.step_seconds, 0 if trainer.resident else num_read * read_seconds, trainer.num_workers
        )
        if isinstance(config, StudentConfig) and config.targets.kind == "online":
            step_seconds += num_read * self._mean_teacher_seconds()
        num_val = data.num_samples.get("val", 0) * (num_samples / data.num_samples["train"])
        num_passes = math.ceil(num_steps * batch_size / num_samples / trainer.validate_every_epochs)
        seconds = (
            first_seconds
            + num_steps * step_seconds
            + num_passes * num_val * self._ask_seconds(speed.answer_seconds, trainer.num_workers)
        )
        return replace(written, seconds=seconds)

    def _plan_targets(self, job: Job, config: TargetsConfig) -> StagePlan:
        vertical, targets = config.vertical, config.targets
        num_rows = self._data.num_routed[vertical]
        size = self._data.taxonomy.vertical_sizes[self._data.taxonomy.vertical_number(vertical)]
        stored = count_target_bytes(targets.codec, size, targets.top_k, num_rows, targets.views)
        plan = StagePlan(job, num_rows * max(1, targets.views), stored)
        speed = self._speeds.get(f"teacher {vertical}")
        if speed is None:
            return replace(plan, note="not measured")
        return replace(plan, seconds=plan.num_images * self._ask_seconds(speed.answer_seconds, config.num_workers))

    def _plan_evaluation(self, job: Job, config: EvaluateConfig) -> StagePlan:
        num_images = self._data.num_samples.get("test", 0)
        asked = (
            [f"teacher {v}" for v in self._data.taxonomy.verticals]
            if config.name == SPECIALISTS
            else [f"student {config.name}"]
        )
        plan = StagePlan(job, num_images)
        if not self._speeds.keys() >= set(asked):
            return replace(plan, note="not measured")
        answering = sum(self._speeds[name].answer_seconds for name in asked)
        return replace(plan, seconds=num_images * self._ask_seconds(answering, config.num_workers))

    def _ask_seconds(self, answer_seconds: float, num_workers: int) -> float:
        """Seconds to read an image and ask a network about it."""
        return _overlap(answer_seconds, self._data.read_seconds or 0, num_workers)

    def _mean_teacher_seconds(self) -> float:
        speeds = [speed.answer_seconds for name, speed in self._speeds.items() if name.startswith("teacher ")]
        return sum(speeds) / max(1, len(speeds))


def _overlap(work_seconds: float, read_seconds: float, num_workers: int) -> float:
    """Seconds to read and to work: their sum, or with workers that read ahead the slower of the two."""
    return work_seconds + read_seconds if num_workers == 0 else max(work_seconds, read_seconds / num_workers)


def schedule(plans: Sequence[StagePlan], num_processes: int) -> float:
    """Seconds until the last job ends, if `num_processes` run at a time and each after those that it waits for."""
    waiting, ends, running, now = list(plans), {}, [], 0.0
    names = {plan.job.name for plan in plans}
    while waiting or running:
        for plan in list(waiting):
            is_due = all(ends.get(name, now + 1) <= now for name in plan.job.after if name in names)
            if is_due and len(running) < num_processes:
                waiting.remove(plan)
                running.append((now + (plan.seconds or 0), plan.job.name))
        running.sort()
        now, name = running.pop(0)
        ends[name] = now
    return now


def _tabulate(config: RunConfig, plans: Sequence[StagePlan]) -> Table:
    table = Table(title=f"{config.workdir}: a plan; times are estimates", title_justify="left", show_footer=True)
    left = [plan for plan in plans if plan.is_due]
    stored = sum(plan.stored_bytes or 0 for plan in plans)
    passing = max((plan.passing_bytes or 0 for plan in left), default=0)
    seconds = sum(plan.seconds or 0 for plan in left)
    table.add_column("stage", "all; time of what is left", overflow="fold")
    table.add_column("images", justify="right", no_wrap=True)
    table.add_column("MiB kept", f"{stored / 2**20:,.1f}", justify="right", no_wrap=True)
    table.add_column("MiB passing", f"<= {passing / 2**20:,.1f}", justify="right", no_wrap=True)
    table.add_column("h:mm:ss", _format_hours(seconds), justify="right", no_wrap=True)
    table.add_column("", min_width=12)
    for plan in plans:
        table.add_row(
            plan.job.name,
            "-" if plan.num_images is None else f"{plan.num_images:,}",
            "-" if plan.stored_bytes is None else f"{plan.stored_bytes / 2**20:,.1f}",
            "-" if plan.passing_bytes is None else f"{plan.passing_bytes / 2**20:,.1f}",
            "-" if plan.seconds is None else _format_hours(plan.seconds),
            plan.note if plan.is_due else "done",
        )
    return table


def _format_hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _describe(
    config: RunConfig, data: PlannedData, plans: Sequence[StagePlan], num_processes: int, took_seconds: float
) -> list[str]:
    lines = []
    left = [plan for plan in plans if plan.is_due]
    is_partial = any(plan.note for plan in left)
    lines.append(
        f"{'at least ' if is_partial else ''}{_format_hours(schedule(left, num_processes))} with {num_processes} jobs at a time"
        + (", without the stages that have a reason in the last column" if is_partial else "")
    )
    lines.append(
        f"measured on this machine in {took_seconds:.0f} s: {NUM_TIMED} steps after {NUM_WARM_UP} of every network on random "
        "images at its own batch, alone"
    )
    if data.read_seconds is None:
        lines.append("not measured: reading, since the shards are remote")
    else:
        lines.append(f"  and {NUM_PROBED} images: {1 / data.read_seconds:,.0f} decoded a second by a process")
    if any(job.job.resources.num_processes > 1 for job in plans):
        lines.append("  several processes are taken to be as fast as one with its share of the batch")
    lines.append("passing are the checkpoints of a training, which are removed at its end")
    lines.append(
        "not in it: starting processes, checkpoints, metrics, the report, and what jobs side by side take from each other"
    )
    return lines
