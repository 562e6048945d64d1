"""Shards of drawn photographs for the benchmarks: noise at all scales, which JPEG finds as hard as a photograph."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from concentration.data.index import index_shard
from concentration.data.split import Split, load_split
from concentration.taxonomy import Taxonomy, TaxonomyClass

NUM_CLASSES = 100
TAXONOMY = Taxonomy([TaxonomyClass(f"{n}", f"{n}", (), "things") for n in range(NUM_CLASSES)])


def draw_photograph(size: tuple[int, int], seed: int, roughness: float = 1.0) -> Image.Image:
    """A picture of (width, height); its finest noise has `roughness` times the deviation that each coarser scale has."""
    generator = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for cells, deviation in ((4, 40), (16, 20), (64, 12), (max(size), 6 * roughness)):
        shape = (max(1, cells * size[1] // max(size)), max(1, cells * size[0] // max(size)), 3)
        noise = generator.normal(128, deviation, shape).clip(0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)).astype(float) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_split(folder: Path, images: list[bytes], num_samples: int, num_shards: int) -> Split:
    """An indexed split of shards that hold these images in turn."""
    folder.mkdir()
    per_shard = -(-num_samples // num_shards)
    for number in range(num_shards):
        path = folder / f"train-{number:06d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for sample in range(number * per_shard, min((number + 1) * per_shard, num_samples)):
                label = json.dumps({"labels": [f"{sample % NUM_CLASSES}"]}).encode()
                writer.write({"__key__": f"{sample:08d}", "jpg": images[sample % len(images)], "json": label})
        index_shard(path, TAXONOMY, path.name).save(path.with_suffix(".index"))
    return load_split(folder, "train", TAXONOMY)
