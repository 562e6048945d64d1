"""`concentrate run experiment=compare`: the neighbouring systems beside the student, on one data set, as jobs of a run.

The generalist of twice the training, as it is and with a wider top-2; a hard mixture of experts, with one and with two
experts an image; the generalist grown by auxiliary heads for groups of confused classes, and for random groups of the same
sizes, the control.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic

from concentration.networks.bases import BaseConfig
from concentration.networks.gater import CentroidRuleConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.top_layers import TopConfig
from concentration.pipeline.jobs import Job, Resources
from concentration.pipeline.parts import (
    NetworkParts,
    TrainedRun,
    build_evaluate_job,
    build_student_job,
    get_asking,
    get_resources,
    get_shared,
)
from concentration.schema import Config
from concentration.stages.augment import AddedHeadsConfig, AugmentConfig
from concentration.stages.expert import ExpertConfig, name_expert
from concentration.stages.folders import GROUPINGS, STUDENTS, TEACHERS
from concentration.stages.group import GroupConfig
from concentration.stages.group_classes import DetectionGroupsConfig, RandomGroupsConfig
from concentration.stages.group_features import FeatureGroupsConfig
from concentration.stages.mixture import MixtureConfig, OwnDecoderConfig
from concentration.stages.student import HardTargetsConfig
from concentration.training.configs import TrainerConfig
from concentration.training.optimizers import OptimizerConfig

GENERALIST = "generalist"
LONG, WIDE = "generalist_long", "generalist_wide"
MIXTURE, MIXTURE_TOP2 = "mixture", "mixture_top2"
AUGMENTED, AUGMENTED_RANDOM = "augmented", "augmented_random"
#: All systems beside generalist, student and specialists, in the order in which they are shown.
COMPARED = (LONG, WIDE, MIXTURE, MIXTURE_TOP2, AUGMENTED, AUGMENTED_RANDOM)


class ExpertParts(Config):
    """An expert and how it is trained; its base network is the generalist's, and starts from it."""

    top: TopConfig
    pace: PaceConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig


class AugmentParts(Config):
    """The heads of the augmented generalist and how they are trained.

    layer: where the heads begin: at the base network's features (the paper), or at the top-1 outputs.
    """

    layer: Literal["base", "top1"] = "base"
    hidden: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]
    norm: Literal["none", "layer"] = "layer"
    optimizer: OptimizerConfig
    trainer: TrainerConfig


class CompareConfig(Config):
    """What the other systems are made of.

    long_trainer: of the generalists that are trained as long as any other system with all its parts.
    wide_top: of the one of them that is widened, the control for every system that adds parameters.
    features: how images are shared out among the experts.
    expert: the experts of the mixtures, one for each group of images.
    groups: how classes are shared out among the auxiliary heads.
    augment: the auxiliary heads, and how they are trained.
    """

    long_trainer: TrainerConfig
    wide_top: TopConfig
    features: FeatureGroupsConfig
    expert: ExpertParts
    groups: DetectionGroupsConfig
    augment: AugmentParts


class ComparedRun(TrainedRun):
    """What of a run's config the jobs here need."""

    generalist: NetworkParts


def build_compare_jobs(config: ComparedRun, compare: CompareConfig) -> list[Job]:
    """The trainings of all systems and their evaluations, each after what it needs; the generalist is in the run already."""
    trainer = config.generalist.trainer
    long = config.generalist.model_copy(update={"trainer": compare.long_trainer})
    wide = long.model_copy(update={"top": compare.wide_top})
    jobs = [
        build_student_job(config, LONG, long, HardTargetsConfig(), after=()),
        build_student_job(config, WIDE, wide, HardTargetsConfig(), after=()),
        *_build_mixture_jobs(config, compare, trainer),
        *_build_augment_jobs(config, compare, trainer),
    ]
    trained_by = {job.directory.name: job.name for job in jobs if job.directory.parent.name == STUDENTS}
    evaluations = [build_evaluate_job(config, name, trainer, (trained_by[name],)) for name in COMPARED]
    return [*jobs, *evaluations]


def _build_mixture_jobs(config: ComparedRun, compare: CompareConfig, trainer: TrainerConfig) -> list[Job]:
    """Groups by the generalist's features, an expert for each, and mixtures in which one or two experts see an image."""
    grouping = _group_job(config, compare.features, trainer, (f"student {GENERALIST}",))
    experts = [_expert_job(config, compare, number, grouping.name) for number in range(compare.features.num_groups)]
    after = tuple(job.name for job in experts)
    return [grouping, *experts, *(_mixture_job(config, rank, trainer, after) for rank in (1, 2))]


def _build_augment_jobs(config: ComparedRun, compare: CompareConfig, trainer: TrainerConfig) -> list[Job]:
    """Groups of classes, random ones of the same sizes, and the generalist grown by heads for either."""
    groups = _group_job(config, compare.groups, trainer, (f"student {GENERALIST}",))
    random = _group_job(config, RandomGroupsConfig(of=compare.groups.kind), trainer, (groups.name,))
    names = {AUGMENTED: (compare.groups.kind, groups.name), AUGMENTED_RANDOM: (random.config.method.kind, random.name)}
    grown = [_augment_job(config, compare.augment, name, *of) for name, of in names.items()]
    return [groups, random, *grown]


def _group_job(
    config: ComparedRun,
    method: FeatureGroupsConfig | DetectionGroupsConfig | RandomGroupsConfig,
    trainer: TrainerConfig,
    after: tuple[str, ...],
) -> Job:
    stage = GroupConfig(**get_shared(config), seed=config.seed, method=method, **get_asking(trainer))
    summary = {"features": "sharing images out among experts", "random": "drawing groups of classes at random"}
    return Job(
        f"group {method.kind}",
        "group",
        stage,
        config.workdir / GROUPINGS / method.kind,
        after,
        summary.get(method.kind, "finding groups of classes that are confused"),
        Resources(trainer.accelerator),
    )


def _expert_job(config: ComparedRun, compare: CompareConfig, number: int, grouping: str) -> Job:
    base: BaseConfig = config.generalist.base.model_copy(update={"checkpoint": GENERALIST})
    stage = ExpertConfig(
        **get_shared(config),
        **{name: getattr(compare.expert, name) for name in ExpertParts.model_fields},
        base=base,
        seed=config.seed,
        logger=config.logger,
        group=str(number),
    )
    name = name_expert(compare.features.kind, number)
    directory, resources = config.workdir / TEACHERS / name, get_resources(compare.expert.trainer)
    return Job(f"teacher {name}", "teacher", stage, directory, (grouping,), "training the expert of a group", resources)


def _mixture_job(config: ComparedRun, top_experts: int, trainer: TrainerConfig, after: Sequence[str]) -> Job:
    name = {1: MIXTURE, 2: MIXTURE_TOP2}[top_experts]
    stage = MixtureConfig(
        **get_shared(config),
        seed=config.seed,
        name=name,
        gater=CentroidRuleConfig(),
        decoder=OwnDecoderConfig(),
        top_experts=top_experts,
        **get_asking(trainer),
    )
    directory = config.workdir / STUDENTS / name
    summary = "putting the experts behind a gater"
    return Job(f"mixture {name}", "mixture", stage, directory, tuple(after), summary, Resources(trainer.accelerator))


def _augment_job(config: ComparedRun, parts: AugmentParts, name: str, grouping: str, after: str) -> Job:
    stage = AugmentConfig(
        **get_shared(config),
        seed=config.seed,
        logger=config.logger,
        name=name,
        network=GENERALIST,
        heads=AddedHeadsConfig(grouping=grouping, layer=parts.layer, hidden=parts.hidden, norm=parts.norm),
        optimizer=parts.optimizer,
        trainer=parts.trainer,
    )
    directory = config.workdir / STUDENTS / name
    summary = "growing the generalist by auxiliary heads"
    return Job(f"augment {name}", "augment", stage, directory, (after,), summary, get_resources(parts.trainer))
