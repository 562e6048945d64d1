"""Shards that were given: listed, compared with what was indexed of them before, and indexed where they lie."""

import functools
from collections.abc import Mapping
from pathlib import Path

from concentration.data.appending import Before
from concentration.data.image_hashes import hash_shard
from concentration.data.index import ShardIndex, index_shard
from concentration.data.remote import Location, Remote
from concentration.data.shard_cache import ShardCache, save_access
from concentration.data.shard_members import LabelMember
from concentration.data.sources.webdataset_shards import ShardsConfig, check_owners, index_given_shard, list_shards
from concentration.data.split_assignment import SPLITS
from concentration.errors import DataError
from concentration.progress import Progress
from concentration.stages.task_pool import run_tasks
from concentration.taxonomy import Taxonomy


def list_given_shards(config: ShardsConfig, path: Path, before: Before | None) -> dict[Path, Location]:
    """All shards by the path of their index in `path`: those that were there keep theirs, new ones come after them.

    Raises:
        DataError: a shard belongs to two splits, or is gone or has another size.
    """
    shards_of = {split: list_shards(config, split) for split in SPLITS}
    check_owners(config, shards_of)
    located: dict[Path, Location] = {}
    for split, shards in shards_of.items():
        num_kept = 0 if before is None else before.next_shard[split]
        kept = [str(ShardIndex.load(_name_index(path, split, number)).path) for number in range(num_kept)]
        by_record = {_record(shard): shard for shard in shards}
        for number, recorded in enumerate(kept):
            if recorded not in by_record:
                raise DataError(
                    f"{recorded}: was indexed, and is not among what data.{split}={getattr(config, split)} finds in "
                    f"{config.path}; bring it back, or prepare without it in another workdir"
                )
            located[_name_index(path, split, number)] = by_record[recorded]
        known = set(kept)
        new = [shard for shard in shards if _record(shard) not in known]
        located |= {_name_index(path, split, number): shard for number, shard in enumerate(new, num_kept)}
    return located


def check_kept_shards(
    kept: Mapping[Path, Location], config: ShardsConfig, taxonomy: Taxonomy, num_processes: int | None
) -> None:
    """Checks that shards are as they were indexed: of remote ones their size, of others what has changed since.

    Raises:
        DataError: naming the shard that is not.
    """
    remote = config.access.build_remote() if config.is_remote else None
    tasks = [functools.partial(_check_kept, shard, index, taxonomy, config, remote) for index, shard in kept.items()]
    with Progress("check", len(tasks), "shards") as progress:
        run_tasks(tasks, [1] * len(tasks), num_processes, progress)


def index_given_shards(
    located: Mapping[Path, Location],
    config: ShardsConfig,
    path: Path,
    taxonomy: Taxonomy,
    is_hashed: bool,
    num_processes: int | None,
) -> None:
    """Writes the indices that are not there, and the hashes of images where they are asked for.

    Raises:
        DataError: a shard is not what it should be, or cannot be had.
    """
    cache = None
    if config.is_remote:
        save_access(config.access, path)
        cache = config.access.build_cache(path.parent)
    tasks = [
        functools.partial(_index_and_hash, shard, index, taxonomy, config.labels, cache, is_hashed)
        for index, shard in located.items()
    ]
    with Progress("index", len(tasks), "shards", path) as progress:
        run_tasks(tasks, [1] * len(tasks), num_processes, progress)


def describe_state(shard: Location) -> str:
    """A remote shard that changes before the end is found out when it is read: its index holds checksums."""
    if isinstance(shard, str):
        return shard
    state = shard.stat()
    return f"{shard} {state.st_size} {state.st_mtime_ns}"


def _name_index(path: Path, split: str, number: int) -> Path:
    return path / f"{split}-{number:06d}.index"


def _record(shard: Location) -> str:
    """As its index has it."""
    return shard if isinstance(shard, str) else str(shard.resolve())


def _check_kept(
    shard: Location, index_path: Path, taxonomy: Taxonomy, config: ShardsConfig, remote: Remote | None
) -> None:
    index = ShardIndex.load(index_path)
    if isinstance(shard, str):
        is_same = remote.size(shard) == index.size_bytes
    elif shard.stat().st_ctime_ns < index_path.stat().st_mtime_ns:
        is_same = True  # no one can set the time of a change, so nothing has to be read
    else:
        is_same = index_shard(shard, taxonomy, _record(shard), config.labels).digest == index.digest
    if not is_same:
        raise DataError(
            f"{shard}: has changed since it was indexed; bring it back, or prepare everything anew with overwrite=true"
        )


def _index_and_hash(
    shard: Location, index: Path, taxonomy: Taxonomy, labels: LabelMember, cache: ShardCache | None, is_hashed: bool
) -> None:
    index_given_shard(shard, index, taxonomy, labels, cache)
    if is_hashed:
        hash_shard(index, cache)
