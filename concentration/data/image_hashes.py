"""Perceptual hashes of the images of a shard, stored as `NAME.hashes` beside `NAME.index`.

They are computed once, and again only if the index has changed.

Shapes: S samples of a shard, N samples of a split.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.data.decoding import UNDECODABLE
from concentration.data.index import ShardIndex
from concentration.data.near_duplicates import hash_image
from concentration.data.shard_cache import ShardCache
from concentration.data.shard_images import ShardImages
from concentration.data.split import Split
from concentration.errors import DataError


def hash_shard(index_path: Path, cache: ShardCache | None) -> None:
    """Computes and stores the hashes of a shard's images, unless those of this index are stored already.

    Args:
        index_path: the index of the shard.
        cache: the cache through which remote shards are read; None if the shard lies on this machine.

    Raises:
        DataError: the index or the hashes are damaged, or the shard cannot be read.
    """
    shard = ShardIndex.load(index_path)
    path = index_path.with_suffix(".hashes")
    if path.exists() and load_metadata(path).get("index") == shard.digest:
        return
    hash_S = np.zeros(shard.num_samples, dtype=np.uint64)
    is_hashed_S = np.zeros(shard.num_samples, dtype=bool)
    for row, content in enumerate(read_images(shard, range(shard.num_samples), cache)):
        try:
            found = hash_image(content)
        except UNDECODABLE:
            found = None
        if found is not None:
            hash_S[row], is_hashed_S[row] = found, True
    save_arrays(path, {"hash": hash_S, "is_hashed": is_hashed_S}, {"index": shard.digest})


def load_hashes(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The stored hashes of a split: (N,) uint64, and (N,) bool, whether the image has a hash.

    A blank image, and one that cannot be decoded, have none.

    Raises:
        DataError: the hashes of a shard are missing or damaged, or belong to other images.
    """
    parts = []
    for shard, name in zip(split.shards, split.index_names, strict=True):
        path = split.directory / f"{name}.hashes"
        arrays = load_arrays(path, ("hash", "is_hashed"))
        forms = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        expected = {"hash": ("uint64", (shard.num_samples,)), "is_hashed": ("bool", (shard.num_samples,))}
        if load_metadata(path).get("index") != shard.digest or forms != expected:
            raise DataError(
                f"{path}: damaged, or of other images than {name}.index describes; delete it and prepare again"
            )
        parts.append((arrays["hash"], arrays["is_hashed"]))
    return np.concatenate([hash_S for hash_S, _ in parts]), np.concatenate([is_hashed_S for _, is_hashed_S in parts])


def read_images(shard: ShardIndex, rows: range, cache: ShardCache | None) -> Iterator[bytes]:
    """Yields the encoded images of these samples of a shard in turn.

    Args:
        rows: the samples' places in the shard.
        cache: the cache through which remote shards are read; None if the shard lies on this machine.

    Raises:
        DataError: the shard cannot be read, or has changed since it was indexed.
    """
    images = ShardImages([shard], cache)
    places = zip(shard.image_offset[rows], shard.image_size[rows], shard.image_crc32[rows], strict=True)
    for row, place in zip(rows, places, strict=True):
        yield images.read(0, row, *map(int, place))
