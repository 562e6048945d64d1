"""`group method=features`: k-means of a network's features, by which every sample of every split gets a group.

Features are computed twice: of up to `num_fitted` training samples to fit the centroids, then of all samples to assign them.

Shapes: B batch, D features, K groups, N samples of a split.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from concentration import distributed
from concentration.data.order import SequentialOrder, WindowOrder
from concentration.data.split import Split
from concentration.errors import ConfigError
from concentration.files import hash_file
from concentration.grouping.class_groups import NO_GROUP, ClassGroups, find_majority_groups
from concentration.grouping.kmeans import Centroids, StreamedKMeans, fit_kmeans
from concentration.grouping.sample_groups import (
    CENTROIDS_FILE,
    CentroidRouter,
    count_by_group,
    hash_group_ids,
    load_group_ids,
    prepare_features,
    save_group_ids,
)
from concentration.networks.top_layers import Layer
from concentration.progress import Progress
from concentration.schema import Config
from concentration.stages.sample_stream import SampleStream, ShownBatch

#: From how many shards at a time samples are drawn in random order while the centroids are fitted.
_WINDOW_SHARDS = 16


class FeatureGroupsConfig(Config):
    """k-means of features.

    network: the name of a student or generalist.
    num_groups: how many groups are made.
    layer: which of the network's features are grouped: the base network's, or the outputs of top-1.
    normalise: whether features are first scaled to length 1.
    balanced: whether groups are made about equally large, by prices (see `grouping/kmeans.py`).
    num_start: how many samples are held in memory, where a complete k-means of them gives the first centroids.
    num_fitted: how many samples the centroids are fitted to, including those of the start.
    """

    kind: Literal["features"] = "features"
    network: str = "generalist"
    num_groups: int = pydantic.Field(default=8, ge=2)
    layer: Layer = "base"
    normalise: bool = True
    balanced: bool = False
    num_start: pydantic.PositiveInt = 10_000
    num_fitted: pydantic.PositiveInt = 1_000_000


def group_by_features(
    method: FeatureGroupsConfig, stream: SampleStream, splits: Mapping[str, Split], path: Path, seed: int, network: str
) -> tuple[ClassGroups, dict]:
    """Writes the centroids and the groups of all samples below `path`. Files that an interrupted run has written are kept.

    Args:
        method: how features are computed and grouped.
        stream: the network, and how images are read for it.
        splits: all splits, by name.
        path: the folder of the grouping.
        seed: the seed of the order of samples and of k-means.
        network: a hash of the file of the stream's network.

    Returns:
        The groups of the classes, where a class is in the group of most of its training samples; and what `DONE.json` records.

    Raises:
        ConfigError: there are fewer samples to start from than groups.
        DataError: there are fewer different features than groups.
    """
    train = splits["train"]
    num_fitted = min(method.num_fitted, len(train))
    num_start = min(method.num_start, num_fitted)
    if num_start < method.num_groups:
        raise ConfigError(
            f"method.num_groups={method.num_groups}: more groups than the {num_start} samples that they start from; "
            "ask for fewer, or set method.num_start and method.num_fitted higher"
        )
    total = num_fitted + sum(map(len, splits.values()))
    with Progress("group features", total, "images", path, quiet=distributed.rank() != 0) as progress:
        if not (path / CENTROIDS_FILE).exists():
            centroids = _fit_centroids(method, stream, train, num_fitted, seed, progress)
            if distributed.rank() == 0:
                router = CentroidRouter(centroids, method.layer, method.normalise, network)
                router.save(path / CENTROIDS_FILE)
            distributed.wait_for_all()
        router = CentroidRouter.load(path / CENTROIDS_FILE)
        for split in splits.values():
            _assign(stream, router.to(stream.network.device), split, path, progress)
    distributed.wait_for_all()
    groups = {
        name: load_group_ids(path, split.index_names, np.diff(split.shard_start).tolist(), router.num_groups)
        for name, split in splits.items()
    }
    pairs = train.label_pairs(np.arange(len(train)), smear=True)
    group_C = find_majority_groups(groups["train"], *pairs, router.num_groups, train.taxonomy.num_classes)
    facts = {
        "centroids": hash_file(path / CENTROIDS_FILE),
        "num_samples": count_by_group(groups, router.num_groups),
        "sample_groups": {name: hash_group_ids(group_N) for name, group_N in groups.items()},
    }
    return ClassGroups.build(group_C, train.taxonomy), facts


def _fit_centroids(
    method: FeatureGroupsConfig, stream: SampleStream, split: Split, num_fitted: int, seed: int, progress: Progress
) -> Centroids:
    """The centroids: a complete k-means of the first features, updated by all that follow. They are equal on all ranks."""
    order = WindowOrder(split.by_shard(range(len(split))), seed, _WINDOW_SHARDS)
    streamed: StreamedKMeans | None = None
    held: list[Tensor] = []
    num_seen = 0
    for batch in stream.read(split, order, num_fitted, distributed.rank(), distributed.world_size()):
        feature_BD = _compute_features(stream, batch, method.layer, method.normalise)
        num_seen += batch.global_count
        if streamed is not None:
            streamed.step(feature_BD)
        else:
            # Features are gathered batch by batch, so that their order is the same for any number of ranks.
            held += [feature.to(feature_BD.device) for feature in distributed.gather_objects(feature_BD.cpu())]
            if num_seen >= min(method.num_start, num_fitted):
                point_ND = torch.cat(held)
                start = fit_kmeans(point_ND, method.num_groups, seed, method.balanced)
                streamed = StreamedKMeans(start, point_ND, method.balanced)
                held.clear()
        progress.advance(batch.global_count)
    return streamed.finish()


def _assign(stream: SampleStream, router: CentroidRouter, split: Split, path: Path, progress: Progress) -> None:
    """Assigns the samples of this rank's shards, and writes a file of groups for each shard as soon as it is complete."""
    start, stop = split.shard_start[:-1], split.shard_start[1:]
    files = [path / f"{name}.safetensors" for name in split.index_names]
    mine = range(distributed.rank(), len(files), distributed.world_size())
    due = [shard for shard in mine if not files[shard].exists()]
    progress.advance(sum(int(stop[shard] - start[shard]) for shard in mine if shard not in due))
    if not due:
        return
    order = SequentialOrder(np.concatenate([np.arange(start[shard], stop[shard]) for shard in due]))
    last_place = np.cumsum([stop[shard] - start[shard] for shard in due])
    group_N = np.full(len(split), NO_GROUP, dtype=np.int32)
    num_seen = num_written = 0
    for batch in stream.read(split, order):
        feature_BD = _compute_features(stream, batch, router.layer)
        group_N[batch.ordinal_B] = router.route(feature_BD).cpu().numpy()
        num_seen += batch.global_count
        while num_written < len(due) and num_seen >= last_place[num_written]:
            shard = due[num_written]
            save_group_ids(files[shard], group_N[start[shard] : stop[shard]])
            num_written += 1
        progress.advance(batch.global_count)


@torch.inference_mode()
def _compute_features(stream: SampleStream, batch: ShownBatch, layer: Layer, normalise: bool = False) -> Tensor:
    return prepare_features(stream.network.compute_features(batch.images, layer), normalise)
