"""Packs: shards of very small images, one behind the other in a file, which their index alone describes.

A tar takes two kilobytes a sample, however small its image is; of drawings of 400 bytes it would be five times as large.
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

#: In place of `.tar`.
PACK_SUFFIX = ".pack"


def write_pack(path: Path, items: Sequence[Item], source: Source, taxonomy: Taxonomy) -> list[str]:
    """Writes a pack and its index, each whole or not at all, and returns a line for every image that could not be had.

    Where none could be had, there is neither.

    Args:
        path: of the pack; its index lies beside it.
        items: in the order of the pack.
        source: reads each item's image.
        taxonomy: of the labels.

    Raises:
        DataError: the disk is full, or the folder may not be written.
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
