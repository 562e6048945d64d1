"""Looks up the targets of samples by ordinal: from their labels, from stored soft targets, or from a mixture of both.

Shapes: B batch, K targets of a sample (the same number for all; those that a sample lacks have probability 0), M verticals.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from concentration.data.distortions import are_distorted
from concentration.data.split import COUNTED_TOGETHER, Split
from concentration.data.views import INTERPOLATION, StoredViews, describe_decoder
from concentration.errors import DataError
from concentration.label_mix import LabelMix
from concentration.packed_targets import VIEW_BYTES
from concentration.schema import check_choice, parse_json, write_override
from concentration.targets import SoftTargets, TargetFile

#: What becomes of the tail mass; see `StoredTargets`.
Tail = Literal["zero", "spread"]


class SampleTargets(Protocol):
    """Gives the targets of samples."""

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        """The targets of these samples in this epoch, one row each; the number of columns is the same for every batch."""

    def views(self, ordinals: np.ndarray, epoch: int) -> StoredViews | None:
        """The views that the targets were computed from; None if they hold for any view."""


class LabelTargets:
    """Hard labels as targets with probability 1.

    Args:
        split: the split of the samples.
        smear: whether the ancestors of a label are targets, too.
        vertical: only the labels of this vertical are targets, and its first class has index 0; None takes all labels.

    Source: Gao et al., section 3.1: teachers and the generalist train on smeared labels.
    """

    def __init__(self, split: Split, smear: bool, vertical: str | None = None):
        self._split = split
        self._smear = smear
        taxonomy = split.taxonomy
        self._outputs = slice(0, taxonomy.num_classes) if vertical is None else taxonomy.vertical_slice(vertical)

    def lookup(self, ordinals: np.ndarray, epoch: int = 0) -> SoftTargets:
        """The targets of these samples, which are the same in every epoch."""
        row, output = self._find_targets(ordinals)
        num_targets_B = np.bincount(row, minlength=len(ordinals))
        column = np.arange(len(row)) - (np.cumsum(num_targets_B) - num_targets_B)[row]
        index_BK = np.zeros((len(ordinals), self._width), dtype=np.int64)
        probability_BK = np.zeros(index_BK.shape, dtype=np.float32)
        index_BK[row, column], probability_BK[row, column] = output, 1
        return SoftTargets(torch.from_numpy(index_BK), torch.from_numpy(probability_BK))

    def views(self, ordinals: np.ndarray, epoch: int) -> None:
        return None

    def _find_targets(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The targets as two arrays of equal length: the row in `ordinals`, and the class. Ascending by row, then class."""
        row, output = self._split.label_pairs(ordinals, self._smear)
        is_inside = (self._outputs.start <= output) & (output < self._outputs.stop)
        return row[is_inside], output[is_inside] - self._outputs.start

    @functools.cached_property
    def _width(self) -> int:
        """K: the largest number of targets of any sample, but at least 1."""
        split = self._split
        samples = np.arange(len(split))
        if split.has_one_label_each:  # samples of one class have equally many targets, so one of each class will do
            samples = np.unique(split.label_output, return_index=True)[1]
        parts = np.split(samples, range(COUNTED_TOGETHER, len(samples), COUNTED_TOGETHER))
        return max(1, *(np.bincount(self._find_targets(part)[0]).max(initial=0) for part in parts))


class _ShardTargets(NamedTuple):
    """The soft targets of all verticals for the samples of one shard, in one of their stored views.

    index_RW: int32, output indices: the top K of the sample's first vertical, then those of its next, and so on.
    probability_RW: float16, the probability of each.
    num_filled_R: int64, how many of the W columns a row uses; the others hold zeros.
    background_RM: float32, the probability of each class of a vertical outside its top K; None if it is taken as 0.
    view_RV: (R, 13) uint8, the views' records; None if the targets hold for any view.

    Shapes: R rows (samples of the shard), W the largest number of targets of any sample of the split, M verticals.
    """

    index_RW: np.ndarray
    probability_RW: np.ndarray
    num_filled_R: np.ndarray
    background_RM: np.ndarray | None
    view_RV: np.ndarray | None


class StoredTargets:
    """The teachers' soft targets from `targets/NAME`. A sample with labels in several verticals gets the targets of each of them.

    If R views of every sample were stored, epoch e replays view e mod R.

    Args:
        directory: `targets/NAME`.
        split: the split that the targets were made for.
        tail: the probability of classes outside the top K: `zero` takes it as 0 (Gao et al., section 3.1), `spread` divides the
            stored tail mass of each of the sample's verticals evenly among that vertical's other classes.

    Raises:
        DataError: a vertical's targets are missing or damaged, or were made from another taxonomy or other data.
        ConfigError: `tail` is another word.
    """

    def __init__(self, directory: Path, split: Split, tail: Tail = "zero"):
        check_choice("tail", tail, Tail)
        self._directory = directory
        self._split = split
        self._tail = tail
        manifests = {vertical: load_manifest(directory / vertical, split) for vertical in split.taxonomy.verticals}
        self._kept: dict[str, int] = {vertical: manifest["num_kept"] for vertical, manifest in manifests.items()}
        views = {vertical: manifest["views"] for vertical, manifest in manifests.items()}
        if len(set(views.values())) > 1:
            raise DataError(f"{directory}: the verticals hold different numbers of views, {views}; make them alike")
        self._num_views = next(iter(views.values()))
        if self._num_views:
            _compare_decoders(directory, manifests)
        self._width = self._compute_width()
        #: (number of shards, M) bool: whether the checksum of a file has been verified. That is done once.
        self._is_verified = np.zeros((len(split.shards), split.taxonomy.num_verticals), dtype=bool)
        self._load_shard = functools.lru_cache(maxsize=64)(self._merge_shard)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_load_shard"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load_shard = functools.lru_cache(maxsize=64)(self._merge_shard)

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        """The stored targets of these samples, in the view that this epoch replays."""
        index_BK = np.empty((len(ordinals), self._width), dtype=np.int64)
        probability_BK = np.empty(index_BK.shape, dtype=np.float32)
        background_BM = np.zeros((len(ordinals), self._split.taxonomy.num_verticals), dtype=np.float32)
        num_filled_B = np.empty(len(ordinals), dtype=np.int64)
        for inside, rows, stored in self._by_shard(ordinals, epoch):
            index_BK[inside], probability_BK[inside] = stored.index_RW[rows], stored.probability_RW[rows]
            if stored.background_RM is not None:
                background_BM[inside], num_filled_B[inside] = stored.background_RM[rows], stored.num_filled_R[rows]
        if self._tail == "zero":
            return SoftTargets(torch.from_numpy(index_BK), torch.from_numpy(probability_BK))
        # SoftTargets adds the background to every class of a vertical; subtracted here, a listed class keeps its own probability.
        vertical_BK = self._split.taxonomy.vertical_of_output[index_BK]
        is_listed = np.arange(self._width) < num_filled_B[:, None]
        probability_BK -= np.where(is_listed, np.take_along_axis(background_BM, vertical_BK, axis=1), 0)
        return SoftTargets(*map(torch.from_numpy, (index_BK, probability_BK, background_BM)))

    def views(self, ordinals: np.ndarray, epoch: int) -> StoredViews | None:
        """The views that this epoch replays; None if no views were stored."""
        if self._num_views == 0:
            return None
        view_BV = np.empty((len(ordinals), VIEW_BYTES), dtype=np.uint8)
        for inside, rows, stored in self._by_shard(ordinals, epoch):
            view_BV[inside] = stored.view_RV[rows]
        return StoredViews(view_BV)

    def _by_shard(self, ordinals: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, _ShardTargets]]:
        """Yields for each shard of the batch: a mask (B,) of its samples, their rows in the shard, and the shard's targets."""
        shards = np.searchsorted(self._split.shard_start, ordinals, side="right") - 1
        view = epoch % max(1, self._num_views)
        for shard in np.unique(shards):
            inside = shards == shard
            yield inside, ordinals[inside] - self._split.shard_start[shard], self._load_shard(int(shard), view)

    def _merge_shard(self, shard: int, view: int) -> _ShardTargets:
        """Reads the targets of all verticals for one shard and one of the stored views."""
        split, taxonomy = self._split, self._split.taxonomy
        num_rows = split.shards[shard].num_samples
        merged = _ShardTargets(
            index_RW=np.zeros((num_rows, self._width), dtype=np.int32),
            probability_RW=np.zeros((num_rows, self._width), dtype=np.float16),
            num_filled_R=np.zeros(num_rows, dtype=np.int64),
            background_RM=np.zeros((num_rows, taxonomy.num_verticals), np.float32) if self._tail == "spread" else None,
            view_RV=np.zeros((num_rows, VIEW_BYTES), dtype=np.uint8) if self._num_views else None,
        )
        for number, vertical in enumerate(taxonomy.verticals):
            if len(rows := self._rows_in(shard, number)):
                self._add_vertical(merged, shard, view, vertical, rows)
                self._is_verified[shard, number] = True
        return merged

    def _add_vertical(self, merged: _ShardTargets, shard: int, view: int, vertical: str, rows: np.ndarray) -> None:
        """Reads the targets of one vertical, which must be of exactly these rows, and appends them to `merged`."""
        outputs, num_kept = self._split.taxonomy.vertical_slice(vertical), self._kept[vertical]
        number = self._split.taxonomy.vertical_number(vertical)
        vertical_size = outputs.stop - outputs.start
        path = self._directory / vertical / f"{self._split.index_names[shard]}.safetensors"
        file = TargetFile(path, vertical_size, num_kept)
        if not self._is_verified[shard, number]:
            file.verify()
        if not np.array_equal(file.row, rows):
            raise DataError(f"{path}: holds other rows than the shard has for '{vertical}'; make the targets again")
        if (file.has_views, file.num_views) != (self._num_views > 0, max(1, self._num_views)):
            raise DataError(
                f"{path}: {file.num_views} views of a sample, but its manifest says {self._num_views}; make the targets again"
            )
        records = np.arange(len(rows)) * file.num_views + view
        index, probability, tail = file.read(records)
        columns = merged.num_filled_R[rows, None] + np.arange(num_kept)
        merged.index_RW[rows[:, None], columns] = index + outputs.start
        merged.probability_RW[rows[:, None], columns] = probability
        if merged.background_RM is not None and num_kept < vertical_size:
            merged.background_RM[rows, number] = tail / (vertical_size - num_kept)
        if merged.view_RV is not None:
            view_RV = file.read_views(records)
            _check_views(path, merged, rows, view_RV)
            merged.view_RV[rows] = view_RV
        merged.num_filled_R[rows] += num_kept

    def _rows_in(self, shard: int, number: int) -> np.ndarray:
        """The rows of a shard, ascending, whose samples have a label in the vertical with this number."""
        split = self._split
        first, last = split.shard_start[shard], split.shard_start[shard + 1]
        labels = slice(split.label_start[first], split.label_start[last])
        is_inside = split.taxonomy.vertical_of_output[split.label_output[labels]] == number
        rows = np.repeat(np.arange(last - first), np.diff(split.label_start[first : last + 1]))
        return np.unique(rows[is_inside])

    def _compute_width(self) -> int:
        """W: the largest number of targets of any sample of the split."""
        kept_M = np.array([self._kept[vertical] for vertical in self._split.taxonomy.verticals])
        if self._split.has_one_label_each:
            present = np.unique(self._split.taxonomy.vertical_of_output[self._split.label_output])
            return int(kept_M[present].max())
        width = 0
        for shard, index in enumerate(self._split.shards):
            width_R = np.zeros(index.num_samples, dtype=np.int64)
            for number, kept in enumerate(kept_M):
                width_R[self._rows_in(shard, number)] += kept
            width = max(width, int(width_R.max()))
        return width


def _compare_decoders(directory: Path, manifests: Mapping[str, dict]) -> None:
    """Warns if this machine has other versions of the image libraries, which may decode other pixels than the teachers saw."""
    here = describe_decoder()
    for manifest in manifests.values():
        made_with = manifest["preprocessing"].get("decoder")
        if made_with != here:
            warnings.warn(
                f"{directory}: the teachers' views were decoded by {made_with!r}, here by {here}: their crops are exact, "
                "their pixels may differ a little",
                stacklevel=2,
            )
            return


def _check_views(path: Path, merged: _ShardTargets, rows: np.ndarray, view_RV: np.ndarray) -> None:
    """Raises: DataError if a crop is empty, or the teachers of several verticals saw the same sample in different views."""
    left, top, right, bottom = view_RV[:, :8].copy().view("<u2").T
    is_crop = view_RV.any(axis=1) & ~are_distorted(view_RV)
    if (is_crop & ((left >= right) | (top >= bottom))).any():
        raise DataError(f"{path}: damaged (an empty crop); make the targets again")
    differs = (merged.num_filled_R[rows] > 0) & (merged.view_RV[rows] != view_RV).any(axis=1)
    if differs.any():
        raise DataError(
            f"{path}: row {rows[differs][0]} was seen in another view than by the teacher of another vertical; make the "
            "targets of both again"
        )


class MixedTargets:
    """Stored soft targets mixed with hard labels, in the proportion that `LabelMix` says."""

    def __init__(self, stored: StoredTargets, labels: LabelTargets, mix: LabelMix):
        self._stored = stored
        self._labels = labels
        self._mix = mix

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        return self._mix(self._stored.lookup(ordinals, epoch), self._labels.lookup(ordinals, epoch))

    def views(self, ordinals: np.ndarray, epoch: int) -> StoredViews | None:
        return self._stored.views(ordinals, epoch)


class WeightedOutside:
    """Targets whose loss has the weight `weight` in verticals in which the sample has no label, and 1 in the others.

    A weight of 0 leaves those verticals out of the loss.
    """

    def __init__(self, targets: SampleTargets, split: Split, weight: float):
        self._targets = targets
        self._split = split
        self._weight = weight

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        taxonomy = self._split.taxonomy
        weight_BM = torch.full((len(ordinals), taxonomy.num_verticals), self._weight)
        row, output = self._split.label_pairs(ordinals, smear=False)
        weight_BM[row, taxonomy.vertical_of_output[output]] = 1.0
        return dataclasses.replace(self._targets.lookup(ordinals, epoch), weight_BM=weight_BM)

    def views(self, ordinals: np.ndarray, epoch: int) -> StoredViews | None:
        return self._targets.views(ordinals, epoch)


def load_manifest(directory: Path, split: Split) -> dict:
    """The manifest of one vertical's targets.

    Raises:
        DataError: it is missing or damaged, or belongs to another taxonomy or other data.
    """
    path, manifest = directory / "manifest.json", read_manifest(directory)
    for what, found, expected in (
        ("taxonomy", manifest.get("taxonomy"), split.taxonomy.fingerprint),
        ("data", manifest.get("data"), split.fingerprint),
    ):
        if found != expected:
            raise DataError(f"{path}: made from another {what} ({found!r}, here {expected!r}); make the targets again")
    outputs, preprocessing = split.taxonomy.vertical_slice(directory.name), manifest.get("preprocessing")
    limits = {"num_kept": range(1, outputs.stop - outputs.start + 1), "views": range(2**31)}
    for name, limit in limits.items():
        if type(manifest.get(name)) is not int or manifest[name] not in limit:
            raise DataError(
                f"{path}: '{name}' is {manifest.get(name)!r}, expected {limit.start} to {limit.stop - 1}; make the targets again"
            )
    if not isinstance(preprocessing, dict) or preprocessing.get("interpolation") != INTERPOLATION:
        raise DataError(f"{path}: views are {preprocessing!r}, expected {INTERPOLATION}; make the targets again")
    return manifest


def read_manifest(directory: Path) -> dict:
    """The same, whatever it belongs to. Raises: DataError where it is missing, or no object."""
    path = directory / "manifest.json"
    try:
        manifest = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        keys = f"{write_override('targets.name', directory.parent.name)} {write_override('vertical', directory.name)}"
        raise DataError(
            f"{path}: missing; bring it back, or make the targets anew: `concentrate targets {keys} overwrite=true`"
        ) from None
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: a {type(manifest).__name__}, expected an object; make the targets again")
    return manifest
