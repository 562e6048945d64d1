"""`concentrate prepare`: images and a taxonomy become shards and their index."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pydantic

from concentration.data.appending import Before, Kept, append_classes, extend_classes, find_kept
from concentration.data.image_hashes import hash_shard
from concentration.data.index import ShardIndex, index_shard
from concentration.data.near_duplicates import MaxDistance
from concentration.data.order import permutation
from concentration.data.packs import PACK_SUFFIX, write_pack
from concentration.data.shard_cache import save_access
from concentration.data.shards import write_shard
from concentration.data.sources import DataConfig, build_source, list_places
from concentration.data.sources.glyph_scenes import GlyphScenesConfig
from concentration.data.sources.glyphs import GlyphsConfig
from concentration.data.sources.glyphs_100k.source import Glyphs100kConfig
from concentration.data.sources.source import Item, Source
from concentration.data.sources.webdataset_shards import ShardsConfig, load_shards_taxonomy
from concentration.data.split import Split, check_keys, load_split
from concentration.data.split_assignment import SPLITS, Assignment, assign_splits
from concentration.data.views import Share
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.progress import Progress
from concentration.stages.folders import SHARDS
from concentration.stages.prepare_given_shards import (
    check_kept_shards,
    describe_state,
    index_given_shards,
    list_given_shards,
)
from concentration.stages.prepare_listing import (
    begin_listing,
    check_training_images,
    forget,
    index_keys,
    keeping,
    reopen,
    settle_skipped,
)
from concentration.stages.prepare_near_duplicates import forget_near_duplicates, hash_splits, report_near_duplicates
from concentration.stages.prepare_needs import Need, check_needs
from concentration.stages.prepare_summary import draw_summary, summarise_splits
from concentration.stages.prepared import DataOverrides, describe_splits, has_split, load_prepared
from concentration.stages.replaced import forget_replaced
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.task_pool import run_tasks
from concentration.taxonomy import Taxonomy

#: In `shards/`: how many classes and images there are, as a table and as a picture.
SUMMARY_TEXT, SUMMARY_PICTURE = "summary.txt", "summary.png"

# On a terminal the summary has a line for each vertical, up to so many.
_MAX_VERTICALS_SHOWN = 20


class PrepareConfig(StageConfig):
    """Reads `data`; writes `shards/` with shards of at most `samples_per_shard`, their index, and `taxonomy.json`.

    data: where images and taxonomy come from.
    append: list the source again, and add new images and classes to a finished set; without it a finished set is left alone.
        Every sample, position and split that was there stays. For given shards, new tars are indexed after the others, and new
        classes must be at the end of their taxonomy.json.
    samples_per_shard: how many images a shard holds at most.
    max_skipped_share: the share of images that may be undecodable; a single one is always allowed.
    needs: what later stages of a `run` need; the stage fails where it is missing.
    num_processes: None means one per core.
    """

    runtime_fields: ClassVar[frozenset[str]] = StageConfig.runtime_fields | {
        "append", "num_processes", "max_skipped_share", "needs"
    }  # fmt: skip

    data: DataConfig
    append: bool = False
    samples_per_shard: pydantic.PositiveInt = 4000
    max_skipped_share: Share = 0.001
    needs: tuple[Need, ...] = ()
    num_processes: pydantic.PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _check_append(self):
        if self.append and self.overwrite:
            raise ValueError(
                "append=true and overwrite: one keeps what is there, the other replaces it; give one of them"
            )
        return self

    @property
    def places(self) -> dict[str, str]:
        return {} if self.append else list_places(self.data)

    @property
    def near_duplicates(self) -> MaxDistance | None:
        """How alike near-duplicates are; None for drawn data, where they are known: the same character in another typeface."""
        is_drawn = isinstance(self.data, GlyphsConfig | Glyphs100kConfig | GlyphScenesConfig)
        return None if is_drawn else self.data.near_duplicates


def prepare(config: PrepareConfig) -> None:
    """Runs the stage. Files that an earlier run has finished are kept if the source still lists the same images.

    Raises:
        ConfigError: the given shards lie where this stage writes, or `needs` are not met.
        DataError: the source is malformed, too many images cannot be decoded, two samples share a key, or a vertical has no
            training image.
    """
    directory = RunDirectory(config.workdir / SHARDS)
    if isinstance(config.data, ShardsConfig) and _is_same_folder(config.data, directory.path):
        raise ConfigError(
            f"data.path={config.data.path}: is what `prepare` writes to, and clears with overwrite=true; "
            "move your shards to a folder of their own, they are used where they lie"
        )
    is_to_look_anew = directory.is_finished and not _has_looked(config, directory)
    with directory.begin(config, upstream={}, is_growing=config.append or is_to_look_anew) as is_due:
        if directory.is_finished and isinstance(config.data, ShardsConfig) and config.data.is_remote:
            save_access(config.data.access, directory.path)  # the cache may be moved or enlarged at any time
        if is_due and (config.append or not directory.is_finished):
            if isinstance(config.data, ShardsConfig):
                _prepare_given_shards(config.data, config, directory)
            else:
                _prepare_source(build_source(config.data), config, directory)
            directory.note_places(config)
        if is_due and not _has_looked(config, directory):
            _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
            directory.finish(_summarise(config, directory.path, taxonomy))
    check_needs(directory.path, config.needs)


def _has_looked(config: PrepareConfig, directory: RunDirectory) -> bool:
    """Whether the finished set has been searched for near-duplicates as `config` asks."""
    looked = directory.load_done("concentrate prepare").get("near_duplicates")
    return config.near_duplicates == as_mapping(looked).get("max_distance")


def _prepare_source(source: Source, config: PrepareConfig, directory: RunDirectory) -> None:
    """Writes shards of all that the source lists, or of what is new in it where a set was finished before."""
    items = source.list_items()
    item_of_key = index_keys(items)
    before, kept = _look_before(config, directory), Kept({}, 0, 0)
    if before is None:
        taxonomy = source.build_taxonomy()
    else:
        earlier = before.taxonomy(directory.path)
        taxonomy = append_classes(earlier, source.list_classes(), f"data={config.data.kind}")
        kept = find_kept(directory.path, before, taxonomy, item_of_key)
    assignment = assign_splits(items, source.split, kept.splits)
    items_of: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item, split in zip(items, assignment.splits, strict=True):
        if item.key not in kept.splits:
            items_of[split].append(item)
    for line in [
        *source.list_notes(),
        *_describe(assignment, source.split.group),
        *_describe_kept(before, kept, items_of),
        *_describe_moved(config, directory, kept),
    ]:
        print(f"prepare: {line}")
    if before is None:
        check_training_images(items_of["train"], taxonomy)
    if before is not None and directory.is_finished:
        if not any(items_of.values()) and taxonomy.num_classes == before.num_classes:
            return
        reopen(directory, before)
    with keeping(directory, before):
        _write_shards(source, items_of, len(items), config, directory, taxonomy, before)
        _finish(config, directory, taxonomy, before)


def _prepare_given_shards(data: ShardsConfig, config: PrepareConfig, directory: RunDirectory) -> None:
    """Indexes all given shards, or those that are new where a set was finished before."""
    taxonomy, before = load_shards_taxonomy(data), _look_before(config, directory)
    if before is not None:
        taxonomy = extend_classes(before.taxonomy(directory.path), taxonomy, str(data.taxonomy or data.path))
    located = list_given_shards(data, directory.path, before)
    if before is not None:
        kept = {index: shard for index, shard in located.items() if before.holds(index)}
        check_kept_shards(kept, data, taxonomy, config.num_processes)
        num_new = len(located) - len(kept)
        print(f"prepare: {len(kept)} shards are indexed already; new: {num_new}")
        if directory.is_finished:
            if not num_new and taxonomy.num_classes == before.num_classes:
                return
            reopen(directory, before)
    listing = (f"{index.stem} {describe_state(shard)}" for index, shard in located.items())
    is_hashed = config.near_duplicates is not None
    with keeping(directory, before):
        begin_listing(directory.path, taxonomy, listing, before)
        index_given_shards(located, data, directory.path, taxonomy, is_hashed, config.num_processes)
        _finish(config, directory, taxonomy, before)


def _finish(config: PrepareConfig, directory: RunDirectory, taxonomy: Taxonomy, before: Before | None) -> None:
    directory.finish(_summarise(config, directory.path, taxonomy))
    if before is not None:
        forget(directory, before)


def _look_before(config: PrepareConfig, directory: RunDirectory) -> Before | None:
    """What was finished here before and is to stay; None where nothing was."""
    if not directory.is_finished:
        return Before.load(directory.path)
    _, taxonomy, _ = load_prepared(config.workdir, DataOverrides())  # refuses what has changed since
    before = Before.look(directory.path, taxonomy)
    forget(directory, before)  # what a kill has left that struck when all was appended
    return before


def _describe(assignment: Assignment, group: str | None) -> list[str]:
    lines = []
    for split, classes in assignment.short_of.items():
        if classes:
            lines.append(
                f"{len(classes)} classes have fewer {split} images than data.split.{split}_per_class, "
                f"for they have too few groups of images: {', '.join(classes[:5])}"
            )
    if assignment.num_torn:
        lines.append(f"{assignment.num_torn} groups lie in several splits, as the source has it")
    if assignment.num_ungrouped:
        lines.append(
            f"{assignment.num_ungrouped} images have nothing as data.split.group={group}, and go to a split one by one, whatever "
            "they show"
        )
    return lines


def _describe_kept(before: Before | None, kept: Kept, items_of: dict[str, list[Item]]) -> list[str]:
    if before is None:
        return []
    new = ", ".join(f"{len(items)} {split}" for split, items in items_of.items())
    lines = [f"{len(kept.splits)} images are prepared already; new: {new}"]
    if kept.num_gone:
        lines.append(f"{kept.num_gone} prepared images are gone from the source, and stay")
    if kept.num_other_labels:
        lines.append(
            f"{kept.num_other_labels} prepared images have other labels now, and keep the old ones (overwrite=true)"
        )
    return lines


def _describe_moved(config: PrepareConfig, directory: RunDirectory, kept: Kept) -> list[str]:
    """Where the source lies elsewhere now and has images of the same names: nothing says whether they are the same images."""
    moved = [f"{key} was {earlier}" for key, earlier in directory.find_moved(list_places(config.data)).items()]
    if not moved or not kept.splits:
        return []
    return [
        f"{', '.join(moved)}: images are known by their paths in the source, and {len(kept.splits)} have the path of one that is "
        "prepared already; if they are other images, move them below a folder of another name"
    ]


def _write_shards(
    source: Source,
    items_of: dict[str, list[Item]],
    num_listed: int,
    config: PrepareConfig,
    directory: RunDirectory,
    taxonomy: Taxonomy,
    before: Before | None,
) -> None:
    path = directory.path
    listing = (f"{s} {item.key} {item.labels}" for s, items in items_of.items() for item in items)
    source.fetch()
    forget_replaced(directory.path)
    begin_listing(path, taxonomy, listing, before)
    tasks, sizes, is_hashed = [], {}, config.near_duplicates is not None
    for split, items in items_of.items():
        first = 0 if before is None else before.next_shard[split]
        for number, chunk in enumerate(_balance(items, config.samples_per_shard), first):
            shard = path / f"{split}-{number:06d}{PACK_SUFFIX if source.is_compact else '.tar'}"
            tasks.append(functools.partial(_write_and_index, shard, chunk, source, taxonomy, is_hashed))
            sizes[shard] = len(chunk)
    with Progress("prepare", sum(sizes.values()), "images", path) as progress:
        run_tasks(tasks, list(sizes.values()), config.num_processes, progress)
    settle_skipped(path, list(sizes), num_listed, config.max_skipped_share)


def _balance(items: Sequence[Item], samples_per_shard: int) -> list[list[Item]]:
    """The items, shuffled so that classes mix, and cut into shards whose sizes differ by at most one."""
    num_shards = -(-len(items) // samples_per_shard)
    shuffled = [items[place] for place in permutation(len(items), 0)]
    bounds = [len(items) * number // num_shards for number in range(num_shards + 1)] if num_shards else [0]
    return [shuffled[start:stop] for start, stop in itertools.pairwise(bounds)]


def _write_and_index(shard: Path, items: Sequence[Item], source: Source, taxonomy: Taxonomy, is_hashed: bool) -> None:
    """Writes the shard, its index, and then the list of what is missing in it, which says that the other two are whole."""
    marker, index = shard.with_suffix(".skipped"), shard.with_suffix(".index")
    if marker.exists() and _is_whole(
        index, num_expected=len(items) - len(marker.read_text(encoding="utf-8").splitlines())
    ):
        return
    if source.is_compact:
        skipped = write_pack(shard, items, source, taxonomy)
    else:
        skipped = write_shard(shard, items, source)
        if len(skipped) < len(items):
            index_shard(shard, taxonomy, shard.name).save(index)
        else:
            index.unlink(missing_ok=True)
    write_atomically(marker, "".join(f"{' '.join(line.splitlines())}\n" for line in skipped))
    if is_hashed and index.exists():
        hash_shard(index, cache=None)


def _is_whole(index: Path, num_expected: int) -> bool:
    try:
        return num_expected == 0 or ShardIndex.load(index).num_samples == num_expected
    except DataError:
        return False


def _is_same_folder(data: ShardsConfig, path: Path) -> bool:
    return isinstance(data.path, Path) and data.path.resolve() == path.resolve()


def _summarise(config: PrepareConfig, path: Path, taxonomy: Taxonomy) -> dict:
    """Loads every split, checks what only the whole shows, counts, and writes what people should know, too."""
    names = [name for name in SPLITS if name == "train" or has_split(config.workdir, name)]
    splits = {name: load_split(path, name, taxonomy) for name in names}
    for split in splits.values():
        check_keys(split)
    facts = describe_splits(splits)
    for vertical, count in facts["splits"]["train"]["by_vertical"].items():
        if count == 0:
            raise DataError(
                f"{path}: vertical '{vertical}' has no training image; add some, or remove it from the taxonomy"
            )
    summary = summarise_splits(splits)
    write_atomically(path / SUMMARY_TEXT, summary.to_text())
    write_atomically(path / SUMMARY_PICTURE, draw_summary(summary))
    print(f"\n{summary.to_text(_MAX_VERTICALS_SHOWN)}\nprepare: {path}: {SUMMARY_TEXT}, {SUMMARY_PICTURE}")
    return {**facts, "near_duplicates": _look_for_near_duplicates(config, splits)}


def _look_for_near_duplicates(config: PrepareConfig, splits: Mapping[str, Split]) -> dict | None:
    forget_near_duplicates(splits["train"].directory)
    if config.near_duplicates is None:
        return None
    hash_splits(splits, config.num_processes)
    advice = "keep images of one thing together by data.split.group"
    if isinstance(config.data, ShardsConfig):
        advice = "leave one of each pair out of the shards"
    return report_near_duplicates(splits, config.near_duplicates, advice)
