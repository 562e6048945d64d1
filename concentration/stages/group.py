"""`concentrate group method=...`: finds groups of classes or samples from the outputs or features of a trained network."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pydantic

from concentration import distributed
from concentration.data.split_assignment import SPLITS
from concentration.files import hash_file, write_atomically
from concentration.grouping.class_groups import ClassGroups
from concentration.schema import FolderName
from concentration.stages.folders import GROUPINGS, STUDENTS
from concentration.stages.group_classes import (
    DetectionGroupsConfig,
    FoundGroups,
    RandomGroupsConfig,
    group_by_detections,
)
from concentration.stages.group_features import FeatureGroupsConfig, group_by_features
from concentration.stages.group_picture import draw_groups
from concentration.stages.groupings import find_grouping, load_grouping
from concentration.stages.prepared import DataOverrides, has_split, load_prepared, load_prepared_split
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.sample_stream import SampleStream
from concentration.stages.train_network import load_network
from concentration.taxonomy import Taxonomy

#: The files in `groupings/NAME/` that describe the groups of classes, as a text and as a picture.
SUMMARY_TEXT, SUMMARY_PICTURE = "summary.txt", "summary.png"

Method = Annotated[
    DetectionGroupsConfig | RandomGroupsConfig | FeatureGroupsConfig, pydantic.Field(discriminator="kind")
]


class GroupConfig(StageConfig):
    """Writes `groupings/NAME.json`, a taxonomy whose verticals are the groups, and other files to `groupings/NAME/`.

    name: the name of the grouping; None takes that of the method.
    seed: of what is drawn: samples that are looked at, first centres, random groups.
    method: how the groups are found; `features` also assigns every sample to a group.
    accelerator: the kind of device that runs the network.
    batch_size: how many images the network sees at a time.
    num_workers: processes that decode images; 0 decodes in the process itself.
    timeout_seconds: how long processes wait for one that is dead or hangs, before all end with an error.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {
        "accelerator", "num_workers", "timeout_seconds"
    }  # fmt: skip

    name: FolderName | None = None
    seed: int = 0
    method: Method
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0
    timeout_seconds: pydantic.PositiveFloat = 600

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.workdir / GROUPINGS / (self.name or self.method.kind))


def group(config: GroupConfig) -> None:
    """Runs the stage.

    Raises:
        ConfigError: the network does not exist or has not finished, or there are too few classes or samples for the groups.
        DataError: the network was made for another taxonomy, or too few classes have any similarity.
    """
    distributed.start(config.accelerator, config.timeout_seconds)
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    made_from = _identify(config)
    with config.directory.begin(config, {"data": fingerprint, **made_from}) as is_due:
        if is_due:
            found = _find_groups(config, taxonomy, made_from)
            if distributed.rank() == 0:
                _save(config.directory, found)


def _identify(config: GroupConfig) -> dict[str, str]:
    """What the groups are made from, by which a finished grouping is recognised as out of date: the hash of a file."""
    if config.method == RandomGroupsConfig(of=None):
        return {}  # the data's fingerprint says which verticals it has
    if isinstance(config.method, RandomGroupsConfig):
        name = config.method.of
        return {"grouping": find_grouping(config.workdir, name).load_done(f"concentrate group name={name}")["grouping"]}
    network = RunDirectory(config.workdir / STUDENTS / config.method.network)
    return {"network": network.load_done(f"concentrate student name={config.method.network}")["checkpoint"]}


def _find_groups(config: GroupConfig, taxonomy: Taxonomy, made_from: Mapping[str, str]) -> FoundGroups:
    """Runs the configured method."""
    method, path = config.method, config.directory.path
    if isinstance(method, RandomGroupsConfig):
        if method.of is None:
            groups = ClassGroups.build(taxonomy.vertical_of_output, taxonomy)
        else:
            groups, _ = load_grouping(config.workdir, method.of, taxonomy)
        return FoundGroups(groups.permute(config.seed), None, {})
    if isinstance(method, DetectionGroupsConfig):
        split = load_prepared_split(config.workdir, method.split, taxonomy)
        return group_by_detections(method, _open_stream(config, taxonomy), split, path, config.seed)
    splits = {
        name: load_prepared_split(config.workdir, name, taxonomy) for name in SPLITS if has_split(config.workdir, name)
    }
    stream = _open_stream(config, taxonomy)
    groups, facts = group_by_features(method, stream, splits, path, config.seed, made_from["network"])
    return FoundGroups(groups, None, facts)


def _open_stream(config: GroupConfig, taxonomy: Taxonomy) -> SampleStream:
    network = load_network(config.workdir / STUDENTS / config.method.network, taxonomy)
    network = network.to(distributed.choose_device(config.accelerator))
    return SampleStream(network, config.batch_size, config.num_workers)


def _save(directory: RunDirectory, found: FoundGroups) -> None:
    """Writes the taxonomy, the summary and the picture, and marks the grouping as finished."""
    groups, path = found.groups, directory.path.with_name(f"{directory.path.name}.json")
    summary = groups.describe()
    write_atomically(path, groups.build_taxonomy().to_json())
    write_atomically(directory.path / SUMMARY_TEXT, summary)
    write_atomically(directory.path / SUMMARY_PICTURE, draw_groups(groups, found.similarity))
    print(f"{summary}\n{path}: {groups.num_groups} groups of classes")
    facts = {"purity": round(groups.compute_purity(), 4), "num_placed": groups.num_placed, **found.facts}
    directory.finish(
        {"grouping": hash_file(path), "num_groups": groups.num_groups, "sizes": list(groups.sizes), **facts}
    )
