"""The targets of samples by ordinal: from their labels, or from stored soft targets.

Shapes: B batch, K targets a sample, R rows of a shard.
"""

import functools
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from concentration.data.index import Split
from concentration.errors import DataError
from concentration.targets import SoftTargets, TargetRecords


class SampleTargets(Protocol):
    def lookup(self, ordinals: np.ndarray) -> SoftTargets:
        """The targets of these samples, one row each; the number of columns is the same for every batch."""


class LabelTargets:
    """Hard labels, smeared to their ancestors or not; of all verticals, or of one, counted from its first class.

    Source: Gao et al., section 3.1: teachers and the generalist train on smeared labels.
    """

    def __init__(self, split: Split, smear: bool, vertical: str | None = None):
        self._split = split
        self._smear = smear
        taxonomy = split.taxonomy
        self._outputs = slice(0, taxonomy.num_classes) if vertical is None else taxonomy.vertical_slice(vertical)
        self._targets_of = functools.lru_cache(maxsize=2**18)(self._compute_targets)

    def __getstate__(self):  # a cache does not travel to worker processes
        return {name: value for name, value in self.__dict__.items() if name != "_targets_of"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._targets_of = functools.lru_cache(maxsize=2**18)(self._compute_targets)

    def lookup(self, ordinals: np.ndarray) -> SoftTargets:
        index_BK = np.zeros((len(ordinals), self._width), dtype=np.int64)
        probability_BK = np.zeros(index_BK.shape, dtype=np.float32)
        for row, ordinal in enumerate(ordinals):
            outputs = self._targets_of(self._split.labels(ordinal))
            index_BK[row, : len(outputs)] = outputs
            probability_BK[row, : len(outputs)] = 1.0
        return SoftTargets(torch.from_numpy(index_BK), torch.from_numpy(probability_BK))

    def _compute_targets(self, labels: tuple[int, ...]) -> np.ndarray:
        outputs = self._split.taxonomy.smear(labels) if self._smear else labels
        inside = [o - self._outputs.start for o in outputs if self._outputs.start <= o < self._outputs.stop]
        return np.array(inside, dtype=np.int64)

    @functools.cached_property
    def _width(self) -> int:
        split = self._split
        if len(split.label_output) == len(split):
            widths = [len(self._compute_targets((int(o),))) for o in np.unique(split.label_output)]
        else:
            widths = [len(self._targets_of(split.labels(ordinal))) for ordinal in range(len(split))]
        return max(widths) or 1


class StoredTargets:
    """The teachers' soft targets from `targets/NAME`; a sample with labels in several verticals gets all of theirs.

    Args:
        directory: `targets/NAME`.
        split: whose samples the targets are of.

    Raises:
        DataError: a vertical's targets are missing, or were made from another taxonomy or other data.
    """

    def __init__(self, directory: Path, split: Split):
        self._directory = directory
        self._split = split
        self._kept: dict[str, int] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        for vertical in split.taxonomy.verticals:
            manifest = load_manifest(directory / vertical, split)
            self._kept[vertical] = manifest["num_kept"]
            self._rows[vertical] = split.by_shard(split.routed(vertical))
        self._width = self._compute_width()
        self._load_shard = functools.lru_cache(maxsize=64)(self._merge_shard)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_load_shard"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load_shard = functools.lru_cache(maxsize=64)(self._merge_shard)

    def lookup(self, ordinals: np.ndarray) -> SoftTargets:
        index_BK = np.empty((len(ordinals), self._width), dtype=np.int64)
        probability_BK = np.empty(index_BK.shape, dtype=np.float32)
        shards = np.searchsorted(self._split.shard_start, ordinals, side="right") - 1
        for shard in np.unique(shards):
            inside = shards == shard
            index_RK, probability_RK = self._load_shard(int(shard))
            rows = ordinals[inside] - self._split.shard_start[shard]
            index_BK[inside], probability_BK[inside] = index_RK[rows], probability_RK[rows]
        return SoftTargets(torch.from_numpy(index_BK), torch.from_numpy(probability_BK))

    def _merge_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """All verticals' records of a shard side by side: int32 outputs and float16 probabilities, (R, width)."""
        split, taxonomy = self._split, self._split.taxonomy
        num_rows = split.shards[shard].num_samples
        index_RK = np.zeros((num_rows, self._width), dtype=np.int32)
        probability_RK = np.zeros((num_rows, self._width), dtype=np.float16)
        filled = np.zeros(num_rows, dtype=np.int64)
        for vertical, rows_by_shard in self._rows.items():
            expected = rows_by_shard[shard] - split.shard_start[shard]
            if not len(expected):
                continue
            outputs = taxonomy.vertical_slice(vertical)
            path = self._directory / vertical / f"{split.index_names[shard]}.safetensors"
            records = TargetRecords.load(path, outputs.stop - outputs.start)
            if not np.array_equal(records.row, expected):
                raise DataError(f"{path}: holds other rows than the shard has for '{vertical}'; make the targets again")
            if records.index.shape[1] != self._kept[vertical]:
                raise DataError(
                    f"{path}: keeps {records.index.shape[1]} classes a sample, but its manifest says "
                    f"{self._kept[vertical]}; make the targets again"
                )
            columns = filled[expected, None] + np.arange(records.index.shape[1])
            index_RK[expected[:, None], columns] = records.index.astype(np.int32) + outputs.start
            probability_RK[expected[:, None], columns] = records.probability
            filled[expected] += records.index.shape[1]
        return index_RK, probability_RK

    def _compute_width(self) -> int:
        """The most targets that any sample has."""
        width = np.zeros(len(self._split), dtype=np.int64)
        for vertical, rows_by_shard in self._rows.items():
            width[np.concatenate(rows_by_shard)] += self._kept[vertical]
        return int(width.max())


def load_manifest(directory: Path, split: Split) -> dict:
    """The manifest of one vertical's targets.

    Raises:
        DataError: it is missing, or belongs to another taxonomy or other data.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_complete = isinstance(manifest["num_kept"], int)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        is_complete = False
    if not is_complete:
        raise DataError(f"{path}: missing or damaged; run `concentrate targets vertical={directory.name}` first")
    for what, found, expected in (
        ("taxonomy", manifest.get("taxonomy"), split.taxonomy.fingerprint),
        ("data", manifest.get("data"), split.fingerprint),
    ):
        if found != expected:
            raise DataError(f"{path}: made from another {what} ({found}, here {expected}); make the targets again")
    return manifest
