"""The graph of a whole run: which jobs there are, and which waits for which."""

from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from concentration.data.sources import DataConfig
from concentration.errors import ConfigError
from concentration.networks.bases import BaseConfig
from concentration.networks.external import ExternalConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.top_layers import TopConfig
from concentration.pipeline.jobs import Job
from concentration.schema import Config, suggest
from concentration.stages.evaluate import EVALUATIONS, SPECIALISTS, EvaluateConfig
from concentration.stages.prepare import SHARDS, PrepareConfig
from concentration.stages.report import REPORT, ReportConfig
from concentration.stages.run_directory import StageConfig
from concentration.stages.student import STUDENTS, HardTargetsConfig, Outside, StudentConfig, TargetsChoice
from concentration.stages.targets import TARGETS, TargetsConfig
from concentration.stages.teacher import TEACHERS, ExternalTeacherConfig, TeacherConfig
from concentration.taxonomy import Taxonomy
from concentration.training.fit import TrainerConfig
from concentration.training.loggers import LoggerConfig
from concentration.training.optimizers import OptimizerConfig

GENERALIST = "generalist"


class NetworkParts(Config):
    """A network and how it is trained, for the networks of a run beside the student."""

    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig


class TeacherParts(NetworkParts):
    """`external`: by vertical, a model of the user's own; the other verticals' teachers are trained."""

    external: dict[str, ExternalConfig] = pydantic.Field(default_factory=dict)


class RunConfig(StageConfig):
    """The whole pipeline. The keys at the top are the student's; `teacher` and `generalist` have their own.

    name: of the student; several students may share teachers and targets.
    num_processes: jobs at a time on this machine; None is one per core.
    plan: prints what every stage would read, write and take, and runs none.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {"launcher", "num_processes", "plan"}

    seed: int = 0
    name: str = "student"
    data: DataConfig
    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    targets: TargetsChoice
    tail: Literal["zero", "spread"] = "zero"
    outside: Outside = "zero"
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    teacher: TeacherParts
    generalist: NetworkParts
    logger: LoggerConfig = LoggerConfig()
    samples_per_shard: pydantic.PositiveInt = 4000
    launcher: Literal["local"] = "local"
    num_processes: pydantic.PositiveInt | None = None
    plan: bool = False

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        if self.name in (GENERALIST, SPECIALISTS):
            raise ValueError(f"name={self.name} is taken by the run's own {self.name}; give the student another name")
        return self


def build_prepare_job(config: RunConfig) -> Job:
    """The first job: only after it are the verticals known."""
    stage = PrepareConfig(
        **_shared(config),
        data=config.data,
        samples_per_shard=config.samples_per_shard,
        num_processes=config.num_processes,
    )
    return Job("prepare", "prepare", stage, config.workdir / SHARDS, (), f"writing shards from data={config.data.kind}")


def build_jobs(config: RunConfig, taxonomy: Taxonomy) -> list[Job]:
    """All jobs after `prepare`, longest first among those that may run together.

    Raises:
        ConfigError: a vertical with a teacher of the user's own is not in the taxonomy.
    """
    for vertical in config.teacher.external:
        if vertical not in taxonomy.verticals:
            raise ConfigError(
                f"teacher.external.{vertical}: no vertical of this name{suggest(vertical, taxonomy.verticals)}"
            )
    teachers = [_teacher_job(config, v, n) for v, n in zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True)]
    teachers.sort(key=lambda job: -taxonomy.vertical_sizes[taxonomy.verticals.index(job.config.vertical)])
    targets = (
        [_targets_job(config, vertical) for vertical in taxonomy.verticals] if config.targets.kind == "soft" else []
    )
    generalist = _student_job(config, GENERALIST, config.generalist, HardTargetsConfig(), after=())
    after = tuple(job.name for job in {"labels": [], "soft": targets, "online": teachers}[config.targets.kind])
    parts = NetworkParts(**{name: getattr(config, name) for name in NetworkParts.model_fields})
    student = _student_job(config, config.name, parts, config.targets, after, tail=config.tail, outside=config.outside)
    evaluations = [
        _evaluate_job(config, GENERALIST, (generalist.name,)),
        _evaluate_job(config, SPECIALISTS, tuple(job.name for job in teachers)),
        _evaluate_job(config, config.name, (student.name,)),
    ]
    report = Job(
        "report",
        "report",
        ReportConfig(**_shared(config), name=config.name),
        config.workdir / REPORT,
        tuple(job.name for job in evaluations),
        "drawing the report",
    )
    return [generalist, *teachers, *targets, student, *evaluations, report]


def _teacher_job(config: RunConfig, vertical: str, num_classes: int) -> Job:
    directory = config.workdir / TEACHERS / vertical
    if vertical in config.teacher.external:
        given = ExternalTeacherConfig(**_shared(config), vertical=vertical, external=config.teacher.external[vertical])
        return Job(
            f"teacher {vertical}", "teacher", given, directory, (), f"taking over a model for {num_classes} classes"
        )
    stage = TeacherConfig(
        **_shared(config), **_parts(config.teacher), seed=config.seed, logger=config.logger, vertical=vertical
    )
    summary = f"training the specialist of {num_classes} classes"
    return Job(
        f"teacher {vertical}", "teacher", stage, directory, (), summary, _count_processes(config.teacher.trainer)
    )


def _targets_job(config: RunConfig, vertical: str) -> Job:
    accelerator = config.teacher.trainer.accelerator
    stage = TargetsConfig(**_shared(config), vertical=vertical, targets=config.targets, accelerator=accelerator)
    directory = config.workdir / TARGETS / config.targets.name / vertical
    summary = f"storing the teacher's top {config.targets.top_k} classes for every image"
    return Job(f"targets {vertical}", "targets", stage, directory, (f"teacher {vertical}",), summary)


def _student_job(
    config: RunConfig, name: str, parts: NetworkParts, targets: TargetsChoice, after: tuple[str, ...], **options
) -> Job:
    stage = StudentConfig(
        **_shared(config),
        **_parts(parts),
        seed=config.seed,
        logger=config.logger,
        name=name,
        targets=targets,
        **options,
    )
    learns = {"labels": "the labels", "soft": "the teachers' soft targets", "online": "what the teachers say meanwhile"}
    summary = f"training one network over all verticals on {learns[targets.kind]}"
    directory = config.workdir / STUDENTS / name
    return Job(f"student {name}", "student", stage, directory, after, summary, _count_processes(parts.trainer))


def _evaluate_job(config: RunConfig, name: str, after: tuple[str, ...]) -> Job:
    stage = EvaluateConfig(**_shared(config), name=name, accelerator=config.trainer.accelerator)
    return Job(
        f"evaluate {name}",
        "evaluate",
        stage,
        config.workdir / EVALUATIONS / name,
        after,
        "measuring on the test images",
    )


def _shared(config: RunConfig) -> dict[str, Path | bool | str]:
    return {"workdir": config.workdir, "overwrite": "changed" if config.overwrite else False}


def _parts(parts: NetworkParts) -> dict[str, Config]:
    return {name: getattr(parts, name) for name in NetworkParts.model_fields}


def _count_processes(trainer: TrainerConfig) -> int:
    return trainer.num_processes
