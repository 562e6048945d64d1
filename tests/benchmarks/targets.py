"""Stored soft targets in training: records a second along the order, and the student's step beside the same with hard labels.

python tests/benchmarks/targets.py
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from data import draw_photograph, encode_jpeg
from measure import Comparison, publish, take_best, time_once

from concentration.data.index import index_shard
from concentration.data.loader import StepBatches
from concentration.data.order import WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets, SampleTargets, StoredTargets
from concentration.data.split import Split, load_split
from concentration.data.views import INTERPOLATION, ViewConfig
from concentration.files import write_atomically
from concentration.networks.bases.small import SmallBaseConfig
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.targets import Codec, TargetRecords
from concentration.taxonomy import Taxonomy, TaxonomyClass

NUM_VERTICALS, VERTICAL_SIZE, NUM_KEPT = 20, 500, 100
NUM_SHARDS, PER_SHARD, BATCH_SIZE, IMAGE_SIZE = 8, 4000, 128, 64
NUM_STEPS = 8


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        split = write_shards(Path(folder) / "shards")
        for codec in ("plain", "packed"):
            write_targets(Path(folder) / codec, split, codec)
        publish("targets", f"{NUM_VERTICALS} verticals of {VERTICAL_SIZE} classes, K={NUM_KEPT}, one thread",
                [*compare_reading(split, Path(folder)), *compare_steps(split, Path(folder))])  # fmt: skip


def compare_reading(split: Split, folder: Path) -> list[Comparison]:
    """An epoch's look-ups in batches, windows of shards opened on the way, beside hard labels."""
    order = WindowOrder(split.by_shard(range(len(split))), seed=0, window_shards=8)
    batches = [order.take(0, np.arange(n, n + BATCH_SIZE)) for n in range(0, len(split) - BATCH_SIZE, BATCH_SIZE)]

    def look_up(build: Callable[[], SampleTargets]) -> float:
        targets = build()  # its caches are empty
        return time_once(lambda: [targets.lookup(ordinals, 0) for ordinals in batches])

    sides: dict[str, Callable[[], float]] = {
        codec: lambda codec=codec: look_up(lambda: StoredTargets(folder / codec, split))
        for codec in ("plain", "packed")
    }
    sides["labels"] = lambda: look_up(lambda: LabelTargets(split, smear=True))
    rates = {name: len(batches) * BATCH_SIZE / seconds for name, seconds in take_best(sides).items()}
    return [
        Comparison(f"looking up, codec={codec}", "records/s", rates[codec], rates["labels"], "hard labels")
        for codec in ("plain", "packed")
    ]


def compare_steps(split: Split, folder: Path) -> list[Comparison]:
    """Reading, forward, backward and update: seconds of a step, in turns of `NUM_STEPS` at other places of the epoch."""
    sides = {
        "labels": build_step(split, LabelTargets(split, smear=True)),
        "plain": build_step(split, StoredTargets(folder / "plain", split)),
        "packed": build_step(split, StoredTargets(folder / "packed", split)),
    }
    for step in sides.values():
        step()  # opens the shards
    seconds = take_best({name: lambda step=step: time_once(step) for name, step in sides.items()}, num_turns=6)
    return [
        Comparison(
            f"a student's step, codec={codec}",
            "ms",
            1000 * seconds[codec] / NUM_STEPS,
            1000 * seconds["labels"] / NUM_STEPS,
            "the same step with hard labels",
        )
        for codec in ("plain", "packed")
    ]


def build_step(split: Split, targets: SampleTargets) -> Callable[[], None]:
    verticals = dict(zip(split.taxonomy.verticals, split.taxonomy.vertical_sizes, strict=True))
    top, pace = TopConfig(kind="fc_sc", top1=256, top2=64), PaceConfig(kind="vertical")
    config = NetworkConfig(base=SmallBaseConfig(), top=top, pace=pace, image_size=IMAGE_SIZE, verticals=verticals)
    student = Student(config)
    optimizer = torch.optim.Adagrad(student.parameters(), lr=0.01)
    order = WindowOrder(split.by_shard(range(len(split))), seed=0, window_shards=NUM_SHARDS)
    reader = SampleReader(split, targets, IMAGE_SIZE, ViewConfig(flip=0.5), seed=0)
    batches = StepBatches(reader, order, BATCH_SIZE, accumulate=1, rank=0, world_size=1)
    numbers = iter(range(10**9))

    def run() -> None:
        for _ in range(NUM_STEPS):
            batch = batches[next(numbers)]
            optimizer.zero_grad()
            student(batch.images, batch.targets).mean().backward()
            optimizer.step()

    return run


def write_shards(folder: Path) -> Split:
    """Samples whose classes are spread evenly over verticals."""
    folder.mkdir()
    names = [(f"v{v:02d}", f"v{v:02d}/{c:03d}") for v in range(NUM_VERTICALS) for c in range(VERTICAL_SIZE)]
    taxonomy = Taxonomy([TaxonomyClass(name, name, (), vertical) for vertical, name in names])
    images = [encode_jpeg(draw_photograph((IMAGE_SIZE, IMAGE_SIZE), seed)) for seed in range(50)]
    generator = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        path = folder / f"train-{shard:06d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for sample in range(PER_SHARD):
                label = json.dumps({"labels": [names[generator.integers(len(names))][1]]}).encode()
                writer.write({"__key__": f"{shard}-{sample:06d}", "jpg": images[sample % len(images)], "json": label})
        index_shard(path, taxonomy, path.name).save(path.with_suffix(".index"))
    return load_split(folder, "train", taxonomy)


def write_targets(directory: Path, split: Split, codec: Codec) -> None:
    generator = np.random.default_rng(0)
    manifest = {"num_kept": NUM_KEPT, "views": 0, "taxonomy": split.taxonomy.fingerprint, "data": split.fingerprint,
                "preprocessing": {"interpolation": INTERPOLATION}}  # fmt: skip
    for vertical in split.taxonomy.verticals:
        for shard, ordinals in enumerate(split.by_shard(split.routed(vertical))):
            index = generator.random((len(ordinals), VERTICAL_SIZE)).argsort(axis=1)[:, :NUM_KEPT]
            probability = generator.random(index.shape).astype(np.float32) ** 8
            rows = ordinals - split.shard_start[shard]
            records = TargetRecords(rows, index, probability, np.full(len(rows), 0.1, np.float32))
            records.save(directory / vertical / f"train-{shard:06d}.safetensors", codec, VERTICAL_SIZE)
        write_atomically(directory / vertical / "manifest.json", manifest)


if __name__ == "__main__":
    main()
