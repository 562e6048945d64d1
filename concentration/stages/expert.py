"""`concentrate teacher group=ID`: the expert of one group of samples, over all classes (Gross, Ranzato and Szlam 2017).

Experts do not depend on each other, so like teachers they can be trained at the same time, on any machines.

Shapes: C all classes.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pydantic

from concentration import distributed
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.errors import ConfigError, DataError
from concentration.stages.folders import TEACHERS
from concentration.stages.groupings import identify_sample_groups, load_router, load_sample_groups
from concentration.stages.plan import count_most_labels, print_training_plan
from concentration.stages.prepared import has_split, load_prepared, load_prepared_split
from concentration.stages.run_directory import RunDirectory
from concentration.stages.train_network import (
    LabelsConfig,
    NetworkStageConfig,
    Task,
    find_fine,
    identify_base_checkpoint,
    train_network,
)
from concentration.taxonomy import Taxonomy
from concentration.training.memory import StepShape

#: The grouping to which `group=3` belongs.
DEFAULT_GROUPING = "features"


class ExpertConfig(NetworkStageConfig, LabelsConfig):
    """Trains on the samples of one group; writes `teachers/GROUPING-NUMBER/`.

    group: its number in the grouping `features`, or GROUPING/NUMBER.
    """

    group: str
    smear: bool = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_vertical(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The composed config has both `vertical` and `group`, of which one is None."""
        if values.get("vertical") is not None:
            raise ValueError(
                f"vertical={values['vertical']} with group={values.get('group')}: a specialist learns a vertical's classes, an "
                "expert a group's samples; give one of them"
            )
        return {name: value for name, value in values.items() if name != "vertical"}

    @pydantic.field_validator("group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> str:
        text = f"{DEFAULT_GROUPING}/{value}" if re.fullmatch(r"\d+", str(value)) else str(value)
        if not re.fullmatch(r"[^/]+/\d+", text):
            raise ValueError("expected the number of a group, or GROUPING/NUMBER")
        return text

    @property
    def grouping(self) -> str:
        return self.group.partition("/")[0]

    @property
    def number(self) -> int:
        return int(self.group.partition("/")[2])


def name_expert(grouping: str, number: int) -> str:
    """The name of its run directory under `teachers/`."""
    return f"{grouping}-{number}"


def train_expert(config: ExpertConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: there is no such grouping or group.
        DataError: the group has no training sample.
        DivergedError, Preempted: as `training.fit.fit`.
    """
    prepared, taxonomy, fingerprint = load_prepared(config.workdir, config.data)
    name = name_expert(config.grouping, config.number)
    num_groups = load_router(config.workdir, config.grouping).num_groups
    if config.number >= num_groups:
        raise ConfigError(f"group={config.group}: the grouping has the groups 0 to {num_groups - 1}; give one of them")
    if config.plan:
        shape = describe_step(config, taxonomy)
        print_training_plan(config, f"expert {name}", taxonomy, prepared.image_size, shape)
        return
    distributed.start(config.trainer.accelerator, config.trainer.timeout_seconds)
    directory = RunDirectory(config.workdir / TEACHERS / name)
    groups = identify_sample_groups(config.workdir, config.grouping)
    upstream = {"data": fingerprint, "grouping": groups, **identify_base_checkpoint(config)}
    with directory.begin(config, upstream) as is_due:
        if is_due:
            split = load_prepared_split(config.workdir, "train", taxonomy)
            train_network(config, directory, _describe_task(config, split), prepared)


def describe_step(config: ExpertConfig, taxonomy: Taxonomy) -> StepShape:
    """What a step's memory depends on besides the network."""
    return StepShape(count_most_labels(taxonomy, config.smear))


def _describe_task(config: ExpertConfig, split: Split) -> Task:
    ordinals = _find_members(config, split)
    if config.coarse_labels == "skip":
        ordinals = np.intersect1d(ordinals, find_fine(split), assume_unique=True)
    if not len(ordinals):
        raise DataError(
            f"group={config.group}: no training sample is in it that training may use; make a grouping with fewer groups, or "
            "method.balanced=true, or set coarse_labels=use"
        )
    val_ordinals = None
    if has_split(config.workdir, "val"):
        val_ordinals = _find_members(config, load_prepared_split(config.workdir, "val", split.taxonomy))
    counts_C = split.count_in(ordinals, config.smear)
    return Task(
        title=f"expert {name_expert(config.grouping, config.number)}",
        taxonomy=split.taxonomy,
        split=split,
        ordinals=ordinals,
        targets=LabelTargets(split, config.smear),
        counts_C=counts_C,
        frequency_C=counts_C / len(ordinals),
        val_ordinals=val_ordinals,
    )


def _find_members(config: ExpertConfig, split: Split) -> np.ndarray:
    """Ordinals of the split's samples that are in the group, rising."""
    return np.flatnonzero(load_sample_groups(config.workdir, config.grouping, split) == config.number)
