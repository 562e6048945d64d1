"""`concentrate targets`: every training image goes to the teachers of its verticals, whose top-K answers are stored."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch

from concentration.data.index import Split, load_split
from concentration.data.loader import SampleReader, StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.sample_targets import LabelTargets
from concentration.distributed import choose_device
from concentration.networks.classifier import Classifier
from concentration.progress import Progress
from concentration.schema import Config
from concentration.stages.prepare import SHARDS, DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.teacher import TEACHERS
from concentration.stages.train_network import load_network
from concentration.targets import TargetRecords, keep_top_k, write_atomically

TARGETS = "targets"


class SoftTargetsConfig(Config):
    """The name of a set of stored targets, and how many classes each record keeps (all of a smaller vertical)."""

    kind: Literal["soft"] = "soft"
    name: str = "default"
    top_k: pydantic.PositiveInt = 100


class TargetsConfig(StageConfig):
    """Writes `targets/NAME/VERTICAL/`, for one vertical or, where it is not given, for all."""

    runtime_fields = StageConfig.runtime_fields | {"vertical", "accelerator", "batch_size", "num_workers"}

    vertical: str | None = None
    targets: SoftTargetsConfig = SoftTargetsConfig()
    accelerator: Literal["cpu", "gpu"] = "cpu"
    batch_size: pydantic.PositiveInt = 256
    num_workers: pydantic.NonNegativeInt = 0


def targets(config: TargetsConfig) -> None:
    """Runs the stage; shards whose file is written are not done again.

    Raises:
        ConfigError: a teacher has not finished.
        DataError: a teacher was made for another taxonomy, or too many images cannot be decoded.
    """
    _, taxonomy, fingerprint = load_prepared(config.workdir, DataOverrides())
    verticals = taxonomy.verticals if config.vertical is None else (config.vertical,)
    split = load_split(config.workdir / SHARDS, "train", taxonomy)
    total = sum(len(split.routed(vertical)) for vertical in verticals)
    root = config.workdir / TARGETS / config.targets.name
    title = "targets" if config.vertical is None else f"targets {config.vertical}"
    with Progress(title, total, "images", root / (config.vertical or "")) as progress:
        for vertical in verticals:
            _make_targets(config, vertical, split, fingerprint, progress)


def _make_targets(config: TargetsConfig, vertical: str, split: Split, fingerprint: str, progress: Progress) -> None:
    teacher_path = config.workdir / TEACHERS / vertical
    teacher_hash = RunDirectory(teacher_path).load_done(f"concentrate teacher vertical={vertical}")["checkpoint"]
    directory = RunDirectory(config.workdir / TARGETS / config.targets.name / vertical)
    by_shard = split.by_shard(split.routed(vertical))
    with directory.begin(config, {"data": fingerprint, "teacher": teacher_hash}) as is_due:
        if is_due:
            network = load_network(teacher_path, split.taxonomy.restrict(vertical))
            network.to(choose_device(config.accelerator))
            image_size = network.image_size
            reader = SampleReader(split, LabelTargets(split, smear=False), image_size, views=None, seed=0)
            digest = hashlib.sha256()
            for shard, ordinals in enumerate(by_shard):
                path = directory.path / f"{split.index_names[shard]}.safetensors"
                if len(ordinals) and not path.exists():
                    _make_shard(network, reader, ordinals, split, shard, path, config)
                if len(ordinals):
                    digest.update(path.read_bytes())
                progress.advance(len(ordinals))
            manifest = {
                "codec": "plain",
                "top_k": config.targets.top_k,
                "num_kept": min(config.targets.top_k, network.num_outputs),
                "teacher": teacher_hash,
                "taxonomy": split.taxonomy.fingerprint,
                "data": split.fingerprint,
                "preprocessing": {"image_size": image_size, "view": "centre"},
            }
            write_atomically(directory.path / "manifest.json", manifest)
            directory.finish({"targets": digest.hexdigest()[:16], "teacher": teacher_hash})
        else:
            progress.advance(sum(len(ordinals) for ordinals in by_shard))


@torch.inference_mode()
def _make_shard(
    network: Classifier,
    reader: SampleReader,
    ordinals: np.ndarray,
    split: Split,
    shard: int,
    path: Path,
    config: TargetsConfig,
) -> None:
    """The teacher's answers on one shard's samples of its vertical, written as one file."""
    batch_size = min(config.batch_size, len(ordinals))
    batches = StepBatches(reader, SequentialOrder(ordinals), batch_size, accumulate=1, rank=0, world_size=1)
    kept = []
    for batch in build_loader(batches, range(batches.steps_per_epoch), config.num_workers):
        probability_BV = network(batch.images.to(network.device)).sigmoid().cpu()[: batch.global_count]
        # An undecodable image teaches nothing: training skips it, and its record says so.
        probability_BV[batch.skipped_B[: batch.global_count]] = 0
        kept.append(keep_top_k(probability_BV, config.targets.top_k))
    index_RK, probability_RK, tail_R = (torch.cat(parts) for parts in zip(*kept, strict=True))
    rows = ordinals - split.shard_start[shard]
    records = TargetRecords.from_tensors(rows, index_RK, probability_RK, tail_R, network.num_outputs)
    records.save(path, {"codec": "plain", "shard": split.index_names[shard]})
