"""Packs: shards of very small images. A pack is the encoded images one after another; only its index says where each begins.

A tar takes at least two kilobytes per sample, so for drawings of 400 bytes it would be five times as large as a pack.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from concentration.data.index import ShardIndex
from concentration.data.sources.source import Item, Source
from concentration.errors import DataError
from concentration.files import replacing
from concentration.taxonomy import Taxonomy

#: The suffix of a pack's file, where a tar has `.tar`.
PACK_SUFFIX = ".pack"


def write_pack(path: Path, items: Sequence[Item], source: Source, taxonomy: Taxonomy) -> list[str]:
    """Writes a pack and its index, each whole or not at all.

    Args:
        path: the file of the pack; its index is written beside it.
        items: the samples, in the order of the pack.
        source: reads the image of each item.
        taxonomy: the taxonomy that the labels belong to.

    Returns:
        A line for each image that could not be read. If none could, neither file is written.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    contents, skipped, kept = [], [], []
    for item in items:
        try:
            contents.append(source.read(item)[1])
            kept.append(item)
        except DataError as error:
            skipped.append(str(error))
    if not kept:
        for file in (path, path.with_suffix(".index")):
            file.unlink(missing_ok=True)
        return skipped
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(contents))
    _build_index(path, kept, contents, taxonomy).save(path.with_suffix(".index"))
    return skipped


def _build_index(path: Path, items: Sequence[Item], contents: Sequence[bytes], taxonomy: Taxonomy) -> ShardIndex:
    sizes = np.array([len(content) for content in contents], dtype=np.int64)
    labels = [[taxonomy.position[label] for label in item.labels] for item in items]
    return ShardIndex(
        path=Path(path.name),
        size_bytes=int(sizes.sum()),
        key_bytes=np.frombuffer("\n".join(item.key for item in items).encode(), dtype=np.uint8),
        image_offset=np.cumsum(sizes) - sizes,
        image_size=sizes,
        image_crc32=np.array([zlib.crc32(content) for content in contents], dtype=np.uint32),
        label_start=np.cumsum([0, *map(len, labels)], dtype=np.int64),
        label_position=np.array([position for positions in labels for position in positions], dtype=np.int32),
    )
