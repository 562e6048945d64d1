"""The index of a shard: where each sample's image lies in the tar, its checksum, its key and its labels.

An index is made by walking the tar's headers, both for shards that we wrote and for given ones. With it any sample is one
`pread` away, and nobody streams through the tar.

Shapes: S samples of a shard, L labels of all its samples, K bytes of all its keys.
"""

import functools
import hashlib
import itertools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from concentration.array_files import load_arrays, load_metadata, save_arrays
from concentration.data.remote import Location, is_url, name_of
from concentration.data.shard_members import LabelMember, walk_samples
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

#: At most so many shards' indices stay in memory, at 50 bytes a sample.
_KEPT_INDICES = 256

#: Samples whose smeared labels are counted at a time.
COUNTED_TOGETHER = 2**18

_ARRAYS = ("key_bytes", "image_offset", "image_size", "image_crc32", "label_start", "label_position")


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard without opening it.

    Attributes:
        path: the tar file; a URL (str) where it is remote.
        size_bytes: of the tar file when it was indexed.
        key_bytes: (K,) uint8, the keys of the samples in the order of the tar, as UTF-8, a line break between two.
        image_offset: (S,) int64, where each encoded image starts in the tar.
        image_size: (S,) int64, its length in bytes.
        image_crc32: (S,) uint32, its checksum, so that the index covers contents and not only places.
        label_start: (S + 1,) int64; sample s has the labels `label_position[label_start[s]:label_start[s + 1]]`.
        label_position: (L,) int32 positions in taxonomy.json, which never change; the output index may, when classes come.
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
        """(S,) decoded anew each time: as strings, the keys of a large split would not fit into memory."""
        return tuple(self.key_bytes.tobytes().decode().split("\n"))

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything but the path: which samples these are, with which images and labels; 64 hex digits."""
        hasher = hashlib.sha256(str(self.size_bytes).encode())
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            hasher.update(f"{name} {array.dtype} {array.shape}".encode())
            hasher.update(array.data)
        return hasher.hexdigest()

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        header = {"path": str(self.path), "size_bytes": str(self.size_bytes), "digest": self.digest}
        save_arrays(path, arrays, header)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Raises: DataError where the index is damaged, or its shard is a file and is gone or has changed its size."""
        header = load_metadata(path)
        arrays = load_arrays(path, _ARRAYS)
        again = f"or delete {path.parent} and run `concentrate prepare` again"
        try:
            recorded = header["path"]
            if len(recorded.splitlines()) != 1:
                raise ValueError(f"its shard is {recorded!r}")
            # A relative path is relative to the index: a working directory may be moved as a whole.
            index = cls(recorded if is_url(recorded) else path.parent / recorded, int(header["size_bytes"]), **arrays)
            if index.digest != header["digest"]:
                raise ValueError("its checksum is not that of its content")
            index._check()
        except (KeyError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); bring it back, {again}") from None
        if isinstance(index.path, str):
            return index
        if not os.path.exists(index.path):  # Path.exists raises OSError where a name is too long
            raise DataError(f"{index.path}: no such file, but {path} describes it; bring it back, {again}")
        if index.path.stat().st_size != index.size_bytes:
            raise DataError(
                f"{index.path}: {index.path.stat().st_size} bytes, but {index.size_bytes} when it was indexed: "
                f"it is truncated or has changed; bring it back, {again}"
            )
        return index

    def _check(self) -> None:
        """Raises: ValueError where the parts do not fit together."""
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
    """Walks a tar's headers, reads its labels and takes its images' checksums.

    Args:
        path: the tar on this machine.
        taxonomy: the taxonomy of its labels.
        recorded_path: the path, or URL, that the index will record for the tar, and that errors name.
        label_member: which member holds the labels.

    Raises:
        DataError: naming the file and member, where the tar is missing, empty or truncated, a sample lacks its image or
            labels or has two, a key comes twice, or a label is not in the taxonomy.
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


class Split:
    """All shards of one split. Its samples are numbered through: an ordinal is a sample's place over all shards.

    Labels are held for all samples, keys and places only of the shards that are being read. `directory` is where the
    indices lie.

    Shapes: N samples, L labels, C classes.
    """

    def __init__(
        self, name: str, shards: Sequence[ShardIndex], index_names: list[str], taxonomy: Taxonomy, directory: Path
    ):
        self.name = name
        self.directory = directory
        self.shards = shards
        self.index_names = index_names
        self.taxonomy = taxonomy
        #: Whether a shard has to be fetched before it can be read.
        self.is_remote = False
        num_samples, sizes, digests, counts, positions = [], [], [], [], []
        for shard in shards:  # each is loaded once, and may be dropped then
            num_samples.append(shard.num_samples)
            sizes.append(shard.size_bytes)
            digests.append(shard.digest)
            counts.append(np.diff(shard.label_start))
            positions.append(shard.label_position)
            self.is_remote |= isinstance(shard.path, str)
        #: (number of shards,) bytes of each tar.
        self.shard_bytes = np.array(sizes, dtype=np.int64)
        #: (number of shards + 1,) the first ordinal of every shard, and N.
        self.shard_start = np.cumsum([0, *num_samples])
        #: A hash of each shard's index.
        self.digests: Sequence[str] = digests
        #: (N + 1,) where each sample's labels start in `label_output`.
        self.label_start = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)
        positions = np.concatenate(positions)
        if len(positions) and positions.max() >= taxonomy.num_classes:
            raise DataError(
                f"{name}: a label at position {positions.max()}, but the taxonomy has {taxonomy.num_classes} classes: "
                "it lost classes since the shards were indexed; classes are only ever appended"
            )
        #: (L,) int32 output indices of all labels.
        self.label_output = taxonomy.output_of_position.astype(np.int32)[positions]

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    @property
    def has_one_label_each(self) -> bool:
        return bool((np.diff(self.label_start) == 1).all())

    def labels(self, ordinal: int) -> tuple[int, ...]:
        """The sample's own labels (not smeared), as outputs."""
        return tuple(self.label_output[self.label_start[ordinal] : self.label_start[ordinal + 1]].tolist())

    def label_pairs(self, ordinals: np.ndarray, smear: bool) -> tuple[np.ndarray, np.ndarray]:
        """(place in `ordinals`, output) of these samples' labels, with their ancestors where `smear`; rising, each once."""
        sample, label = _expand_each(self.label_start, ordinals)
        outputs = self.label_output[label]
        if smear:
            start, smeared = self.taxonomy.smeared_outputs
            owner, place = _expand_each(start, outputs)
            sample, outputs = sample[owner], smeared[place]
        num_classes = self.taxonomy.num_classes
        return np.divmod(np.unique(sample * num_classes + outputs), num_classes)

    def key(self, ordinal: int) -> str:
        """`SHARD/KEY`: enough to find the sample by hand."""
        number = self.shard_of(ordinal)
        shard = self.shards[number]
        return f"{name_of(shard.path)}/{shard.keys[ordinal - self.shard_start[number]]}"

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

    def count_routed(self) -> np.ndarray:
        """(M,) the number of samples with a label in each vertical: `len(routed(vertical))` for all, in one pass."""
        pairs = np.unique(self.taxonomy.vertical_of_output[self.label_output] * len(self) + self.sample_of_label)
        return np.bincount(pairs // len(self), minlength=self.taxonomy.num_verticals)

    def with_leaf(self, vertical: str | None = None) -> np.ndarray:
        """Ordinals, rising, of the samples with a leaf among their labels; of a vertical's own tree, where one is given."""
        is_leaf_C = self.taxonomy.is_leaf
        if vertical is not None:
            is_leaf_C = np.zeros_like(is_leaf_C)
            is_leaf_C[self.taxonomy.vertical_slice(vertical)] = self.taxonomy.restrict(vertical).is_leaf
        return np.unique(self.sample_of_label[is_leaf_C[self.label_output]])

    def by_shard(self, ordinals: np.ndarray | range) -> list[np.ndarray] | list[range]:
        """Rising ordinals, split into one array per shard; a range (of step 1) into ranges, which take no memory."""
        if isinstance(ordinals, range):
            bounds = np.clip(self.shard_start, ordinals.start, ordinals.stop).tolist()
            return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        return np.split(ordinals, np.searchsorted(ordinals, self.shard_start[1:-1]))

    def count_in(self, ordinals: np.ndarray, smear: bool) -> np.ndarray:
        """(C,) how many of these samples have each class as their own label, or among those labels' ancestors."""
        counts_C = np.zeros(self.taxonomy.num_classes, dtype=np.int64)
        for some in np.split(ordinals, range(COUNTED_TOGETHER, len(ordinals), COUNTED_TOGETHER)):
            counts_C += np.bincount(self.label_pairs(some, smear)[1], minlength=len(counts_C))
        return counts_C

    def count_labels(self) -> np.ndarray:
        """(C,) the number of samples with each class as their own label."""
        return np.bincount(self.label_output, minlength=self.taxonomy.num_classes)

    def count_smeared(self) -> np.ndarray:
        """(C,) the number of samples with each class among their labels or those labels' ancestors."""
        num_classes = self.taxonomy.num_classes
        start, smeared = self.taxonomy.smeared_outputs
        has_one = np.diff(self.label_start) == 1
        of_one = np.bincount(self.label_output[self.label_start[:-1][has_one]], minlength=num_classes)
        owner, place = _expand_each(start, np.arange(num_classes))
        counts = np.zeros(num_classes, dtype=np.int64)
        np.add.at(counts, smeared[place], of_one[owner])
        # Of the others, a class counts once, however many of the sample's labels lie below it.
        return counts + self.count_in(np.flatnonzero(~has_one), smear=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every key, label, place and image in order: which data a target or checkpoint was made from."""
        return hashlib.sha256("\n".join([self.taxonomy.fingerprint, *self.digests]).encode()).hexdigest()[:16]


def load_split(directory: Path, name: str, taxonomy: Taxonomy) -> Split:
    """The split whose indices lie in `directory` as `NAME-*.index`.

    Raises:
        DataError: there is none, or one is damaged or out of date.
    """
    paths = sorted(directory.glob(f"{name}-*.index"))
    if not paths:
        there = sorted({path.name.rpartition("-")[0] for path in directory.glob("*-*.index")})
        if not there:
            raise DataError(f"{directory}: no shards of the split '{name}'; run `concentrate prepare` first")
        raise DataError(
            f"{directory}: no shards of the split '{name}', only of {', '.join(there)}; {describe_missing_split(name)}, and "
            "prepare again with overwrite=true"
        )
    return Split(name, _StoredIndices(paths), [path.stem for path in paths], taxonomy, directory)


def describe_missing_split(name: str) -> str:
    """Advice on how to give prepared data a split that it lacks."""
    return f"set data.split.{name}_per_class or a larger data.split.{name}_share, or of given shards give some as data.{name}"


def check_keys(split: Split) -> None:
    """Raises: DataError where two samples of a split share a key. `prepare` checks this once.

    Hashes of the keys (8 bytes a sample) are sorted, and only keys with equal hashes are compared.
    """
    hashes = np.sort(np.concatenate([_hash_keys(shard) for shard in split.shards]))
    met = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(met):
        return
    owner: dict[str, Location] = {}
    for shard in split.shards:
        keys = shard.keys
        for row in np.flatnonzero(np.isin(_hash_keys(shard), met)):
            key = keys[row]
            if key in owner:
                raise DataError(
                    f"{shard.path} and {owner[key]}: both have a sample with the key '{key}'; make keys unique"
                )
            owner[key] = shard.path


class _StoredIndices(Sequence):
    """The indices of a split by number. They are read when they are asked for, and the most recent ones are kept.

    Raises:
        DataError: an index is damaged, or has changed since it was first read.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._digests: dict[int, str] = {}
        self._load = functools.lru_cache(_KEPT_INDICES)(self._load_unchanged)

    def __getstate__(self):  # a cache does not travel to worker processes
        return {name: value for name, value in self.__dict__.items() if name != "_load"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load = functools.lru_cache(_KEPT_INDICES)(self._load_unchanged)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> ShardIndex:
        return self._load(number)

    def _load_unchanged(self, number: int) -> ShardIndex:
        index = ShardIndex.load(self._paths[number])
        if self._digests.setdefault(number, index.digest) != index.digest:
            raise DataError(f"{self._paths[number]}: was written anew while it was in use; run the same command again")
        return index


def _expand_each(bounds: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `range(bounds[row], bounds[row + 1])` for all rows, concatenated: (the row of each, the numbers)."""
    starts = bounds[rows]
    lengths = bounds[rows + 1] - starts
    owner = np.repeat(np.arange(len(rows)), lengths)
    first = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) - first[owner] + starts[owner]


def _hash_keys(shard: ShardIndex) -> np.ndarray:
    """(S,) int64."""
    keys = shard.key_bytes.tobytes().split(b"\n")
    return np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))


def _open_shard(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); bring it back, or correct its permissions"
        ) from None
