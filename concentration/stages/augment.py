"""`concentrate augment`: a trained network grows auxiliary heads for groups of its classes (Warde-Farley et al. 2014)."""

from typing import Annotated, Literal

import numpy as np
import pydantic
import torch

from concentration import distributed
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.views import ViewConfig
from concentration.errors import ConfigError
from concentration.grouping.class_groups import ClassGroups
from concentration.networks.augmented import augment as grow
from concentration.networks.augmented import choose_widths
from concentration.networks.auxiliary_heads import HeadConfig, HeadsConfig
from concentration.networks.cost import count_multiply_adds, count_parameters
from concentration.networks.student import Student
from concentration.networks.top_layers import Layer
from concentration.schema import Config, FolderName
from concentration.stages.folders import STUDENTS
from concentration.stages.groupings import load_grouping
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.run_directory import RunDirectory
from concentration.stages.train_network import Task, TrainingStageConfig, load_network, train_built_network


class AddedHeadsConfig(Config):
    """The heads that are added, one for each group of a grouping.

    grouping: the name of a grouping of classes.
    layer: where they begin: at the base network's features (the paper), or at the top-1 outputs.
    hidden: sizes of each head's ReLU layers; with another capacity than `equal`, about their mean over heads.
    capacity: `equal` for all heads (the paper); `classes` or `samples` sizes a head in proportion to those of its group.
    convolutions: channels of the 3x3 convolutions, on the base network's last map, that each head has before these layers.
    norm: the normalisation before each ReLU.
    """

    grouping: FolderName
    layer: Layer = "base"
    hidden: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (512, 512)
    capacity: Literal["equal", "classes", "samples"] = "equal"
    convolutions: tuple[pydantic.PositiveInt, ...] = ()
    norm: Literal["none", "layer"] = "none"


class AugmentConfig(TrainingStageConfig):
    """Writes `students/NAME/`.

    name: the name of the new network, by which it is evaluated and exported.
    network: the student or generalist to grow.
    heads: the heads that are added and trained with a new classifier, while all else is frozen; None adds none and fine-tunes
        the whole network.
    smear: smear labels to their ancestors inside the vertical.
    view: the augmentation; None takes that of the prepared data.
    """

    name: FolderName = "augmented"
    network: str = "generalist"
    heads: AddedHeadsConfig | None
    smear: bool = True
    view: ViewConfig | None = None

    @pydantic.model_validator(mode="after")
    def _check_name(self):
        if self.name in ("specialists", self.network):
            raise ValueError(f"name={self.name} is another network's; give the augmented one a name of its own")
        return self

    @pydantic.model_validator(mode="after")
    def _check_trainer(self):
        for option in ("shard_head", "update_in_backward"):
            if getattr(self.trainer, option):
                raise ValueError(f"trainer.{option}=true: not for a network with auxiliary heads; set it to false")
        if self.heads is None and self.trainer.prior:
            raise ValueError("trainer.prior=true with heads=null: it would undo trained biases; set it to false")
        return self


def augment(config: AugmentConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError, DataError, DivergedError, Preempted.
    """
    distributed.start(config.trainer.accelerator, config.trainer.timeout_seconds)
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    old_path = config.workdir / STUDENTS / config.network
    upstream = {"data": fingerprint, "network": RunDirectory(old_path).load_done("concentrate student")["checkpoint"]}
    groups = None
    if config.heads is not None:
        groups, upstream["grouping"] = load_grouping(config.workdir, config.heads.grouping, taxonomy)
    directory = RunDirectory(config.workdir / STUDENTS / config.name)
    with directory.begin(config, upstream) as is_due:
        if not is_due:
            return
        old = load_network(old_path, taxonomy)
        if not isinstance(old, Student):
            raise ConfigError(f"network={config.network}: no network with layers to grow beside; name a student")
        split = load_prepared_split(config.workdir, "train", taxonomy)
        torch.manual_seed(config.seed)
        network = old.train() if groups is None else grow_heads(old.train(), config.heads, groups, split)
        if distributed.rank() == 0:
            print(_describe_growth(old, network, config))
        prepared, _, _ = load_prepared(config.workdir, DataOverrides(image_size=old.image_size, view=config.view))
        train_built_network(network, config, directory, _build_task(config, split), prepared)


def grow_heads(old: Student, config: AddedHeadsConfig, groups: ClassGroups, split: Split) -> Student:
    """The network with an untrained head for each group; what is old is frozen. Raises: ConfigError as `AuxiliaryHeads`."""
    num_samples = np.bincount(groups.group_C, weights=split.count_labels(), minlength=groups.num_groups)
    widths = choose_widths(config.hidden, config.capacity, groups.sizes, num_samples.tolist())
    heads = {
        name: HeadConfig(num_classes=size, hidden=hidden)
        for name, size, hidden in zip(groups.names, groups.sizes, widths, strict=True)
    }
    added = HeadsConfig(layer=config.layer, heads=heads, convolutions=config.convolutions, norm=config.norm)
    return grow(old, added, torch.from_numpy(groups.group_C))


def _build_task(config: AugmentConfig, split: Split) -> Task:
    counts_C = split.count_smeared() if config.smear else split.count_labels()
    return Task(
        title=f"augment {config.name}",
        taxonomy=split.taxonomy,
        split=split,
        ordinals=range(len(split)),
        targets=LabelTargets(split, config.smear),
        counts_C=counts_C,
        frequency_C=counts_C / len(split),
    )


def _describe_growth(old: Student, network: Student, config: AugmentConfig) -> str:
    before, after = ((count_multiply_adds(n), count_parameters(n)["total"]) for n in (old, network))
    shares = [f"{new / was - 1:+.1%}" for was, new in zip(before, after, strict=True)]
    return (
        f"augment {config.name}: multiply-adds {before[0]:,} -> {after[0]:,} ({shares[0]}), "
        f"parameters {before[1]:,} -> {after[1]:,} ({shares[1]})"
    )
