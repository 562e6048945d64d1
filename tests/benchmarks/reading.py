"""Reading and decoding through our loader, against `webdataset`'s own reader and against decoding from memory.

    python tests/benchmarks/reading.py [--decoding]

All sides give shuffled batches of uint8 images and labels, from the same shards, which lie in the page cache.
"""

import argparse
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from data import draw_photograph, encode_jpeg, write_split
from measure import Comparison, cpu_seconds, publish, take_best, time_in_turns
from PIL import Image

from concentration.data.distortions import DistortionConfig
from concentration.data.loader import StepBatches, build_loader
from concentration.data.order import WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.resident import ResidentReader, load_resident
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.views import CentreView, ViewConfig, decode_view

NUM_IMAGES = 64
CENTRE = CentreView()
#: As conf/data/glyphs_100k.yaml has it.
DISTORTED = ViewConfig(
    contrast=0.2,
    distortion=DistortionConfig(
        rotate=8, shear=0.15, scale=0.15, shift=0.06, stroke=0.5, blur=0.8, erase=0.08, noise=0.1
    ),
)


@dataclass(frozen=True)
class Workload:
    """Images of one kind, and what they become."""

    name: str
    size: tuple[int, int]
    quality: int
    roughness: float
    image_size: int
    num_samples: int
    batch_size: int


SMALL = Workload("3 KB", (80, 80), 90, 0.5, image_size=64, num_samples=12_000, batch_size=64)
ORDINARY = Workload("100 KB", (500, 375), 90, 3.2, image_size=224, num_samples=1_200, batch_size=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoding", action="store_true", help="only our loader beside decoding alone: a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, workload in enumerate((SMALL, ORDINARY)):
            images = [
                encode_jpeg(draw_photograph(workload.size, seed, workload.roughness), workload.quality)
                for seed in range(NUM_IMAGES)
            ]
            split = write_split(Path(folder, str(number)), images, workload.num_samples, num_shards=8)
            mean_kb = np.mean([len(image) for image in images]) / 1000
            what = f"{mean_kb:.1f} KB JPEG"
            if not arguments.decoding:
                comparisons += compare_reading(split, what)
                comparisons += compare_loading(split, workload, what)
            comparisons.append(compare_with_decoding(split, workload, what))
        if not arguments.decoding:
            comparisons.append(compare_resident(Path(folder, "drawings")))
    if not arguments.decoding:
        comparisons += compare_large_images()
    publish("reading", "Reading and decoding, one thread a process", comparisons)


def compare_reading(split: Split, what: str) -> list[Comparison]:
    """Encoded images and labels in the shuffled order, in this process."""
    seconds = time_in_turns({"ours": lambda: read_with_ours(split), "webdataset": lambda: read_with_webdataset(split)})
    rates = {name: len(split) / value for name, value in seconds.items()}
    return [Comparison(f"{what}: reading", "samples/s", rates["ours"], rates["webdataset"], "WebDataset(...)")]


def compare_loading(split: Split, workload: Workload, what: str) -> list[Comparison]:
    """Batches, by this process alone and by two workers."""
    comparisons = []
    for num_workers, processes in ((0, "one process"), (2, "two workers")):
        sides = {
            "ours": functools.partial(time_batches, load_with_ours, split, workload, num_workers),
            'WebDataset(...).decode("pilrgb")': functools.partial(
                time_batches, load_with_webdataset, split, workload, num_workers
            ),
            "WebDataset(...), decoding as we do": functools.partial(
                time_batches, load_with_webdataset_and_our_views, split, workload, num_workers
            ),
        }
        seconds = take_best(sides, num_turns=5)
        title = f"{what} to {workload.image_size}, {processes}"
        comparisons += [
            Comparison(title, "samples/s", 1 / seconds["ours"], 1 / seconds[name], name)
            for name in sides
            if name != "ours"
        ]
    return comparisons


def compare_with_decoding(split: Split, workload: Workload, what: str) -> Comparison:
    """Batches beside decoding the same images from memory, batch by batch in turns, in seconds of the processor."""
    contents, batches = read_encoded_in_order(split), build_batches(split, workload)
    ours, alone = [], []
    for number in range(len(split) // workload.batch_size):
        of_batch = contents[number * workload.batch_size :][: workload.batch_size]
        alone.append(cpu_seconds(lambda of_batch=of_batch: decode_from_memory(of_batch, workload)))
        ours.append(cpu_seconds(lambda number=number: batches[number]))
    rates = [workload.batch_size / float(np.median(seconds)) for seconds in (ours, alone)]
    title = f"{what} to {workload.image_size}, one process, processor's time"
    return Comparison(title, "samples/s", *rates, "decoding alone, from memory")


def compare_resident(folder: Path) -> Comparison:
    """Batches of distorted grey drawings, beside what `trainer.resident` leaves for a processor to do."""
    images = []
    for seed in range(NUM_IMAGES):
        buffer = io.BytesIO()
        draw_photograph((48, 48), seed).convert("L").quantize(16).convert("L").save(buffer, "PNG")
        images.append(buffer.getvalue())
    split = write_split(folder, images, 2048, num_shards=2)
    reader = SampleReader(split, LabelTargets(split, smear=False), 48, DISTORTED, seed=0)
    held = ResidentReader(reader, load_resident(split, range(len(split)), 48, 0, "drawings", None))
    seconds: dict[str, list[float]] = {"read": [], "held": []}
    for first in range(0, len(split), 256):
        ordinals = np.arange(first, first + 256)
        for name, side in (("read", reader), ("held", held)):
            seconds[name].append(cpu_seconds(lambda side=side, ordinals=ordinals: side.read(ordinals, 1)))
    rates = [256 / float(np.median(seconds[name])) for name in ("held", "read")]
    title = "drawings of 48 pixels, distorted, processor's time"
    return Comparison(title, "samples/s", *rates, "trainer.resident=false")


def compare_large_images() -> list[Comparison]:
    """A photograph of 12 megapixels becomes 224 x 224."""
    content = encode_jpeg(draw_photograph((4000, 3000), 0))
    seconds = time_in_turns(
        {"ours": lambda: decode_view(content, CENTRE, 0, 224), "plain": lambda: decode_plainly(content, 224)}
    )
    what = f"{len(content) / 1e6:.1f} MB JPEG of 4000 x 3000 to 224"
    return [Comparison(what, "images/s", 1 / seconds["ours"], 1 / seconds["plain"], "decoding all pixels")]


def read_with_ours(split: Split) -> None:
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size=1, views=None, seed=0)
    order = build_order(split)
    for first in range(0, len(order), 64):
        for ordinal in order.take(0, np.arange(first, min(first + 64, len(order)))):
            _ = reader.read_encoded(int(ordinal)), split.labels(int(ordinal))


def read_with_webdataset(split: Split) -> None:
    for sample in open_webdataset(split).decode().to_tuple("jpg", "json"):
        _ = sample


def load_with_ours(split: Split, workload: Workload, num_workers: int) -> Iterable:
    batches = build_batches(split, workload)
    return build_loader(batches, range(batches.steps_per_epoch), num_workers)


def build_batches(split: Split, workload: Workload) -> StepBatches:
    reader = SampleReader(split, LabelTargets(split, smear=False), workload.image_size, views=None, seed=0)
    return StepBatches(reader, build_order(split), workload.batch_size, accumulate=1, rank=0, world_size=1)


def load_with_webdataset(split: Split, workload: Workload, num_workers: int) -> Iterable:
    """As its documentation does it: whole images by Pillow, then the views."""
    samples = open_webdataset(split).decode("pilrgb")
    samples = samples.map_dict(jpg=lambda image: resize_centre(image, workload.image_size))
    return batch_with_webdataset(samples, workload, num_workers)


def load_with_webdataset_and_our_views(split: Split, workload: Workload, num_workers: int) -> Iterable:
    samples = open_webdataset(split).decode()  # of the labels alone
    samples = samples.map_dict(jpg=lambda content: decode_view(content, CENTRE, 0, workload.image_size)[0])
    return batch_with_webdataset(samples, workload, num_workers)


def batch_with_webdataset(samples: webdataset.WebDataset, workload: Workload, num_workers: int) -> Iterable:
    batches = samples.to_tuple("jpg", "json").map(make_tensors).batched(workload.batch_size)
    prefetch = {"prefetch_factor": 4} if num_workers else {}
    return webdataset.WebLoader(batches, batch_size=None, num_workers=num_workers, **prefetch)


def open_webdataset(split: Split) -> webdataset.WebDataset:
    return webdataset.WebDataset([str(shard.path) for shard in split.shards], shardshuffle=8).shuffle(1000)


def build_order(split: Split) -> WindowOrder:
    return WindowOrder(split.by_shard(np.arange(len(split))), seed=0, window_shards=4)


def make_tensors(sample: tuple[np.ndarray, dict]) -> tuple[torch.Tensor, int]:
    return torch.from_numpy(np.ascontiguousarray(sample[0])), int(sample[1]["labels"][0])


def resize_centre(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8 of the largest square in the middle."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def decode_plainly(content: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return resize_centre(image.convert("RGB"), size)


def read_encoded_in_order(split: Split) -> list[bytes]:
    """All images of an epoch in its order, none of them shared, so that they lie as far from the processor as a file's."""
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size=1, views=None, seed=0)
    order = build_order(split)
    return [reader.read_encoded(int(ordinal)) for ordinal in order.take(0, np.arange(len(order)))]


def decode_from_memory(contents: Sequence[bytes], workload: Workload) -> None:
    for content in contents:
        decode_view(content, CENTRE, 0, workload.image_size)


def time_batches(load: Callable[..., Iterable], *arguments) -> float:
    """Seconds a sample, from the first batch on: workers take a moment to start."""
    iterator = iter(load(*arguments))
    next(iterator)
    started, num_samples = time.perf_counter(), 0
    for batch in iterator:
        num_samples += len(batch[0])
    return (time.perf_counter() - started) / num_samples


if __name__ == "__main__":
    main()
