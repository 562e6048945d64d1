"""Loads the finished groupings of a working directory, for the verbs that build on one.

Shapes: N samples of a split.
"""

from pathlib import Path

import numpy as np

from concentration.data.split import Split
from concentration.errors import ConfigError, DataError
from concentration.files import check_unchanged
from concentration.grouping.class_groups import ClassGroups, load_class_groups
from concentration.grouping.sample_groups import (
    CENTROIDS_FILE,
    CentroidRouter,
    hash_group_ids,
    load_group_ids,
)
from concentration.schema import hash_values
from concentration.stages.folders import GROUPINGS
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory
from concentration.taxonomy import Taxonomy

_SINCE = "`concentrate group` made it; bring it back, or group again with overwrite=true"


def find_grouping(workdir: Path, name: str) -> RunDirectory:
    """The run directory of a finished grouping. Raises: ConfigError if there is no such grouping, or it has not finished."""
    directory = RunDirectory(workdir / GROUPINGS / name)
    if not directory.path.is_dir():
        have = sorted(path.name for path in (workdir / GROUPINGS).glob("*") if path.is_dir()) or ["none"]
        raise ConfigError(
            f"no grouping {name!r} in {workdir} (there: {', '.join(have)}); run `concentrate group` first"
        )
    directory.load_done(f"concentrate group name={name}")
    return directory


def load_grouping(workdir: Path, name: str, taxonomy: Taxonomy) -> tuple[ClassGroups, str]:
    """The groups of classes of a grouping, and a hash of their file.

    Raises:
        ConfigError: there is no such grouping, or it has not finished.
        DataError: the grouping is of other classes than `taxonomy`, or its file has changed.
    """
    directory = find_grouping(workdir, name)
    path = directory.path.with_name(f"{name}.json")
    done = directory.load_done(f"concentrate group name={name}", grouping=str)
    check_unchanged(path, done["grouping"], _SINCE)
    return load_class_groups(taxonomy, Taxonomy.load(path), str(path)), done["grouping"]


def load_router(workdir: Path, name: str) -> CentroidRouter:
    """The router that assigns features to the groups of a grouping of samples.

    Raises:
        ConfigError: there is no such grouping, or it has only groups of classes.
        DataError: the file of its centroids has changed.
    """
    directory = find_grouping(workdir, name)
    made = directory.load_done(f"concentrate group name={name}").get("centroids")
    path = directory.path / CENTROIDS_FILE
    if made is None:
        raise ConfigError(
            f"grouping {name!r} has groups of classes alone; make one with `concentrate group method=features`"
        )
    check_unchanged(path, made, _SINCE)
    return CentroidRouter.load(path)


def load_sample_groups(workdir: Path, name: str, split: Split) -> np.ndarray:
    """(N,) int32: the group of every sample of the split; -1 if its image cannot be decoded.

    Raises:
        ConfigError: as `load_router`.
        DataError: as `load_router`; or the grouping is of other samples, or a file of groups has changed.
    """
    router, directory = load_router(workdir, name), RunDirectory(workdir / GROUPINGS / name)
    num_samples = np.diff(split.shard_start).tolist()
    group_N = load_group_ids(directory.path, split.index_names, num_samples, router.num_groups)
    done = directory.load_done(f"concentrate group name={name}")
    made = as_mapping(done.get("sample_groups")).get(split.name)  # earlier versions recorded none
    if made is not None and hash_group_ids(group_N) != made:
        raise DataError(f"{directory.path}/{split.name}-*.safetensors: changed since {_SINCE}")
    return group_N


def identify_sample_groups(workdir: Path, name: str) -> str:
    """A hash of the groups of classes and of the centroids, by which a network records which groups it was trained on."""
    done = find_grouping(workdir, name).load_done(f"concentrate group name={name}")
    return hash_values({key: done.get(key) for key in ("grouping", "centroids")})
