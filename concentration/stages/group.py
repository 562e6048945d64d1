"""`concentrate group method=...`: groups of classes or of samples, found by what a trained network says of them."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic

from concentration import distributed
from concentration.data.index import Split, load_split
from concentration.data.splits import SPLITS
from concentration.errors import ConfigError
from concentration.grouping.class_groups import ClassGroups, load_class_groups
from concentration.grouping.sample_groups import CENTROIDS_FILE, CentroidRouter, load_group_ids
from concentration.schema import hash_values
from concentration.stages.group_features import FeatureGroupsConfig, group_by_features
from concentration.stages.prepare import SHARDS, DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory, StageConfig, hash_file
from concentration.stages.sample_stream import SampleStream
from concentration.stages.student import STUDENTS
from concentration.stages.train_network import load_network
from concentration.targets import write_atomically
from concentration.taxonomy import Taxonomy

GROUPINGS = "groupings"
#: In `groupings/NAME/`: the groups of classes, to be read and to be looked at.
SUMMARY_TEXT = "summary.txt"

Method = Annotated[FeatureGroupsConfig, pydantic.Field(discriminator="kind")]


class GroupConfig(StageConfig):
    """Writes `groupings/NAME.json`, the classes with their groups as verticals, and what belongs to it in `groupings/NAME/`.

    name: of the grouping; the method's where it is not given.
    method: how the groups are found; `features` also gives a group to every sample.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {
        "accelerator", "num_workers", "timeout_seconds"
    }  # fmt: skip

    name: str | None = None
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
        ConfigError: the network is not there, or not one of ours; more groups are asked for than can be.
        DataError: the network was made for another taxonomy.
    """
    distributed.start("nccl" if config.accelerator == "gpu" else "gloo", config.timeout_seconds)
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    network = _identify_network(config)
    with config.directory.begin(config, {"data": fingerprint, "network": network}) as is_due:
        if not is_due:
            return
        shards = config.workdir / SHARDS
        splits = {name: load_split(shards, name, taxonomy) for name in SPLITS if any(shards.glob(f"{name}-*.index"))}
        groups, facts = group_by_features(
            config.method, _open_stream(config, taxonomy), splits, config.directory.path, config.seed, network
        )
        if distributed.rank() == 0:
            _save(config.directory, groups, facts)


def _identify_network(config: GroupConfig) -> str:
    """A hash of the file of the network that is asked."""
    network = RunDirectory(config.workdir / STUDENTS / config.method.network)
    return network.load_done(f"concentrate student name={config.method.network}")["checkpoint"]


def _open_stream(config: GroupConfig, taxonomy: Taxonomy) -> SampleStream:
    network = load_network(config.workdir / STUDENTS / config.method.network, taxonomy)
    network = network.to(distributed.choose_device(config.accelerator))
    return SampleStream(network, config.batch_size, config.num_workers)


def _save(directory: RunDirectory, groups: ClassGroups, facts: dict) -> None:
    path = directory.path.with_name(f"{directory.path.name}.json")
    summary = groups.describe()
    write_atomically(path, groups.build_taxonomy().to_json())
    write_atomically(directory.path / SUMMARY_TEXT, summary)
    print(f"{summary}\n{path}: {groups.num_groups} groups of classes")
    directory.finish(
        {"grouping": hash_file(path), "num_groups": groups.num_groups, "sizes": list(groups.sizes), **facts}
    )


def find_grouping(workdir: Path, name: str) -> RunDirectory:
    """The finished grouping of this name. Raises: ConfigError, naming those that are there."""
    directory = RunDirectory(workdir / GROUPINGS / name)
    if not directory.path.is_dir():
        have = sorted(path.name for path in (workdir / GROUPINGS).glob("*") if path.is_dir()) or ["none"]
        raise ConfigError(
            f"no grouping {name!r} in {workdir} (there: {', '.join(have)}); run `concentrate group` first"
        )
    directory.load_done(f"concentrate group name={name}")
    return directory


def load_grouping(workdir: Path, name: str, taxonomy: Taxonomy) -> tuple[ClassGroups, str]:
    """The groups of classes, and a hash of their file.

    Raises:
        ConfigError: there is none, or it has not finished.
        DataError: it is of other classes.
    """
    path = find_grouping(workdir, name).path.with_name(f"{name}.json")
    return load_class_groups(taxonomy, Taxonomy.load(path), str(path)), hash_file(path)


def load_router(workdir: Path, name: str) -> CentroidRouter:
    """The rule that says of features which group of samples they belong to.

    Raises:
        ConfigError: there is no such grouping, or it is one of classes alone.
    """
    path = find_grouping(workdir, name).path / CENTROIDS_FILE
    if not path.exists():
        raise ConfigError(
            f"grouping {name!r} has groups of classes alone; make one with `concentrate group method=features`"
        )
    return CentroidRouter.load(path)


def load_sample_groups(workdir: Path, name: str, split: Split) -> np.ndarray:
    """(N,) int32: the group of every sample of the split, -1 where its image cannot be decoded.

    Raises:
        ConfigError: as `load_router`.
        DataError: it is of other samples.
    """
    router, directory = load_router(workdir, name), workdir / GROUPINGS / name
    num_samples = np.diff(split.shard_start).tolist()
    return load_group_ids(directory, split.index_names, num_samples, router.num_groups)


def identify_sample_groups(workdir: Path, name: str) -> str:
    """A hash of the rule and of what it was applied to, for those who train on its groups."""
    done = find_grouping(workdir, name).load_done(f"concentrate group name={name}")
    return hash_values({key: done.get(key) for key in ("grouping", "centroids")})
