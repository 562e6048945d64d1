"""`concentrate student`: one network over all verticals, on soft targets or, as the generalist, on labels."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic

from concentration import distributed
from concentration.data.sample_targets import (
    LabelTargets,
    MixedTargets,
    SampleTargets,
    StoredTargets,
    WeightedOutside,
)
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.label_mix import LabelMix
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.schema import Config, FolderName, hash_values
from concentration.stages.folders import STUDENTS, TARGETS, TEACHERS
from concentration.stages.identities import identify_teacher, identify_teachers
from concentration.stages.plan import count_most_labels, print_training_plan
from concentration.stages.prepared import PreparedData, load_prepared, load_prepared_split
from concentration.stages.run_directory import HOW_TO_GROW, RunDirectory
from concentration.stages.targets import SoftTargetsConfig
from concentration.stages.teacher import load_teachers, measure_teachers
from concentration.stages.train_network import (
    LabelsConfig,
    NetworkStageConfig,
    Task,
    find_fine,
    identify_base_checkpoint,
    train_network,
)
from concentration.stages.verbs import write_command
from concentration.taxonomy import Taxonomy
from concentration.training.memory import StepShape


class HardTargetsConfig(Config):
    """The samples' own labels."""

    kind: Literal["labels"] = "labels"


class OnlineTargetsConfig(Config):
    """The teachers' top K classes for the student's own view, asked for in every step and not stored.

    top_k: K, the classes of each teacher's answer that are kept (all of a smaller vertical).
    """

    kind: Literal["online"] = "online"
    top_k: pydantic.PositiveInt = 100


TargetsChoice = Annotated[
    HardTargetsConfig | SoftTargetsConfig | OnlineTargetsConfig, pydantic.Field(discriminator="kind")
]

Outside = Literal["zero", "mask"] | Annotated[float, pydantic.Field(gt=0, lt=1)]
LabelShare = Annotated[float, pydantic.Field(ge=0, lt=1)]


class LearningConfig(LabelsConfig):
    """What a student is taught.

    targets: the labels, stored answers of teachers (`concentrate targets`), or answers that teachers give in every step.
    smear: whether labels are smeared to their ancestors; true where not given. Soft targets carry their teachers' smearing.
    label_share: the share of the labels in soft targets: 0 takes the teachers' word alone, as in the paper; 0.5 half of each.
    tail: the targets of those classes of a sample's own verticals that are not among the teachers' top K: `zero` as in the paper,
        or `spread` for an even share of the tail mass.
    outside: the verticals in which a sample has no label: `zero` makes their classes absent, as in the paper; `mask` leaves them
        out of the loss; a number between 0 and 1 is the weight of their loss.
    """

    later_fields: ClassVar[frozenset[str]] = LabelsConfig.later_fields | {"label_share"}

    targets: TargetsChoice
    smear: bool | None = None
    label_share: LabelShare = 0.0
    tail: Literal["zero", "spread"] = "zero"
    outside: Outside = "zero"

    @property
    def outside_weight(self) -> float:
        return {"zero": 1.0, "mask": 0.0}.get(self.outside, self.outside)

    @property
    def with_labels(self) -> bool:
        """Whether labels are part of the targets; otherwise these are the teachers' alone."""
        return self.targets.kind == "labels" or self.label_share > 0


class StudentConfig(NetworkStageConfig, LearningConfig):
    """Writes `students/NAME/`.

    name: the name of the student, by which it is evaluated, exported and served.
    """

    name: FolderName = "student"

    @pydantic.model_validator(mode="after")
    def _check_coarse_labels(self):
        if self.coarse_labels == "skip" and self.targets.kind != "labels":
            raise ValueError(
                f"coarse_labels=skip with targets={self.targets.kind}: teachers say the leaves of all images; remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_smear(self):
        if self.smear and not self.with_labels:
            raise ValueError(
                f"smear=true with targets={self.targets.kind}: soft targets are never smeared; remove it "
                "(Gao et al., section 3.1)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_label_share(self):
        if self.label_share and self.targets.kind == "labels":
            raise ValueError(
                f"label_share={self.label_share} with targets=labels: there is nothing to mix them with; remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_tail(self):
        if self.tail == "spread" and self.targets.kind == "labels":
            raise ValueError("tail=spread with targets=labels: labels have no tail mass; remove it")
        return self

    @pydantic.model_validator(mode="after")
    def _check_outside(self):
        if self.loss == "softmax" and self.outside != "zero":
            raise ValueError(
                f"outside={self.outside} with loss=softmax: one softmax is over all verticals; remove outside"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_view(self):
        if self.targets.kind == "soft" and self.targets.views and self.data.view is not None:
            raise ValueError(
                f"data.view with targets.views={self.targets.views}: the student replays the stored views; remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        if self.name == "specialists":
            raise ValueError("name=specialists means the teachers as an ensemble; give the student another name")
        return self


def student(config: StudentConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError, DataError, DivergedError, Preempted.
    """
    if config.plan:
        _print_plan(config)
        return
    distributed.start(config.trainer.accelerator, config.trainer.timeout_seconds)
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    directory = RunDirectory(config.workdir / STUDENTS / config.name)
    upstream = {"data": fingerprint, **identify_base_checkpoint(config)}
    if config.targets.kind == "soft":
        upstream["targets"] = _identify_targets(config, taxonomy, fingerprint)
    elif config.targets.kind == "online":
        upstream["teachers"] = identify_teachers(config.workdir, taxonomy.verticals)
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        split = load_prepared_split(config.workdir, "train", taxonomy)
        ordinals = choose_ordinals(config, split)
        counts_C, frequency_C = count_classes(config, split, ordinals)
        task = Task(
            title=f"student {config.name}",
            taxonomy=taxonomy,
            split=split,
            ordinals=ordinals,
            targets=build_targets(config, config.workdir, split),
            counts_C=counts_C,
            frequency_C=frequency_C,
            teachers=_load_fitting_teachers(config, taxonomy, prepared) if config.targets.kind == "online" else None,
        )
        train_network(config, directory, task, prepared)


def describe_step(config: StudentConfig, taxonomy: Taxonomy) -> StepShape:
    """What a step's memory depends on besides the network."""
    listed = count_most_labels(taxonomy, config.smear is not False) if config.with_labels else 0
    if config.targets.kind != "labels":
        listed += min(config.targets.top_k, max(taxonomy.vertical_sizes))
    return StepShape(listed, has_background=config.tail == "spread", has_weight=config.outside_weight != 1)


def _print_plan(config: StudentConfig) -> None:
    """Prints what the training would take. Raises: ConfigError where the data, or teachers in the loop, are missing."""
    prepared, taxonomy, _ = load_prepared(config.workdir, config.data)
    teachers_bytes = measure_teachers(config.workdir, taxonomy) if config.targets.kind == "online" else 0
    shape = describe_step(config, taxonomy)
    print_training_plan(config, f"student {config.name}", taxonomy, prepared.image_size, shape, teachers_bytes)


def build_targets(config: LearningConfig, workdir: Path, split: Split) -> SampleTargets:
    """The targets of every sample of the split; with teachers in the loop, its labels.

    Raises:
        DataError: as `StoredTargets`.
    """
    labels = LabelTargets(split, config.with_labels and config.smear is not False)
    targets: SampleTargets = labels
    if config.targets.kind == "soft":
        targets = StoredTargets(workdir / TARGETS / config.targets.name, split, config.tail)
        if mix := _build_mix(config, split.taxonomy):
            targets = MixedTargets(targets, labels, mix)
    return targets if config.outside_weight == 1 else WeightedOutside(targets, split, config.outside_weight)


def _build_mix(config: LearningConfig, taxonomy: Taxonomy) -> LabelMix | None:
    if config.label_share == 0:
        return None
    return LabelMix(config.label_share, taxonomy.is_leaf, taxonomy.vertical_of_output)


def choose_ordinals(config: LearningConfig, split: Split) -> np.ndarray | range:
    """Ordinals, rising, of the samples to learn from; a range where none is left out. Raises: DataError as `find_fine`."""
    return find_fine(split) if config.coarse_labels == "skip" else range(len(split))


def count_classes(config: LearningConfig, split: Split, ordinals: np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
    """(C,) how many samples have each class, and (C,) their share of the samples in whose loss the class takes part.

    ordinals: the samples to learn from, as `choose_ordinals` gives them.
    """
    taxonomy, smear = split.taxonomy, config.smear is not False
    if isinstance(ordinals, range):
        counts_C = split.count_smeared() if smear else split.count_labels()
        num_routed_M = split.count_routed()
    else:
        counts_C = split.count_in(ordinals, smear)
        is_taken_N = np.zeros(len(split), dtype=bool)
        is_taken_N[ordinals] = True
        num_routed_M = np.array([is_taken_N[split.routed(vertical)].sum() for vertical in taxonomy.verticals])
    num_seen_M = num_routed_M + config.outside_weight * (len(ordinals) - num_routed_M)
    return counts_C, counts_C / num_seen_M[taxonomy.vertical_of_output]


def _load_fitting_teachers(config: StudentConfig, taxonomy: Taxonomy, prepared: PreparedData) -> RoutedTeachers:
    """The teachers in the loop. Raises: ConfigError where one takes images of another size than the student."""
    teachers = load_teachers(config.workdir, taxonomy)
    for vertical, teacher in zip(taxonomy.verticals, teachers, strict=True):
        if teacher.image_size != prepared.image_size:
            raise ConfigError(
                f"targets=online: the teacher of {vertical} takes images of {teacher.image_size} pixels, the student of "
                f"{prepared.image_size}; give data.image_size={teacher.image_size}, or store targets (targets=soft)"
            )
    return RoutedTeachers(teachers, config.targets.top_k, config.tail, _build_mix(config, taxonomy))


def _identify_targets(config: StudentConfig, taxonomy: Taxonomy, fingerprint: str) -> str:
    """A hash of all verticals' targets.

    Raises:
        ConfigError: a vertical's targets are missing, were made otherwise, or by another teacher than the one that is there now.
    """
    root = config.workdir / TARGETS / config.targets.name
    if not root.is_dir():
        have = sorted(path.name for path in root.parent.glob("*")) or ["none"]
        raise ConfigError(
            f"targets.name={config.targets.name}: no such targets (there: {', '.join(have)}); run `concentrate targets` first"
        )
    directories = {vertical: RunDirectory(root / vertical) for vertical in taxonomy.verticals}
    is_grown = any(d.is_finished and d.load_upstream().get("data") != fingerprint for d in directories.values())
    try:
        done = {v: d.load_done(write_command("targets", v)) for v, d in directories.items()}
    except ConfigError as error:
        raise ConfigError(f"{error}, or, {HOW_TO_GROW}" if is_grown else str(error)) from None
    for vertical, directory in directories.items():
        _check_teacher(config, vertical, done[vertical]["teacher"])
        made_with = directory.load_config()["targets"]
        for key, wanted in config.targets.model_dump(exclude={"kind", "name"}).items():
            if made_with[key] != wanted:
                raise ConfigError(
                    f"targets.{key}={wanted}, but {directory.path} was made with {made_with[key]}; "
                    "give that, or make other targets under another targets.name"
                )
    return hash_values({vertical: facts["targets"] for vertical, facts in done.items()})


def _check_teacher(config: StudentConfig, vertical: str, made_by: str) -> None:
    """Raises: ConfigError where the vertical has a teacher, but not the one that made the targets."""
    path = config.workdir / TEACHERS / vertical
    if not (path / "DONE.json").exists():
        return  # a teacher may be removed once its targets are made
    now = identify_teacher(config.workdir, vertical)
    if made_by != now:
        raise ConfigError(
            f"targets.name={config.targets.name}: made by another teacher of {vertical} ({made_by}) than {path} holds now "
            f"({now}); run `{write_command('targets', vertical)} overwrite=true`, or make targets of another name"
        )
