"""The index of one shard: for each sample its key, its labels, its image's place in the tar and that image's checksum.

The index is built by walking the headers of the tar, whether `prepare` wrote the tar or the user supplied it. With the index,
one `pread` reads any image, so a reader never streams through a tar. `split` joins the indices of all shards.

Shapes: S samples of the shard, L labels of all its samples, K bytes of all its keys.
"""

import functools
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.data.remote import Location, is_url
from concentration.data.shard_members import LabelMember, walk_samples
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

_ARRAYS = ("key_bytes", "image_offset", "image_size", "image_crc32", "label_start", "label_position")


@dataclass(frozen=True)
class ShardIndex:
    """Everything that a reader needs to know of one shard before it opens the shard.

    Attributes:
        path: the tar file (or pack); a URL (str) if it is remote.
        size_bytes: the size of that file when it was indexed.
        key_bytes: (K,) uint8, the samples' keys as UTF-8, in the order of the tar, separated by line breaks.
        image_offset: (S,) int64, the byte of the tar at which each encoded image starts.
        image_size: (S,) int64, the length of each encoded image in bytes.
        image_crc32: (S,) uint32, the CRC-32 of each encoded image, by which a reader notices that a shard was replaced.
        label_start: (S + 1,) int64; the labels of sample s are `label_position[label_start[s]:label_start[s + 1]]`.
        label_position: (L,) int32, the labels as positions in taxonomy.json. Positions are stored because they never change;
            output indices do when classes are appended.
    """

    path: Location
    size_bytes: int
    key_bytes: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    image_crc32: np.ndarray
    label_start: np.ndarray
    label_position: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.image_offset)

    @property
    def keys(self) -> tuple[str, ...]:
        """(S,) the samples' keys. They are decoded at each access: a large split's keys do not fit into memory as str."""
        return tuple(self.key_bytes.tobytes().decode().split("\n"))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything but the path, as 64 hex digits: it identifies the samples with their images and labels."""
        hasher = hashlib.sha256(str(self.size_bytes).encode())
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            hasher.update(f"{name} {array.dtype} {array.shape}".encode())
            hasher.update(array.data)
        return hasher.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the index to `path`, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        header = {"path": str(self.path), "size_bytes": str(self.size_bytes), "digest": self.digest}
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """The index that `save` wrote.

        Raises:
            DataError: the index is damaged, or its shard lies on this machine and is missing or has another size now.
        """
        header = load_metadata(path)
        arrays = load_arrays(path, _ARRAYS)
        again = f"or delete {path.parent} and run `concentrate prepare` again"
        try:
            recorded = header["path"]
            if len(recorded.splitlines()) != 1:
                raise ValueError(f"its shard is {recorded!r}")
            # Relative paths are relative to the index, so that a working directory can be moved as a whole.
            index = cls(recorded if is_url(recorded) else path.parent / recorded, int(header["size_bytes"]), **arrays)
            if index.digest != header["digest"]:
                raise ValueError("its checksum is not that of its content")
            index._check()
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); bring it back, {again}") from None
        if isinstance(index.path, str):
            return index
        if not os.path.exists(index.path):  # Path.exists raises OSError if a name is too long
            raise DataError(f"{index.path}: no such file, but {path} describes it; bring it back, {again}")
        if index.path.stat().st_size != index.size_bytes:
            raise DataError(
                f"{index.path}: {index.path.stat().st_size} bytes, but {index.size_bytes} when it was indexed: "
                f"it is truncated or has changed; bring it back, {again}"
            )
        return index

    def _check(self) -> None:
        """Raises: ValueError if the arrays do not fit together, or point outside the shard."""
        lengths = {len(self.image_size), len(self.image_crc32), len(self.label_start) - 1, len(self.keys)}
        if lengths != {self.num_samples}:
            raise ValueError(f"{self.num_samples} places, but {sorted(lengths)} keys, sizes, checksums and labels")
        starts = self.label_start
        if starts[0] != 0 or starts[-1] != len(self.label_position) or (np.diff(starts) < 1).any():
            raise ValueError(f"its samples do not share out its {len(self.label_position)} labels")
        if (self.label_position < 0).any():
            raise ValueError("a label below 0")
        ends = self.image_offset + self.image_size
        if (self.image_offset < 0).any() or (self.image_size < 0).any() or ends.max() > self.size_bytes:
            raise ValueError(f"an image outside the {self.size_bytes} bytes of its shard")


def index_shard(path: Path, taxonomy: Taxonomy, recorded_path: str, label_member: LabelMember = "auto") -> ShardIndex:
    """The index of a tar: walks its headers, reads its labels, and computes the checksums of its images.

    Args:
        path: the tar, on this machine.
        taxonomy: the taxonomy that the labels belong to.
        recorded_path: the path (relative to the index, or absolute) or URL that the index records for the tar.
        label_member: which member of a sample holds its labels.

    Raises:
        DataError: the tar is missing, empty or truncated; a sample has no image or no labels, or two of either; two samples have
            the same key; or a label is not in the taxonomy. The message names the file and the member.
    """
    where = recorded_path if is_url(recorded_path) else str(path)
    keys: dict[str, None] = {}
    offsets, sizes, checksums, label_start, label_position = [], [], [], [0], []
    with _open_shard(path) as file:
        for member in walk_samples(path, file, where, taxonomy, label_member):
            if member.key in keys:
                raise DataError(f"{where}: two samples have the key '{member.key}'; make keys unique")
            keys[member.key] = None
            offsets.append(member.image_offset)
            sizes.append(member.image_size)
            file.seek(member.image_offset)
            checksums.append(zlib.crc32(file.read(member.image_size)))
            label_position.extend(member.labels)
            label_start.append(len(label_position))
    if not keys:
        raise DataError(f"{where}: no samples; delete it, or write it again")
    return ShardIndex(
        recorded_path if is_url(recorded_path) else Path(recorded_path),
        path.stat().st_size,
        np.frombuffer("\n".join(keys).encode(), dtype=np.uint8),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(checksums, dtype=np.uint32),
        np.array(label_start, dtype=np.int64),
        np.array(label_position, dtype=np.int32),
    )


def _open_shard(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); bring it back, or correct its permissions"
        ) from None
