"""Shards of tiny images with very many classes, to see how every verb does at that size (speed.md, "Very many classes").

    python docs/scale.py FOLDER CLASSES VERTICALS IMAGES
    concentrate prepare data=shards data.path=FOLDER data.image_size=8 workdir=runs/scale

A vertical has a root, groups below it, and leaves below those. An image is 8x8 pixels of its leaf's own noise, with
noise of its own; for every ten training images there are one for val and one for test.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES_PER_SHARD = 10_000
NUM_PATTERNS = 4096


def main(folder: Path, num_classes: int, num_verticals: int, num_images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    classes, leaves = [], []
    for number in range(num_verticals):
        size, vertical = num_classes // num_verticals, f"v{number:03}"
        num_groups = max(1, int(size**0.5) // 2)
        below = [(f"{vertical}/g{n}", vertical) for n in range(num_groups)]
        below += [(f"{vertical}/c{n}", f"{vertical}/g{n % num_groups}") for n in range(size - 1 - num_groups)]
        classes += [{"id": i, "parents": [p] if p else [], "vertical": vertical} for i, p in [(vertical, ""), *below]]
        leaves += [class_id for class_id, _ in below[num_groups:]]
    (folder / "taxonomy.json").write_text(json.dumps({"classes": classes}))
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (NUM_PATTERNS, 8, 8))
    for split, count in (("train", num_images), ("val", num_images // 10), ("test", num_images // 10)):
        labels = np.resize(rng.permutation(len(leaves)), count)
        for first in range(0, count, IMAGES_PER_SHARD):
            with tarfile.open(folder / f"{split}-{first // IMAGES_PER_SHARD:06}.tar", "w") as tar:
                for n, leaf in enumerate(labels[first : first + IMAGES_PER_SHARD], first):
                    pixels = patterns[leaf % NUM_PATTERNS] + rng.integers(0, 55, (8, 8))
                    image = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(image, "png", compress_level=1)
                    add(tar, f"{split}{n:08}.png", image.getvalue())
                    add(tar, f"{split}{n:08}.json", json.dumps({"labels": [leaves[leaf]]}).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
