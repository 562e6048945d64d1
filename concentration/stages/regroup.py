"""What `remove` and `merge` share: they make a working directory with fewer verticals from another, without any training.

The directory in service is left as it is. What still holds for the verticals that stay is carried over; everything else refers
to the earlier taxonomy, and would be refused by its fingerprint.

Shapes: C all classes of the new taxonomy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from concentration.data.mapped_labels import map_labels
from concentration.data.order import permutation
from concentration.data.split import Split
from concentration.distributed import choose_device
from concentration.errors import ConfigError
from concentration.files import hash_file
from concentration.metrics.evaluation import Evaluation, Evaluator
from concentration.networks.classifier import Classifier
from concentration.networks.regrouping import compute_square_norms, regroup_student
from concentration.networks.student import Student
from concentration.progress import Progress
from concentration.schema import FolderName
from concentration.stages.carried_directory import carry_shards, carry_stored_targets, carry_teacher
from concentration.stages.folders import SHARDS, STUDENTS, TARGETS, TEACHERS
from concentration.stages.prepared import DataOverrides, has_split, load_prepared, load_prepared_split
from concentration.stages.run_directory import NETWORK_FILE, RunDirectory, StageConfig
from concentration.stages.served import Served, load_served
from concentration.stages.subject import Subject
from concentration.taxonomy import Taxonomy

#: Training images on which the usual norms of the logits are measured, at most.
NUM_NORM_IMAGES = 2000


class RegroupConfig(StageConfig):
    """Which student, and where to.

    destination: the new working directory; images stay where they are, in the tars of this one.
    name: the name of the student in service here, and of the new one there.
    accelerator: the kind of device that runs the network.
    batch_size: how many images the network sees at a time.
    """

    runtime_fields = StageConfig.runtime_fields | {"destination", "accelerator", "batch_size"}

    destination: Path
    name: FolderName = "student"
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256

    @pydantic.model_validator(mode="after")
    def _check_destination(self):
        if self.destination.resolve() == self.workdir.resolve():
            raise ValueError(
                f"destination={self.destination}: is workdir, whose taxonomy is that of its shards, teachers and targets; "
                "give a new directory"
            )
        return self


@dataclass(frozen=True)
class Regrouping:
    """Two taxonomies: the earlier one, and one with fewer verticals of the same classes."""

    before: Taxonomy
    after: Taxonomy

    @property
    def parts_of(self) -> dict[str, tuple[str, ...]]:
        """By new vertical the earlier ones whose classes it has, in their order."""
        parts: dict[str, set[str]] = {vertical: set() for vertical in self.after.verticals}
        for c in self.after.classes:
            parts[c.vertical].add(self.before.classes[self.before.position[c.id]].vertical)
        return {v: tuple(sorted(parts[v], key=self.before.verticals.index)) for v in self.after.verticals}

    @property
    def old_output_C(self) -> np.ndarray:
        """(C,) the earlier output of every new one."""
        outputs = range(self.after.num_classes)
        return np.array([self.before.output(self.after.class_of_output(output).id) for output in outputs])

    @property
    def kept(self) -> list[str]:
        """The verticals that are as they were."""
        return [vertical for vertical, parts in self.parts_of.items() if parts == (vertical,)]


def load_taxonomy(workdir: Path) -> Taxonomy:
    """Raises: ConfigError, DataError as `load_prepared`."""
    return load_prepared(workdir, DataOverrides())[1]


def regroup(config: RegroupConfig, regrouping: Regrouping) -> None:
    """Makes the new working directory, and says what the student was and is worth on val.

    Raises:
        Busy: another process regroups into the destination.
        ConfigError: nothing finished has this name, it cannot be regrouped or is behind its data, or the destination holds
            something else.
        DataError: a file is missing or damaged.
    """
    split = load_prepared_split(config.workdir, "train", regrouping.before)
    served = load_served(config.workdir, config.name, split)
    if served.taxonomy.fingerprint != split.taxonomy.fingerprint or served.num_shards < len(split.shards):
        raise ConfigError(
            f"name={config.name}: classes or images came since it was trained; `concentrate add` them first, and take what "
            "that made"
        )
    with RunDirectory(config.destination).lock(".lock"):
        _make_directory(config, regrouping, served, split)


def _make_directory(config: RegroupConfig, regrouping: Regrouping, served: Served, split: Split) -> None:
    directory = RunDirectory(config.destination / STUDENTS / config.name)
    new_split = carry_shards(config.workdir, config.destination, regrouping.before, regrouping.after)
    upstream = {"data": new_split.fingerprint, "student": served.checkpoint}
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        _carry_what_holds(config, regrouping, served, split, new_split)
        norm_of = _measure_norms(config, regrouping, served.network, split)
        network = regroup_student(served.network, regrouping.parts_of, regrouping.old_output_C, norm_of)
        path = directory.path / NETWORK_FILE
        network.save(path, {"taxonomy": regrouping.after.fingerprint})
        facts = _compare(config, regrouping, served.network, network)
        _print(config, regrouping, split, new_split, facts)
        directory.finish({"step": 0, "checkpoint": hash_file(path), **served.describe(), **facts})


def _carry_what_holds(
    config: RegroupConfig, regrouping: Regrouping, served: Served, split: Split, new_split: Split
) -> None:
    """Finished teachers of the verticals that stay, and the student's stored targets of them."""
    for vertical in regrouping.kept:
        carry_teacher(config.workdir / TEACHERS / vertical, config.destination / TEACHERS / vertical, new_split)
        targets = served.learning.targets
        if targets.kind == "soft":
            places = [root / TARGETS / targets.name / vertical for root in (config.workdir, config.destination)]
            carry_stored_targets(*places, split, new_split)


class _SquareNorms:
    """A student that is asked for the squared norms of its raw logits, (B, M), instead of its answers."""

    def __init__(self, student: Student):
        self._student = student
        self.image_size, self.device = student.image_size, student.device
        self.num_outputs = len(student.config.verticals)

    def to(self, device: torch.device) -> "_SquareNorms":
        return _SquareNorms(self._student.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        return compute_square_norms(self._student, images)


def _measure_norms(config: RegroupConfig, regrouping: Regrouping, student: Student, split: Split) -> dict[str, float]:
    """By vertical that is merged, over training images of all that it is merged with."""
    norm_of = {}
    for parts in regrouping.parts_of.values():
        if len(parts) == 1:
            continue
        ordinals = np.unique(np.concatenate([split.routed(vertical) for vertical in parts]))
        chosen = np.sort(ordinals[permutation(len(ordinals), 0)[:NUM_NORM_IMAGES]])
        subject = Subject(((_SquareNorms(student),),), "", regrouping.before, 0, split, chosen)
        with Progress("merge: norms", len(chosen), "images") as progress:
            scored = [square_BM.cpu() for square_BM, _ in subject.score_all(config.batch_size, 0, progress)]
        usual_M = torch.cat(scored).mean(0).clamp_min(1e-12).sqrt()
        numbers = {vertical: regrouping.before.vertical_number(vertical) for vertical in parts}
        norm_of |= {vertical: float(usual_M[number]) for vertical, number in numbers.items()}
    return norm_of


def _compare(config: RegroupConfig, regrouping: Regrouping, old: Student, new: Student) -> dict[str, Any]:
    """What both say of the val images that are left; nothing where there is none.

    The old student's APs are those of its outputs in the new verticals, its top-1 is over all classes that it has.
    """
    if not has_split(config.destination, "val"):
        return {}
    device = choose_device(config.accelerator)
    old, new = old.to(device), new.to(device)
    val = load_prepared_split(config.destination, "val", regrouping.after)
    before = map_labels(val, regrouping.before, None, str(config.workdir / SHARDS))
    whole, was = _evaluate(config, old, (before, slice(None)), (val, regrouping.old_output_C))
    [now] = _evaluate(config, new, (val, slice(None)))
    facts = {"num_val": len(val), "mpvap_before": was.mpvap, "mpvap_after": now.mpvap}
    facts |= {"top1_before": whole.top1, "top1_after": now.top1, "pvap_before": was.pvap, "pvap_after": now.pvap}
    return {name: _without_nan(value) for name, value in facts.items()}


def _evaluate(config: RegroupConfig, network: Classifier, *parts: tuple[Split, slice | np.ndarray]) -> list[Evaluation]:
    """Of each part of the network's outputs, which are the classes of its split's taxonomy; all splits are of the same images."""
    split = parts[0][0]
    subject = Subject(((network,),), "", split.taxonomy, 0, split, np.arange(len(split)))
    evaluators = [Evaluator(split.taxonomy) for split, _ in parts]
    with Progress("compare on val", len(split), "images") as progress:
        for scores_BC, ordinal_B in subject.score_all(config.batch_size, 0, progress):
            for (split, columns), evaluator in zip(parts, evaluators, strict=True):
                labels = [split.labels(int(ordinal)) for ordinal in ordinal_B]
                evaluator.update(scores_BC[:, columns], labels)
    return [evaluator.compute(network.device) for evaluator in evaluators]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is None."""
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def _print(config: RegroupConfig, regrouping: Regrouping, split: Split, new_split: Split, facts: Mapping) -> None:
    sizes = dict(zip(regrouping.after.verticals, regrouping.after.vertical_sizes, strict=True))
    outputs = ", ".join(f"{vertical} {size}" for vertical, size in sizes.items())
    print(f"{config.destination}: outputs by vertical, in order: {outputs}")
    num_gone = len(split) - len(new_split)
    print(f"{config.destination}: {len(new_split)} training images; {num_gone} have no label left")
    new_leaves = _find_new_leaves(regrouping)
    if new_leaves:
        print(
            f"{config.destination}: {len(new_leaves)} classes have no class below them any more: {_shorten(new_leaves)}"
        )
    for name, what in (("mpvap", "mpvap on val"), ("top1", "top-1 over all classes")):
        if facts.get(f"{name}_before") is not None:
            print(f"{config.name}: {what} {facts[f'{name}_before']:.4f} before, {facts[f'{name}_after']:.4f} after")
    for vertical, after in facts.get("pvap_after", {}).items():
        before = facts["pvap_before"][vertical]
        if after is not None and before is not None and vertical not in regrouping.kept:
            print(f"{config.name}: AP of {vertical} on val {before:.4f} before, {after:.4f} after")


def _find_new_leaves(regrouping: Regrouping) -> list[str]:
    before, after = regrouping.before, regrouping.after
    ids = [after.class_of_output(output).id for output in np.flatnonzero(after.is_leaf)]
    return [class_id for class_id in ids if not before.is_leaf[before.output(class_id)]]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
