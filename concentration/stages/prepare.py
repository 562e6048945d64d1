"""`concentrate prepare`: images and a taxonomy become shards and their index."""

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic

from concentration.data.index import Split, check_keys, index_shard, load_split
from concentration.data.order import permutation
from concentration.data.shards import write_shard
from concentration.data.sources import DataConfig, build_source
from concentration.data.sources.source import SPLITS, Item, Source
from concentration.data.sources.webdataset_shards import ShardsConfig, list_shards, load_shards_taxonomy
from concentration.data.views import Share, ViewConfig
from concentration.errors import DataError
from concentration.progress import Progress
from concentration.schema import Config, parse_config
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.targets import write_atomically
from concentration.taxonomy import Taxonomy

SHARDS = "shards"


class PrepareConfig(StageConfig):
    """Reads `data`; writes `shards/` with shards of at most `samples_per_shard`, their index, and `taxonomy.json`."""

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {"num_processes"}

    data: DataConfig
    samples_per_shard: pydantic.PositiveInt = 4000
    max_skipped_share: Share = 0.001
    num_processes: pydantic.PositiveInt | None = None


def prepare(config: PrepareConfig) -> None:
    """Runs the stage; what an earlier run wrote whole is kept.

    Raises:
        DataError: the source is not what it should be, too many images cannot be decoded, two samples share a key, or a
            vertical has no training image.
    """
    directory = RunDirectory(config.workdir / SHARDS)
    with directory.begin(config, upstream={}) as is_due:
        if not is_due:
            return
        if isinstance(config.data, ShardsConfig):
            taxonomy = load_shards_taxonomy(config.data)
            write_atomically(directory.path / "taxonomy.json", taxonomy.to_json())
            _index_given_shards(config.data, directory.path, taxonomy, config.num_processes)
        else:
            source = build_source(config.data)
            taxonomy = source.build_taxonomy()
            write_atomically(directory.path / "taxonomy.json", taxonomy.to_json())
            _write_shards(source, config, directory.path, taxonomy)
        directory.finish(_summarise(directory.path, taxonomy))


class PreparedData(Config):
    """What `prepare` fixed and later stages need."""

    image_size: int
    view: ViewConfig


class DataOverrides(Config):
    """Changes of the prepared data's defaults for one stage: the size of the network's input, and augmentation."""

    image_size: pydantic.PositiveInt | None = None
    view: ViewConfig | None = None


def load_prepared(workdir: Path, overrides: DataOverrides) -> tuple[PreparedData, Taxonomy, str]:
    """Image size and augmentation, the taxonomy, and the fingerprint of the shards.

    Raises:
        ConfigError: `prepare` has not finished.
        DataError: the taxonomy is not the one that the shards were prepared with.
    """
    directory = RunDirectory(workdir / SHARDS)
    done = directory.load_done("concentrate prepare")
    taxonomy = Taxonomy.load(directory.path / "taxonomy.json")
    if taxonomy.fingerprint != done["taxonomy"]:
        raise DataError(
            f"{directory.path}/taxonomy.json: changed since `concentrate prepare`; restore it or prepare again"
        )
    data = directory.load_config()["data"]
    values = {"image_size": data["image_size"], "view": data["view"], **overrides.model_dump(exclude_none=True)}
    return parse_config(PreparedData, values), taxonomy, done["fingerprint"]


def _write_shards(source: Source, config: PrepareConfig, path: Path, taxonomy: Taxonomy) -> None:
    tasks, num_items, sizes = [], 0, {}
    for split in SPLITS:
        items = source.list_items(split)
        num_items += len(items)
        for number, chunk in enumerate(_balance(items, config.samples_per_shard)):
            shard = path / f"{split}-{number:06d}.tar"
            tasks.append(functools.partial(_write_and_index, shard, chunk, source, taxonomy))
            sizes[shard] = len(chunk)
    with Progress("prepare", num_items, "images", path) as progress:
        _run_all(tasks, list(sizes.values()), config.num_processes, progress)
    skipped = [line for shard in sizes for line in shard.with_suffix(".skipped").read_text().splitlines()]
    write_atomically(path / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    if len(skipped) > config.max_skipped_share * num_items:
        raise DataError(
            f"{len(skipped)} of {num_items} images cannot be decoded, more than max_skipped_share={config.max_skipped_share}; "
            f"they are listed in {path}/skipped.txt: repair or remove them; the first: {skipped[0]}"
        )


def _balance(items: Sequence[Item], samples_per_shard: int) -> list[list[Item]]:
    """Items in an order that mixes the classes, cut into shards whose sizes differ by one at most."""
    num_shards = -(-len(items) // samples_per_shard)
    shuffled = [items[place] for place in permutation(len(items), 0)]
    bounds = [len(items) * number // num_shards for number in range(num_shards + 1)] if num_shards else [0]
    return [shuffled[start:stop] for start, stop in itertools.pairwise(bounds)]


def _write_and_index(shard: Path, items: Sequence[Item], source: Source, taxonomy: Taxonomy) -> None:
    if shard.with_suffix(".skipped").exists():  # written last: the shard is whole
        return
    write_shard(shard, items, source)
    if shard.exists():
        index_shard(shard, taxonomy, shard.name).save(shard.with_suffix(".index"))


def _index_given_shards(config: ShardsConfig, path: Path, taxonomy: Taxonomy, num_processes: int | None) -> None:
    tasks = []
    for split in SPLITS:
        for number, shard in enumerate(list_shards(config, split)):
            tasks.append(functools.partial(_index_given_shard, shard, path / f"{split}-{number:06d}.index", taxonomy))
    with Progress("index", len(tasks), "shards", path) as progress:
        _run_all(tasks, [1] * len(tasks), num_processes, progress)


def _index_given_shard(shard: Path, index_path: Path, taxonomy: Taxonomy) -> None:
    if not index_path.exists():
        index_shard(shard, taxonomy, str(shard.resolve())).save(index_path)


def _run_all(tasks: Sequence[Callable], sizes: Sequence[int], num_processes: int | None, progress: Progress) -> None:
    """Runs tasks in processes; the first error ends all."""
    context = multiprocessing.get_context("forkserver")
    num_processes = min(num_processes or os.cpu_count() or 1, len(tasks))
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        size_of = {pool.submit(task): size for task, size in zip(tasks, sizes, strict=True)}
        try:
            for future in concurrent.futures.as_completed(size_of):
                future.result()
                progress.advance(size_of[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _summarise(path: Path, taxonomy: Taxonomy) -> dict:
    """Loads every split, checks what only the whole shows, and counts."""
    facts: dict = {"taxonomy": taxonomy.fingerprint, "splits": {}}
    for name in SPLITS:
        if name != "train" and not any(path.glob(f"{name}-*.index")):
            continue
        split = load_split(path, name, taxonomy)
        check_keys(split)
        facts["splits"][name] = _count(split)
        if name == "train":
            facts["fingerprint"] = split.fingerprint
    for vertical, count in facts["splits"]["train"]["by_vertical"].items():
        if count == 0:
            raise DataError(
                f"{path}: vertical '{vertical}' has no training image; add some, or remove it from the taxonomy"
            )
    return facts


def _count(split: Split) -> dict:
    counts = split.count_labels()
    return {
        "samples": len(split),
        "shards": len(split.shards),
        "classes_with_images": int(np.count_nonzero(counts)),
        "by_vertical": {vertical: len(split.routed(vertical)) for vertical in split.taxonomy.verticals},
    }
