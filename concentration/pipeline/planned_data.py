"""What the plan of a run knows of its data: from the shards where they are prepared, from the source's listing where not."""

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from concentration.data.packs import PACK_SUFFIX
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.sources import build_source
from concentration.data.sources.webdataset_shards import ShardsConfig
from concentration.data.split_assignment import SPLITS, assign_splits
from concentration.data.views import ViewConfig, decode_view, draw_views
from concentration.errors import ConfigError
from concentration.pipeline.graph import RunConfig, build_prepare_job
from concentration.schema import write_override
from concentration.stages.folders import SHARDS
from concentration.stages.prepared import DataOverrides, load_prepared, load_prepared_split
from concentration.stages.run_directory import RunDirectory
from concentration.taxonomy import Taxonomy

#: Images that are read and decoded to see how long it takes.
NUM_PROBED = 64

_TAR_BLOCK = 512


@dataclass(frozen=True)
class PlannedData:
    """How many images there are, and how long one takes.

    Attributes:
        taxonomy: of all classes.
        image_size: pixels of a side.
        num_samples: by split.
        num_routed: by vertical, the training samples with a label in it.
        num_fine: by vertical, those of them with a leaf of it, and under None of all; empty with `coarse_labels=use`.
        stored_bytes: of the shards, written or to be written; 0 where given shards are used where they lie.
        write_seconds: to read an image at its source; None where that is done, or nothing is written.
        read_seconds: to decode and crop an image; None where it was not measured.
    """

    taxonomy: Taxonomy
    image_size: int
    num_samples: dict[str, int]
    num_routed: dict[str, int]
    num_fine: dict[str | None, int]
    stored_bytes: int
    write_seconds: float | None
    read_seconds: float | None


def look_at_data(config: RunConfig) -> PlannedData:
    """Reads and writes nothing but a few images.

    Raises:
        ConfigError: the shards are given and not indexed yet, or other data is prepared here and `overwrite` is false.
        DataError: the source is not what it should be.
    """
    if RunDirectory(config.workdir / SHARDS).is_finished_with(build_prepare_job(config).config):
        return _look_at_shards(config)
    if isinstance(config.data, ShardsConfig):
        raise ConfigError(
            f"plan=true with data=shards: how many images there are is known when they are indexed; run "
            f"`concentrate prepare data=shards {write_override('data.path', str(config.data.path))} "
            f"{write_override('workdir', str(config.workdir))}` first"
        )
    return _look_at_source(config)


def _look_at_shards(config: RunConfig) -> PlannedData:
    prepared, taxonomy, _ = load_prepared(config.workdir, DataOverrides())
    done = RunDirectory(config.workdir / SHARDS).load_done("concentrate prepare", splits=dict)
    facts = done["splits"]
    split = load_prepared_split(config.workdir, "train", taxonomy)
    seconds = None
    if not split.is_remote:  # a remote shard would be fetched into the cache
        reader = SampleReader(split, LabelTargets(split, smear=False), prepared.image_size, views=None, seed=0)
        places = np.linspace(0, len(split) - 1, min(NUM_PROBED, len(split)), dtype=int)
        seconds = _time_decoding([reader.read_encoded(int(o)) for o in places], prepared.view, prepared.image_size)
    is_given = isinstance(config.data, ShardsConfig)
    shards = [
        p for name in facts for p in (config.workdir / SHARDS).glob(f"{name}-*") if p.suffix in (".tar", PACK_SUFFIX)
    ]
    return PlannedData(
        taxonomy,
        prepared.image_size,
        {name: facts.get(name, {"samples": 0})["samples"] for name in SPLITS},
        facts["train"]["by_vertical"],
        {v: len(split.with_leaf(v)) for v in (None, *taxonomy.verticals)} if config.coarse_labels == "skip" else {},
        0 if is_given else sum(path.stat().st_size for path in shards),
        None,
        seconds,
    )


def _look_at_source(config: RunConfig) -> PlannedData:
    source = build_source(config.data)
    taxonomy, items = source.build_taxonomy(), source.list_items()
    splits = assign_splits(items, source.split, {}).splits
    vertical_of = {c.id: c.vertical for c in taxonomy.classes}
    leaves = {taxonomy.class_of_output(int(output)).id for output in np.flatnonzero(taxonomy.is_leaf)}
    routed: Counter[str] = Counter()
    fine: Counter[str | None] = Counter()
    for item, split in zip(items, splits, strict=True):
        if split == "train":
            routed.update({vertical_of[label] for label in item.labels})
            if config.coarse_labels == "skip" and (own := leaves.intersection(item.labels)):
                fine.update({None, *(vertical_of[label] for label in own)})
    start = time.perf_counter()
    probed = [items[place] for place in np.linspace(0, len(items) - 1, min(NUM_PROBED, len(items)), dtype=int)]
    contents = [source.read(item)[1] for item in probed]
    write_seconds = (time.perf_counter() - start) / len(contents)
    # In a tar, a sample is two members, each a header and its content in whole blocks: the image, and a block of labels.
    image_bytes = [len(content) for content in contents]
    if not source.is_compact:
        image_bytes = [_TAR_BLOCK * (3 - (-size // _TAR_BLOCK)) for size in image_bytes]
    return PlannedData(
        taxonomy,
        config.data.image_size,
        dict(Counter(splits)),
        {vertical: routed[vertical] for vertical in taxonomy.verticals},
        {vertical: fine[vertical] for vertical in (None, *taxonomy.verticals)} if fine else {},
        round(len(items) * np.mean(image_bytes)),
        write_seconds,
        _time_decoding(contents, config.data.view, config.data.image_size),
    )


def _time_decoding(contents: list[bytes], view: ViewConfig, image_size: int) -> float:
    """Seconds an image, of one process, the second time: the first loads libraries."""
    views = draw_views(view, 0, 0, np.arange(len(contents)))
    for _ in range(2):
        start = time.perf_counter()
        for row, content in enumerate(contents):
            decode_view(content, views, row, image_size)
        seconds = (time.perf_counter() - start) / len(contents)
    return seconds
