"""A split: the indices of all its shards as one sequence of samples, with their labels.

Shapes: N samples of the split, L labels of all its samples, C classes, M verticals, S samples of one shard.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from concentration.data.index import ShardIndex
from concentration.data.remote import Location, name_of
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

#: How many shards' indices stay in memory; an index takes about 50 bytes per sample.
_KEPT_INDICES = 256

#: How many samples' smeared labels are expanded at once while they are counted, which bounds the memory that counting takes.
COUNTED_TOGETHER = 2**18


class Split:
    """All shards of one split. An ordinal numbers its samples from 0 to N - 1, shard after shard.

    The labels of all samples are held in memory; keys and offsets only for the shards that were used last.

    Args:
        name: `train`, `val` or `test`.
        shards: the index of each shard; each is used once here, and may be dropped from memory then.
        index_names: (number of shards,) the file name of each index, without its suffix.
        taxonomy: the taxonomy that the labels belong to.
        directory: the folder of the indices.

    Raises:
        DataError: a label has a position that the taxonomy lacks.
    """

    def __init__(
        self, name: str, shards: Sequence[ShardIndex], index_names: list[str], taxonomy: Taxonomy, directory: Path
    ):
        self.name = name
        self.directory = directory
        self.shards = shards
        self.index_names = index_names
        self.taxonomy = taxonomy
        #: Whether any shard is behind a URL, and has to be fetched before it can be read.
        self.is_remote = False
        num_samples, sizes, digests, counts, positions = [], [], [], [], []
        for shard in shards:
            num_samples.append(shard.num_samples)
            sizes.append(shard.size_bytes)
            digests.append(shard.digest)
            counts.append(np.diff(shard.label_start))
            positions.append(shard.label_position)
            self.is_remote |= isinstance(shard.path, str)
        #: (number of shards,) int64, the size of each tar in bytes.
        self.shard_bytes = np.array(sizes, dtype=np.int64)
        #: (number of shards + 1,) the first ordinal of every shard, and at the end N.
        self.shard_start = np.cumsum([0, *num_samples])
        #: (number of shards,) the digest of each shard's index.
        self.digests: Sequence[str] = digests
        #: (N + 1,) int64; the labels of sample n are `label_output[label_start[n]:label_start[n + 1]]`.
        self.label_start = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)
        positions = np.concatenate(positions)
        if len(positions) and positions.max() >= taxonomy.num_classes:
            raise DataError(
                f"{name}: a label at position {positions.max()}, but the taxonomy has {taxonomy.num_classes} classes: "
                "it lost classes since the shards were indexed; classes are only ever appended"
            )
        #: (L,) int32, the labels of all samples as output indices.
        self.label_output = taxonomy.output_of_position.astype(np.int32)[positions]

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    @property
    def has_one_label_each(self) -> bool:
        """Whether every sample has exactly one label, as in single-label classification."""
        return bool((np.diff(self.label_start) == 1).all())

    def labels(self, ordinal: int) -> tuple[int, ...]:
        """The labels of one sample as output indices, without their ancestors."""
        return tuple(self.label_output[self.label_start[ordinal] : self.label_start[ordinal + 1]].tolist())

    def label_pairs(self, ordinals: np.ndarray, smear: bool) -> tuple[np.ndarray, np.ndarray]:
        """The labels of these samples, as two arrays of equal length: the row in `ordinals`, and the output index.

        Each pair comes once, in ascending order. With `smear`, a sample also has the ancestors of its labels.
        """
        sample, label = _expand_each(self.label_start, ordinals)
        outputs = self.label_output[label]
        if smear:
            start, smeared = self.taxonomy.smeared_outputs
            owner, place = _expand_each(start, outputs)
            sample, outputs = sample[owner], smeared[place]
        num_classes = self.taxonomy.num_classes
        return np.divmod(np.unique(sample * num_classes + outputs), num_classes)

    def key(self, ordinal: int) -> str:
        """`SHARD/KEY` of one sample, by which a person finds it in its tar."""
        number = self.shard_of(ordinal)
        shard = self.shards[number]
        return f"{name_of(shard.path)}/{shard.keys[ordinal - self.shard_start[number]]}"

    def shard_of(self, ordinal: int) -> int:
        """The number of the shard that holds the sample."""
        return int(np.searchsorted(self.shard_start, ordinal, side="right")) - 1

    @functools.cached_property
    def sample_of_label(self) -> np.ndarray:
        """(L,) int64, the ordinal of the sample that each label belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.label_start))

    def routed(self, vertical: str) -> np.ndarray:
        """Ordinals of the samples with a label in the vertical, ascending. Source: F_map of Gao et al., section 3.1."""
        number = self.taxonomy.vertical_number(vertical)
        return np.unique(self.sample_of_label[self.taxonomy.vertical_of_output[self.label_output] == number])

    def count_routed(self) -> np.ndarray:
        """(M,) the number of samples with a label in each vertical; `len(routed(vertical))` of all verticals in one pass."""
        pairs = np.unique(self.taxonomy.vertical_of_output[self.label_output] * len(self) + self.sample_of_label)
        return np.bincount(pairs // len(self), minlength=self.taxonomy.num_verticals)

    def with_leaf(self, vertical: str | None = None) -> np.ndarray:
        """Ordinals, ascending, of the samples that have a leaf among their labels.

        Given a vertical, only its classes count, and a leaf is a class without children inside that vertical.
        """
        is_leaf_C = self.taxonomy.is_leaf
        if vertical is not None:
            is_leaf_C = np.zeros_like(is_leaf_C)
            is_leaf_C[self.taxonomy.vertical_slice(vertical)] = self.taxonomy.restrict(vertical).is_leaf
        return np.unique(self.sample_of_label[is_leaf_C[self.label_output]])

    def by_shard(self, ordinals: np.ndarray | range) -> list[np.ndarray] | list[range]:
        """Divides ascending ordinals by shard: one array per shard, or one range per shard if they are a range of step 1.

        Ranges take no memory, which matters for a split of 100 million samples.
        """
        if isinstance(ordinals, range):
            bounds = np.clip(self.shard_start, ordinals.start, ordinals.stop).tolist()
            return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        return np.split(ordinals, np.searchsorted(ordinals, self.shard_start[1:-1]))

    def count_in(self, ordinals: np.ndarray, smear: bool) -> np.ndarray:
        """(C,) int64: how many of these samples have each class as a label, or, with `smear`, as a label or its ancestor."""
        counts_C = np.zeros(self.taxonomy.num_classes, dtype=np.int64)
        for some in np.split(ordinals, range(COUNTED_TOGETHER, len(ordinals), COUNTED_TOGETHER)):
            counts_C += np.bincount(self.label_pairs(some, smear)[1], minlength=len(counts_C))
        return counts_C

    def count_labels(self) -> np.ndarray:
        """(C,) int64: the number of samples of the split that have each class as a label."""
        return np.bincount(self.label_output, minlength=self.taxonomy.num_classes)

    def count_smeared(self) -> np.ndarray:
        """(C,) int64: the number of samples of the split that have each class as a label or as the ancestor of one.

        The same as `count_in` of all samples with `smear`, but samples with one label are not expanded one by one.
        """
        num_classes = self.taxonomy.num_classes
        start, smeared = self.taxonomy.smeared_outputs
        has_one = np.diff(self.label_start) == 1
        of_one = np.bincount(self.label_output[self.label_start[:-1][has_one]], minlength=num_classes)
        owner, place = _expand_each(start, np.arange(num_classes))
        counts = np.zeros(num_classes, dtype=np.int64)
        np.add.at(counts, smeared[place], of_one[owner])
        # A sample with several labels counts once for an ancestor that they share.
        return counts + self.count_in(np.flatnonzero(~has_one), smear=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the taxonomy and of every key, label, offset and image: it records which data targets were computed from."""
        return hashlib.sha256("\n".join([self.taxonomy.fingerprint, *self.digests]).encode()).hexdigest()[:16]


def load_split(directory: Path, name: str, taxonomy: Taxonomy) -> Split:
    """The split `name`, whose indices lie in `directory` as `NAME-*.index`.

    Raises:
        DataError: there is no index of that split, or one is damaged, or its shard has changed since.
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
    """The advice that an error gives where prepared data lacks a split: which options make one."""
    return f"set data.split.{name}_per_class or a larger data.split.{name}_share, or of given shards give some as data.{name}"


def check_keys(split: Split) -> None:
    """Checks that all keys of a split differ; `prepare` does this once.

    To save memory, hashes of the keys (8 bytes per sample) are sorted, and only keys with equal hashes are compared.

    Raises:
        DataError: two samples of the split have the same key.
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
    """The index of each shard of a split. An index is read when it is accessed, and the last `_KEPT_INDICES` stay in memory.

    Raises:
        DataError: an index is damaged, or has changed since it was first read.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._digests: dict[int, str] = {}
        self._load = functools.lru_cache(_KEPT_INDICES)(self._load_unchanged)

    def __getstate__(self):  # a cache cannot be pickled, so worker processes start with an empty one
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
    """Concatenates `range(bounds[row], bounds[row + 1])` of all `rows`.

    Returns two arrays of equal length: which place in `rows` a number comes from, and the number.
    """
    starts = bounds[rows]
    lengths = bounds[rows + 1] - starts
    owner = np.repeat(np.arange(len(rows)), lengths)
    first = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) - first[owner] + starts[owner]


def _hash_keys(shard: ShardIndex) -> np.ndarray:
    """(S,) int64: Python's hash of each key, which is the same inside one process only."""
    keys = shard.key_bytes.tobytes().split(b"\n")
    return np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
