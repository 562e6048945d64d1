"""The index of a shard: where each sample's image lies in the tar, its key and its labels.

An index is made by walking the tar's headers, for shards that we wrote and for shards that we were given alike. Reading by
offset needs no streaming through the tar, and any sample is one `pread` away.

Shapes: S samples of a shard, L labels of all its samples.
"""

import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import save
from webdataset.tariterators import base_plus_ext

from concentration.errors import DataError
from concentration.targets import load_arrays, load_metadata, sort_metadata, write_atomically
from concentration.taxonomy import Taxonomy

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK_BYTES = 512

# Members that `webdataset` takes for notes about the shard and leaves out.
_NOTE = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard without opening it.

    Attributes:
        path: the tar file.
        size_bytes: of the tar file when it was indexed.
        keys: (S,) of the samples, in the order of the tar.
        image_offset: (S,) int64, where each encoded image starts in the tar.
        image_size: (S,) int64, its length in bytes.
        label_start: (S + 1,) int64; sample s has the labels `label_position[label_start[s]:label_start[s + 1]]`.
        label_position: (L,) int32 positions in taxonomy.json, which never change; the output index may, when classes come.
    """

    path: Path
    size_bytes: int
    keys: tuple[str, ...]
    image_offset: np.ndarray
    image_size: np.ndarray
    label_start: np.ndarray
    label_position: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        arrays = {
            "keys": np.frombuffer("\n".join(self.keys).encode(), dtype=np.uint8),
            "image_offset": self.image_offset,
            "image_size": self.image_size,
            "label_start": self.label_start,
            "label_position": self.label_position,
        }
        header = {"path": str(self.path), "size_bytes": str(self.size_bytes)}
        write_atomically(path, sort_metadata(save(arrays, header)))

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Raises: DataError where the index is damaged, or its shard is gone or has changed."""
        header = load_metadata(path)
        names = ("keys", "image_offset", "image_size", "label_start", "label_position")
        arrays = load_arrays(path, names)
        again = f"or delete {path.parent} and run `concentrate prepare` again"
        try:
            keys = tuple(arrays.pop("keys").tobytes().decode().split("\n"))
            # A relative path is relative to the index: a working directory may be moved as a whole.
            index = cls(path.parent / header["path"], int(header["size_bytes"]), keys, **arrays)
            index._check()
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); bring it back, {again}") from None
        if not index.path.exists():
            raise DataError(f"{index.path}: no such file, but {path} describes it; bring it back, {again}")
        if index.path.stat().st_size != index.size_bytes:
            raise DataError(
                f"{index.path}: {index.path.stat().st_size} bytes, but {index.size_bytes} when it was indexed: "
                f"it is truncated or has changed; bring it back, {again}"
            )
        return index

    def _check(self) -> None:
        """Raises: ValueError where the parts do not fit together."""
        lengths = {len(self.image_offset), len(self.image_size), len(self.label_start) - 1}
        if lengths != {self.num_samples}:
            raise ValueError(f"{self.num_samples} keys, but {sorted(lengths)} places, sizes and labels")
        starts = self.label_start
        if starts[0] != 0 or starts[-1] != len(self.label_position) or (np.diff(starts) < 1).any():
            raise ValueError(f"its samples do not share out its {len(self.label_position)} labels")
        if (self.label_position < 0).any():
            raise ValueError("a label below 0")
        ends = self.image_offset + self.image_size
        if (self.image_offset < 0).any() or (self.image_size < 0).any() or ends.max() > self.size_bytes:
            raise ValueError(f"an image outside the {self.size_bytes} bytes of its shard")


def index_shard(path: Path, taxonomy: Taxonomy, recorded_path: str) -> ShardIndex:
    """Walks a tar's headers and reads its labels.

    Raises:
        DataError: naming the file and member, where the tar is missing, empty or truncated, a sample lacks its image or
            labels or has two, a key comes twice, or a label is not in the taxonomy.
    """
    keys, offsets, sizes, label_start, label_position = [], [], [], [0], []
    seen: set[str] = set()
    with _open_shard(path) as file:
        for key, members in _group_members(path, file):
            if key in seen:
                raise DataError(f"{path}: two samples have the key '{key}'; make keys unique")
            seen.add(key)
            image = _only_member(path, key, members, IMAGE_EXTENSIONS, "image")
            label = _only_member(path, key, members, ("json", "cls"), "label")
            file.seek(label.offset_data)
            parse = _parse_position if label.name.lower().endswith(".cls") else _parse_labels
            labels = parse(file.read(label.size), f"{path}: {label.name}", taxonomy)
            keys.append(key)
            offsets.append(image.offset_data)
            sizes.append(image.size)
            label_position.extend(labels)
            label_start.append(len(label_position))
    if not keys:
        raise DataError(f"{path}: no samples; delete it, or write it again")
    return ShardIndex(
        Path(recorded_path),
        path.stat().st_size,
        tuple(keys),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(label_start, dtype=np.int64),
        np.array(label_position, dtype=np.int32),
    )


class Split:
    """All shards of one split, its samples numbered through: an ordinal is a sample's place over all shards.

    Shapes: N samples, L labels, C classes.
    """

    def __init__(self, name: str, shards: list[ShardIndex], index_names: list[str], taxonomy: Taxonomy):
        self.name = name
        self.shards = shards
        self.index_names = index_names
        self.taxonomy = taxonomy
        #: (number of shards + 1,) the first ordinal of every shard, and N.
        self.shard_start = np.cumsum([0] + [shard.num_samples for shard in shards])
        label_starts = np.cumsum([0] + [len(shard.label_position) for shard in shards])
        tails = [shard.label_start[1:] + start for shard, start in zip(shards, label_starts, strict=False)]
        #: (N + 1,) where each sample's labels start in `label_output`.
        self.label_start = np.concatenate([[0], *tails]).astype(np.int64)
        positions = np.concatenate([shard.label_position for shard in shards])
        if len(positions) and positions.max() >= taxonomy.num_classes:
            raise DataError(
                f"{name}: a label at position {positions.max()}, but the taxonomy has {taxonomy.num_classes} classes: "
                "it lost classes since the shards were indexed; classes are only ever appended"
            )
        #: (L,) output indices of all labels.
        self.label_output = taxonomy.output_of_position[positions]

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    def labels(self, ordinal: int) -> tuple[int, ...]:
        """The sample's own labels (not smeared), as outputs."""
        return tuple(self.label_output[self.label_start[ordinal] : self.label_start[ordinal + 1]].tolist())

    def key(self, ordinal: int) -> str:
        """`SHARD/KEY`: enough to find the sample by hand."""
        shard = self.shard_of(ordinal)
        return f"{self.shards[shard].path.name}/{self.shards[shard].keys[ordinal - self.shard_start[shard]]}"

    def shard_of(self, ordinal: int) -> int:
        return int(np.searchsorted(self.shard_start, ordinal, side="right")) - 1

    @functools.cached_property
    def sample_of_label(self) -> np.ndarray:
        """(L,) the ordinal of the sample that each label belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.label_start))

    def routed(self, vertical: str) -> np.ndarray:
        """Ordinals of the samples with a label in the vertical, rising (F_map; Gao et al., section 3.1)."""
        number = self.taxonomy.vertical_number(vertical)
        return np.unique(self.sample_of_label[self.taxonomy.vertical_of_output[self.label_output] == number])

    def by_shard(self, ordinals: np.ndarray) -> list[np.ndarray]:
        """Rising ordinals, split into one array per shard."""
        return np.split(ordinals, np.searchsorted(ordinals, self.shard_start[1:-1]))

    def count_labels(self) -> np.ndarray:
        """(C,) the number of samples with each class as their own label."""
        return np.bincount(self.label_output, minlength=self.taxonomy.num_classes)

    def count_smeared(self) -> np.ndarray:
        """(C,) the number of samples with each class among their labels or those labels' ancestors."""
        counts = np.zeros(self.taxonomy.num_classes, dtype=np.int64)
        label_sets, repeats = np.unique(self.label_output, return_counts=True)
        if len(self.label_output) == len(self):  # one label a sample: no union needed
            for output, repeat in zip(label_sets, repeats, strict=True):
                counts[list(self.taxonomy.smear([int(output)]))] += repeat
            return counts
        for ordinal in range(len(self)):
            counts[list(self.taxonomy.smear(self.labels(ordinal)))] += 1
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every key, label, offset and size in order: which data a target or checkpoint was made from."""
        digest = hashlib.sha256(self.taxonomy.fingerprint.encode())
        for shard in self.shards:
            digest.update("\n".join(shard.keys).encode())
            for array in (shard.image_offset, shard.image_size, shard.label_start, shard.label_position):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def load_split(directory: Path, name: str, taxonomy: Taxonomy) -> Split:
    """The split whose indices lie in `directory` as `NAME-*.index`.

    Raises:
        DataError: there is none, or one is damaged or out of date, or two samples of the split share a key.
    """
    paths = sorted(directory.glob(f"{name}-*.index"))
    if not paths:
        raise DataError(f"{directory}: no shards of the split '{name}'; run `concentrate prepare` first")
    shards = [ShardIndex.load(path) for path in paths]
    return Split(name, shards, [path.stem for path in paths], taxonomy)


def check_keys(split: Split) -> None:
    """Raises: DataError where two samples of a split share a key; done once, by `prepare`."""
    owner: dict[str, Path] = {}
    for shard in split.shards:
        for key in shard.keys:
            if key in owner:
                raise DataError(
                    f"{shard.path} and {owner[key]}: both have a sample with the key '{key}'; make keys unique"
                )
            owner[key] = shard.path


def _open_shard(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); bring it back, or correct its permissions"
        ) from None


def _group_members(path: Path, file: BinaryIO) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """(key, members) of each run of members with one key, as `webdataset` groups them."""
    key, members = None, []
    for member in _walk_headers(path, file):
        member_key, extension = base_plus_ext(member.name)
        if not member_key or not extension or not member.isfile() or _NOTE.match(member.name):
            continue
        _check_member(path, member)
        if member_key != key and members:
            yield key, members
            members = []
        key = member_key
        members.append(member)
    if members:
        yield key, members


def _walk_headers(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members of a tar that is whole. `file` may be moved by the caller in between."""
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            yield from tar
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{path}: empty, truncated, compressed or no tar ({error}); write or fetch it again, uncompressed"
        ) from None
    file.seek(end)
    # NOTE: a tar cut between two members reads as a shorter tar; only the missing end mark tells.
    if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise DataError(f"{path}: truncated: no end-of-archive mark after byte {end}; write or fetch it again")


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if member.issparse():
        raise DataError(f"{path}: {member.name} is stored as a sparse file; write the tar again without --sparse")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}: the name {member.name!r} is not UTF-8; rename it and write the tar again") from None
    if "\n" in member.name:
        raise DataError(f"{path}: the name {member.name!r} has a line break; rename it and write the tar again")


def _only_member(
    path: Path, key: str, members: list[tarfile.TarInfo], extensions: tuple[str, ...], what: str
) -> tarfile.TarInfo:
    found = [m for m in members if base_plus_ext(m.name)[1].lower() in extensions]
    if len(found) == 1:
        return found[0]
    have = ", ".join(m.name for m in members)
    raise DataError(
        f"{path}: sample '{key}' has {len(found)} {what}s, expected one (.{', .'.join(extensions)}); its members: {have}"
    )


def _parse_labels(content: bytes, where: str, taxonomy: Taxonomy) -> list[int]:
    """The positions of the class ids of a .json member, sorted, each once."""
    try:
        labels = json.loads(content)["labels"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f'{where}: expected {{"labels": ["class id", ...]}}, found {content[:80]!r}') from None
    if not isinstance(labels, list) or not labels:
        raise DataError(f"{where}: 'labels' is {labels!r}, expected a list of at least one class id")
    for label in labels:
        if not isinstance(label, str) or label not in taxonomy.position:
            raise DataError(f"{where}: label {label!r} is not in the taxonomy; add the class or correct the label")
    return sorted({taxonomy.position[label] for label in labels})


def _parse_position(content: bytes, where: str, taxonomy: Taxonomy) -> list[int]:
    """The position in a .cls member."""
    text = content.decode("ascii", errors="replace").strip()
    if not text.isdigit() or len(text) > 12 or int(text) >= taxonomy.num_classes:
        raise DataError(
            f"{where}: '{text[:40]}' is no position in a taxonomy of {taxonomy.num_classes} classes; correct it"
        )
    return [int(text)]
