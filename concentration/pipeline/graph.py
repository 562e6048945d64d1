"""The graph of a whole run: which jobs there are, and which waits for which."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import pydantic

from concentration.data.sources import DataConfig, build_source
from concentration.data.sources.webdataset_shards import ShardsConfig, load_shards_taxonomy
from concentration.data.views import Share
from concentration.errors import ConfigError
from concentration.networks.bases import BaseConfig
from concentration.networks.external import ExternalConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.student import LossKind
from concentration.networks.top_layers import TopConfig
from concentration.pipeline.compare import COMPARED, GENERALIST, CompareConfig, build_compare_jobs
from concentration.pipeline.jobs import DONE_FILE, Job, Resources
from concentration.pipeline.local import LocalConfig
from concentration.pipeline.parts import (
    NetworkParts,
    TrainedRun,
    build_evaluate_job,
    build_student_job,
    get_asking,
    get_parts,
    get_resources,
    get_shared,
)
from concentration.pipeline.slurm import SlurmConfig
from concentration.schema import FolderName, suggest
from concentration.serving.export_folder import EXPORTS
from concentration.stages.export import ExportConfig
from concentration.stages.folders import REPORT, SHARDS, TARGETS, TEACHERS
from concentration.stages.identities import SPECIALISTS
from concentration.stages.prepare import PrepareConfig
from concentration.stages.prepare_needs import Need
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.report import ReportConfig
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.student import HardTargetsConfig, LabelShare, Outside, TargetsChoice
from concentration.stages.targets import TargetsConfig
from concentration.stages.teacher import ExternalTeacherConfig, TeacherConfig
from concentration.stages.teacher_gate import GateConfig
from concentration.stages.train_network import LabelsConfig
from concentration.taxonomy import Taxonomy
from concentration.training.configs import TrainerConfig
from concentration.training.optimizers import OptimizerConfig


class TeacherParts(NetworkParts):
    """How teachers are trained, and which of them are not.

    from_generalist: every teacher waits for the run's generalist, and starts from its base network instead of from random
        weights, as the "specialists" of Hinton et al. (2015, section 5.3) do.
    external: by vertical, a model of the user's own to take over; the other verticals' teachers are trained.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"from_generalist"})

    from_generalist: bool = False
    external: dict[str, ExternalConfig] = pydantic.Field(default_factory=dict)


class RunConfig(TrainedRun, LabelsConfig):
    """The whole pipeline. The keys at the top are the student's; `teacher` and `generalist` have their own.

    coarse_labels: `skip` trains the generalist, the teachers and a student of labels without the images that have no leaf among
        their labels, as those verbs do; a student of teachers sees all images.
    name: the student's name; several students may share teachers and targets.
    data: where images and taxonomy come from.
    targets: what the student learns from: labels, stored answers of teachers, or answers in every step.
    teacher: all teachers, and how they are trained.
    generalist: the network that the student and the teachers are compared with, and how it is trained.
    gate: what teachers must be before targets are made; with `stop`, targets wait for the generalist to compare with.
    compare: other systems to train on the same data and evaluate beside the student; `experiment=compare` has them.
    launcher: what runs the jobs.
    num_processes: the processes of `prepare`, and the jobs at a time on this machine; None means one per core.
    export: also export the student.
    plan: print what every stage would read, write and take, and run none.
    dry_run: print the graph and the commands, and run none.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {
        "launcher", "num_processes", "plan", "dry_run"
    }  # fmt: skip
    later_fields: ClassVar[frozenset[str]] = LabelsConfig.later_fields | {"label_share"}

    name: FolderName = "student"
    data: DataConfig
    loss: LossKind = "sigmoid"
    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    targets: TargetsChoice
    label_share: LabelShare = 0.0
    tail: Literal["zero", "spread"] = "zero"
    outside: Outside = "zero"
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    teacher: TeacherParts
    generalist: NetworkParts
    gate: GateConfig = GateConfig()
    compare: CompareConfig | None = None
    samples_per_shard: pydantic.PositiveInt = 4000
    max_skipped_share: Share = 0.001
    launcher: Annotated[LocalConfig | SlurmConfig, pydantic.Field(discriminator="kind")] = LocalConfig()
    num_processes: pydantic.PositiveInt | None = None
    export: bool = False
    plan: bool = False
    dry_run: bool = False

    @pydantic.model_validator(mode="after")
    def _check_plan(self):
        if self.plan and self.dry_run:
            raise ValueError("plan=true with dry_run=true: each prints something else; give one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        taken = {GENERALIST, SPECIALISTS, *(COMPARED if self.compare is not None else ())}
        if self.name in taken:
            raise ValueError(f"name={self.name} is taken by the run's own {self.name}; give the student another name")
        return self

    @pydantic.model_validator(mode="after")
    def _check_start_of_teachers(self):
        bases = [parts.base.starting_from(GENERALIST) for parts in (self.teacher, self.generalist)]
        if self.teacher.from_generalist and bases[0] != bases[1]:
            raise ValueError(
                "teacher.from_generalist=true: teacher.base is not generalist.base, whose weights it would take; give both the "
                "same, or set it to false"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_coarse_labels(self):
        if self.coarse_labels == "skip" and self.compare is not None:
            raise ValueError(
                "coarse_labels=skip with compare: the systems compared use all labels; set one of them back"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_gate(self):
        if self.gate.generalist != GENERALIST:
            raise ValueError(
                f"gate.generalist={self.gate.generalist}: a run compares teachers with its own {GENERALIST}; leave it out"
            )
        return self


def build_prepare_job(config: RunConfig, needs: Sequence[Need] = ()) -> Job:
    """The first job. Which others there are is known only after it, as they depend on the verticals."""
    stage = PrepareConfig(
        **get_shared(config),
        data=config.data,
        samples_per_shard=config.samples_per_shard,
        max_skipped_share=config.max_skipped_share,
        needs=tuple(needs),
        num_processes=config.num_processes,
    )
    return Job("prepare", "prepare", stage, config.workdir / SHARDS, (), f"writing shards from data={config.data.kind}")


def find_needs(config: RunConfig) -> list[Need]:
    """The images that some job needs, perhaps hours later."""
    needs = [Need(split="test", why="all networks are measured with them")]
    if config.compare is not None:
        needs.append(Need(split=config.compare.groups.split, why="compare.groups finds its groups with them"))
    if config.trainer.keep_best or config.generalist.trainer.keep_best:
        needs.append(Need(split="val", why="trainer.keep_best=true chooses with them"))
    if config.teacher.trainer.keep_best:
        needs.append(Need(split="val", why="teacher.trainer.keep_best=true chooses with them", of_each_vertical=True))
    return needs


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
    teachers = [_teacher_job(config, taxonomy, number) for number in range(len(taxonomy.verticals))]
    teachers.sort(key=lambda job: -taxonomy.vertical_sizes[job.task])
    is_soft = config.targets.kind == "soft"
    targets = [_targets_job(config, v, number) for number, v in enumerate(taxonomy.verticals)] if is_soft else []
    coarse_labels = config.coarse_labels
    generalist = build_student_job(
        config, GENERALIST, config.generalist, HardTargetsConfig(), after=(), coarse_labels=coarse_labels
    )
    after = tuple(job.name for job in {"labels": [], "soft": targets, "online": teachers}[config.targets.kind])
    parts = NetworkParts(**{name: getattr(config, name) for name in NetworkParts.model_fields})
    student = build_student_job(
        config,
        config.name,
        parts,
        config.targets,
        after,
        label_share=config.label_share,
        tail=config.tail,
        outside=config.outside,
        coarse_labels=coarse_labels if config.targets.kind == "labels" else "use",
    )
    evaluations = [
        build_evaluate_job(config, GENERALIST, config.trainer, (generalist.name,)),
        build_evaluate_job(config, SPECIALISTS, config.trainer, tuple(job.name for job in teachers)),
        build_evaluate_job(config, config.name, config.trainer, (student.name,)),
    ]
    exports = [_export_job(config)] if config.export else []
    others = [] if config.compare is None else build_compare_jobs(config, config.compare)
    report = Job(
        f"report {config.name}",  # each student of a folder has a job of its own in a queue, but all draw the same page
        "report",
        ReportConfig(**get_shared(config), name=config.name),
        config.workdir / REPORT,
        tuple(job.name for job in [*evaluations, *others] if job.verb == "evaluate"),
        "drawing the report",
        proof="index.html",
    )
    return [generalist, *teachers, *targets, student, *evaluations, *others, *exports, report]


def build_graph(config: RunConfig, taxonomy: Taxonomy) -> list[Job]:
    """`prepare`, which checks that what the others need is there, and all jobs after it. Raises: as `build_jobs`."""
    prepare = build_prepare_job(config, find_needs(config))
    jobs = build_jobs(config, taxonomy)
    return [prepare, *(replace(job, after=job.after or (prepare.name,)) for job in jobs)]


def find_taxonomy(config: RunConfig) -> Taxonomy:
    """The taxonomy of the prepared data; before it is prepared that of its source, which has the same verticals.

    Raises:
        ConfigError: other data is prepared here, and `overwrite` is false.
        DataError: the source is malformed.
    """
    if RunDirectory(config.workdir / SHARDS).is_finished_with(build_prepare_job(config).config):
        return load_prepared(config.workdir, DataOverrides())[1]
    if isinstance(config.data, ShardsConfig):
        return load_shards_taxonomy(config.data)
    return build_source(config.data).build_taxonomy()


def find_due(jobs: Sequence[Job]) -> set[str]:
    """The names of the jobs that are still to be done: without a result, or with one older than what it was made from.

    Raises:
        ConfigError: a stage was begun with another config, and `overwrite` is false.
    """
    due: set[str] = set()
    finished_at: dict[str, int] = {}
    for job in jobs:
        if job.proof == DONE_FILE and not RunDirectory(job.directory).is_finished_with(job.config):
            due.add(job.name)
            continue
        when = job.finished_at()
        if when is None or any(name in due or finished_at[name] > when for name in job.after):
            due.add(job.name)
        else:
            finished_at[job.name] = when
    return due


def _teacher_job(config: RunConfig, taxonomy: Taxonomy, number: int) -> Job:
    vertical, num_classes = taxonomy.verticals[number], taxonomy.vertical_sizes[number]
    after = ()
    if vertical in config.teacher.external:
        stage = ExternalTeacherConfig(
            **get_shared(config), vertical=vertical, external=config.teacher.external[vertical]
        )
        summary, resources = f"taking over a model for {num_classes} classes", Resources()
    else:
        parts = get_parts(config.teacher)
        if config.teacher.from_generalist:
            parts["base"] = config.teacher.base.starting_from(GENERALIST)
            after = (f"student {GENERALIST}",)
        stage = TeacherConfig(
            **get_shared(config),
            **parts,
            seed=config.seed,
            logger=config.logger,
            vertical=vertical,
            coarse_labels=config.coarse_labels,
        )
        summary, resources = f"training the specialist of {num_classes} classes", get_resources(config.teacher.trainer)
    directory = config.workdir / TEACHERS / vertical
    return Job(f"teacher {vertical}", "teacher", stage, directory, after, summary, resources, number)


def _targets_job(config: RunConfig, vertical: str, number: int) -> Job:
    trainer = config.teacher.trainer
    stage = TargetsConfig(
        **get_shared(config), **get_asking(trainer), vertical=vertical, targets=config.targets, gate=config.gate
    )
    directory = config.workdir / TARGETS / config.targets.name / vertical
    summary = f"storing the teacher's top {config.targets.top_k} classes for every image"
    after = (f"teacher {vertical}",)
    if config.gate.action == "stop":  # a gate that only reports compares with what is finished, and waits for nothing
        after += (f"student {config.gate.generalist}",)
    return Job(
        f"targets {vertical}", "targets", stage, directory, after, summary, Resources(trainer.accelerator), number
    )


def _export_job(config: RunConfig) -> Job:
    stage = ExportConfig(**get_shared(config), name=config.name)
    directory = config.workdir / EXPORTS / config.name
    after = (f"evaluate {config.name}",)
    return Job(f"export {config.name}", "export", stage, directory, after, "writing the folder that predicts")
