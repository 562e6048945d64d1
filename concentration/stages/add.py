"""`concentrate add vertical=NAME`: extends the student in service by a vertical, by classes, or by a better teacher.

The teacher of what is new is trained and its targets are made; the student gets a block and a classifier for it, and is trained
on the new samples while stored targets of old ones are replayed. What old verticals lose is measured before the stage is done.

Shapes: C all classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pydantic
import torch

from concentration import distributed
from concentration.array_files import load_metadata
from concentration.data.order import permutation
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.metrics.average_precision import mean_average_precision
from concentration.networks.bases import BaseConfig
from concentration.networks.classifier import Classifier
from concentration.networks.extension import check_extension, extend_student, hold_old_parameters
from concentration.networks.pace import PaceConfig
from concentration.networks.student import Student
from concentration.networks.top_layers import TopConfig
from concentration.schema import Config, FolderName, hash_values
from concentration.stages.carried_targets import carry_targets
from concentration.stages.folders import SHARDS, STUDENTS, TARGETS, TEACHERS
from concentration.stages.prepared import DataOverrides, has_split, load_prepared, load_prepared_split
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory
from concentration.stages.served import Served, load_served
from concentration.stages.student import LearningConfig, build_targets, choose_ordinals, count_classes
from concentration.stages.targets import SoftTargetsConfig, TargetsConfig, targets
from concentration.stages.teacher import TeacherConfig, teacher
from concentration.stages.teacher_gate import GateConfig, measure_vertical
from concentration.stages.train_network import Task, TrainingStageConfig, train_from_here
from concentration.taxonomy import Taxonomy
from concentration.training.configs import TrainerConfig
from concentration.training.optimizers import OptimizerConfig


class NewTeacherConfig(Config):
    """A new vertical's teacher and how it is trained."""

    base: BaseConfig
    top: TopConfig
    pace: PaceConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig


class AddConfig(TrainingStageConfig):
    """Writes `students/NAME/` and `targets/NAME/`.

    vertical: what is new, one or several: a vertical that the student lacks, or that has got more classes or another teacher. A
        finished teacher that fits is used as it is; otherwise one is trained (`teacher`).
    student: the student in service. If it learned from labels, so does the new one, without teacher and targets; if it learned
        from teachers in the loop, targets of all images are stored.
    name: the new student's name.
    replay: how many old images are seen for each new one.
    trainable: `all`, or `new` for only what the old student does not have, which leaves old verticals exactly as they were.
    tolerance: by how much an old vertical's AP on val may fall; a larger loss is an error, and the stage stays unfinished.
    gate: what the new teacher must be before its targets are made.
    teacher: the new vertical's teacher, where one is trained.
    """

    runtime_fields = TrainingStageConfig.runtime_fields | {"tolerance", "gate"}

    data: DataOverrides = DataOverrides()
    vertical: str | tuple[str, ...]
    student: str = "student"
    name: FolderName = "next"
    replay: pydantic.NonNegativeFloat = 1.0
    trainable: Literal["all", "new"] = "all"
    tolerance: float = pydantic.Field(default=0.01, ge=0, lt=1)
    gate: GateConfig = GateConfig()
    teacher: NewTeacherConfig

    @property
    def verticals(self) -> tuple[str, ...]:
        return (self.vertical,) if isinstance(self.vertical, str) else self.vertical

    @pydantic.model_validator(mode="after")
    def _check_names(self):
        if self.name in (self.student, "specialists"):
            raise ValueError(f"name={self.name} is taken; the new student needs a name of its own")
        return self

    @pydantic.model_validator(mode="after")
    def _check_trainable(self):
        reasons = {
            "optimizer.weight_decay": getattr(self.optimizer, "weight_decay", 0.0),
            "trainer.update_in_backward": self.trainer.update_in_backward,
            "trainer.shard_head": self.trainer.shard_head,
        }
        for key, value in reasons.items():
            if self.trainable == "new" and value:
                raise ValueError(
                    f"trainable=new with {key}={value}: it would move what is to stay; set one of them back"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_image_size(self):
        if self.data.image_size is not None:
            raise ValueError(f"data.image_size={self.data.image_size}: the student's own is kept; leave it out")
        return self


def add(config: AddConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: the student cannot be extended; `vertical` does not name all that is new; a teacher is unfit; or an old
            vertical lost more than the tolerance.
        DataError: the prepared data are not those that the student was trained on with others appended.
    """
    distributed.start(config.trainer.accelerator, config.trainer.timeout_seconds)
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    split = load_prepared_split(config.workdir, "train", taxonomy)
    served = load_served(config.workdir, config.student, split)
    _check_verticals(config, served, taxonomy)
    learning = _choose_learning(config, served)
    sets = {}
    if learning.targets.kind == "soft":
        sets = distributed.from_rank_zero_at_last(lambda: _make_targets(config, served, learning.targets, split))
    directory = RunDirectory(config.workdir / STUDENTS / config.name)
    upstream = {"data": fingerprint, "student": served.checkpoint, "targets": hash_values(sets)}
    with directory.begin(config, upstream) as is_due:
        if is_due:
            _train(config, directory, dataclasses.replace(served, learning=learning), split)


def _choose_learning(config: AddConfig, served: Served) -> LearningConfig:
    """How the new student learns: as the old one did, with a set of targets of its own where these are stored.

    Raises:
        ConfigError: `data.view` would have no effect.
    """
    was = served.learning.targets
    if was.kind == "labels":
        return served.learning
    if was.kind == "soft" and was.views and config.data.view is not None:
        raise ConfigError(
            f"data.view: {config.student} replays {was.views} stored views of each image, and so does {config.name}; remove it"
        )
    if was.kind == "online":
        own = SoftTargetsConfig(name=config.name, top_k=was.top_k)
    else:
        own = was.model_copy(update={"name": config.name})
    return served.learning.model_copy(update={"targets": own})


def _train(config: AddConfig, directory: RunDirectory, served: Served, split: Split) -> None:
    taxonomy = split.taxonomy
    size = served.network.image_size
    prepared, _, _ = load_prepared(config.workdir, DataOverrides(image_size=size, view=config.data.view))
    taught = choose_ordinals(served.learning, split)
    counts_C, frequency_C = count_classes(served.learning, split, taught)
    sizes = dict(zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True))
    student = extend_student(served.network, sizes, torch.from_numpy(frequency_C), config.seed)
    if config.trainable == "new":
        hold_old_parameters(served.network, student)
    ordinals = choose_samples(split, config.verticals, config.replay, config.seed)
    ordinals = ordinals[np.isin(ordinals, taught)]
    task = Task(
        title=f"add {'+'.join(config.verticals)}",
        taxonomy=taxonomy,
        split=split,
        ordinals=ordinals,
        targets=build_targets(served.learning, config.workdir, split),
        counts_C=counts_C,
        frequency_C=frequency_C,
    )

    def judge(trained: Student, num_steps: int) -> Mapping[str, Any]:
        before, after = measure_old_verticals(config, served.network, trained, served.taxonomy, taxonomy)
        _check_tolerance(config, before, after)
        batch_size = min(config.trainer.batch_size, len(ordinals))
        epochs, steps = divmod(num_steps, -(-len(ordinals) // batch_size))  # the last step of an epoch has what is left
        num_images = epochs * len(ordinals) + steps * batch_size
        facts = {"num_images": num_images, "num_images_of_retraining": round(served.epochs * len(split))}
        _print(config, before, after, facts)
        return {**served.describe(), "ap_before": before, "ap_after": after, **facts}

    train_from_here(student, config, directory, task, prepared, judge)


def choose_samples(split: Split, verticals: tuple[str, ...], replay: float, seed: int) -> np.ndarray:
    """Ordinals, rising: all samples with a label in these verticals, and `replay` times as many of the others, drawn evenly."""
    new = np.unique(np.concatenate([split.routed(vertical) for vertical in verticals]))
    others = np.setdiff1d(np.arange(len(split)), new)
    drawn = others[permutation(len(others), seed)[: round(replay * len(new))]]
    return np.sort(np.concatenate([new, drawn]))


def measure_old_verticals(
    config: AddConfig, old: Classifier, new: Classifier, earlier: Taxonomy, taxonomy: Taxonomy
) -> tuple[dict[str, float], dict[str, float]]:
    """AP on val of the old verticals' old classes, by the old and by the new student; those without a sample left out.

    Raises:
        ConfigError: there is no validation image to measure with.
    """
    if not has_split(config.workdir, "val"):
        raise ConfigError(
            f"{config.workdir / SHARDS}: no validation images, so what old verticals lose cannot be measured; prepare some"
        )
    val = load_prepared_split(config.workdir, "val", taxonomy)
    before, after = {}, {}
    for vertical in earlier.verticals:
        own = earlier.restrict(vertical)
        has_old_class = val.label_output < taxonomy.vertical_slice(vertical).start + own.num_classes
        if not (has_old_class & (val.label_output >= taxonomy.vertical_slice(vertical).start)).any():
            continue
        for found, network, whole in ((before, old, earlier), (after, new.eval(), taxonomy)):
            ap_V = measure_vertical(network, whole.vertical_slice(vertical).start, own, val)
            found[vertical] = mean_average_precision(ap_V)
    return before, after


def _check_verticals(config: AddConfig, served: Served, taxonomy: Taxonomy) -> None:
    """Raises: ConfigError where a vertical is not there, one that has come or grown is not given, or nothing can be done."""
    for vertical in config.verticals:
        taxonomy.vertical_slice(vertical)  # refuses what is not there
    sizes = served.network.config.verticals
    changed = [v for v, size in zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True) if sizes.get(v) != size]
    forgotten = [vertical for vertical in changed if vertical not in config.verticals]
    if forgotten:
        raise ConfigError(
            f"vertical={','.join(config.verticals)}: {', '.join(forgotten)} came or got classes since {config.student} was "
            f"trained, too; give all: vertical=[{','.join(dict.fromkeys([*config.verticals, *forgotten]))}]"
        )
    if not changed and config.trainable == "new":
        raise ConfigError(
            f"trainable=new: {config.student} has all classes of {', '.join(config.verticals)}, so nothing would be trained; "
            "give trainable=all for a better teacher"
        )
    check_extension(served.network, dict(zip(taxonomy.verticals, taxonomy.vertical_sizes, strict=True)))


def _make_targets(config: AddConfig, served: Served, own: SoftTargetsConfig, split: Split) -> dict[str, str]:
    """The new teachers and their targets, and the old ones' targets for what they have not seen. Returns the sets' hashes."""
    taxonomy, hashes = split.taxonomy, {}
    stored = served.learning.targets
    shared = {
        "workdir": config.workdir,
        "accelerator": config.trainer.accelerator,
        "targets": own,
        "overwrite": "changed" if config.overwrite else False,
    }
    for vertical in taxonomy.verticals:
        if vertical in config.verticals:
            _make_teacher(config, taxonomy, vertical)
            targets(TargetsConfig(**shared, vertical=vertical, gate=config.gate))
        else:
            known = TargetsConfig(**shared, vertical=vertical, gate=GateConfig(action="off"))
            if stored.kind == "soft":
                source = config.workdir / TARGETS / stored.name / vertical
                targets(known, functools.partial(carry_targets, source, config.workdir, split, served.taxonomy))
            else:
                targets(known)
        made = RunDirectory(config.workdir / TARGETS / own.name / vertical)
        hashes[vertical] = made.load_done("concentrate targets", targets=str)["targets"]
    return hashes


def _make_teacher(config: AddConfig, taxonomy: Taxonomy, vertical: str) -> None:
    """Trains a teacher where none is finished that answers for all classes of the vertical."""
    directory = RunDirectory(config.workdir / TEACHERS / vertical)
    restricted = taxonomy.restrict(vertical)
    file = directory.path / NETWORK_FILE
    is_ours = directory.is_finished and file.exists()
    is_fit = is_ours and load_metadata(file).get("taxonomy") == restricted.fingerprint
    if is_fit or (directory.is_finished and not is_ours):
        # One that was taken over from elsewhere is refused by `targets` where it answers for other classes.
        print(f"add: {directory.path}: finished, and taken as it is, whatever teacher.* says")
        return
    parts = {name: getattr(config.teacher, name) for name in NewTeacherConfig.model_fields}
    values = {"workdir": config.workdir, "overwrite": "changed", "seed": config.seed, "logger": config.logger}
    teacher(TeacherConfig(**values, vertical=vertical, **parts))


def _check_tolerance(config: AddConfig, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    lost = {vertical: before[vertical] - after[vertical] for vertical in before}
    worst = [f"{v} from {before[v]:.3f} to {after[v]:.3f}" for v in before if lost[v] > config.tolerance]
    if worst:
        raise ConfigError(
            f"{config.workdir / STUDENTS / config.name}: the AP of old verticals fell on val: {'; '.join(worst)}; more than "
            f"tolerance={config.tolerance:g}: give more replay than {config.replay:g}, a lower optimizer.lr or trainable=new "
            "with overwrite=true, or another tolerance"
        )


def _print(
    config: AddConfig, before: Mapping[str, float], after: Mapping[str, float], facts: Mapping[str, int]
) -> None:
    for vertical in before:
        print(f"add: {vertical}: AP on val {before[vertical]:.3f} before, {after[vertical]:.3f} after")
    share = facts["num_images"] / max(1, facts["num_images_of_retraining"])
    print(
        f"add: {facts['num_images']} images were learned from, {share:.0%} of the {facts['num_images_of_retraining']} that "
        f"training {config.name} anew would take"
    )
