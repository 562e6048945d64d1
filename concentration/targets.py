"""Soft targets: the sparse (class, probability) pairs of a batch, and the files that store them.

Shapes: B batch, K kept classes, V classes of one vertical, C all classes, M verticals, R rows of a shard, N records.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from concentration.array_files import compute_checksum, map_arrays, save_arrays
from concentration.errors import DataError
from concentration.packed_targets import SHORT_VIEW_BYTES, VIEW_BYTES, PackedLayout, check_records, pack, unpack
from concentration.schema import check_choice

#: How stored targets are written.
Codec = Literal["plain", "packed"]


@dataclass(frozen=True)
class SoftTargets:
    """The targets z of a batch: those of some listed classes; all others have 0 (Gao et al., section 3.1) or a background.

    Attributes:
        index_BK: int64 output indices of the listed classes. A class listed twice counts with the sum of its probabilities.
        probability_BK: float32, added to the background of the listed classes. Unused places hold index 0 and
            probability 0.
        background_BM: float32, the target of every class of a vertical before the listed ones are added; None means 0.
        weight_BM: float32, the weight of a sample's loss in a vertical; None means 1.
    """

    index_BK: Tensor
    probability_BK: Tensor
    background_BM: Tensor | None = None
    weight_BM: Tensor | None = None

    @classmethod
    def from_labels(cls, labels: Iterable[Iterable[int]] | Tensor | np.ndarray) -> "SoftTargets":
        """Hard labels, as output indices, with probability 1; samples may have different numbers of labels, or none.

        Raises:
            DataError: a sample's labels are not a list of whole numbers from 0 on, or have one of them twice.
        """
        rows = [_list_outputs(outputs, f"labels[{row}]") for row, outputs in enumerate(labels)]
        width = max(map(len, rows), default=0) or 1
        index_BK = torch.zeros(len(rows), width, dtype=torch.int64)
        probability_BK = torch.zeros(len(rows), width)
        for row, outputs in enumerate(rows):
            index_BK[row, : len(outputs)] = torch.tensor(outputs, dtype=torch.int64)
            probability_BK[row, : len(outputs)] = 1.0
        return cls(index_BK, probability_BK)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SoftTargets":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SoftTargets":
        return self._map(Tensor.pin_memory)

    def weighted(self, weight_B: Tensor, num_verticals: int) -> "SoftTargets":
        """The same targets with each sample's loss multiplied by its weight, (B,), in every vertical."""
        weight_BM = weight_B.unsqueeze(1).expand(-1, num_verticals)
        return replace(self, weight_BM=weight_BM if self.weight_BM is None else self.weight_BM * weight_BM)

    def dense(self, *vertical_sizes: int) -> Tensor:
        """z as (B, C) float32, for tests and small problems. `vertical_sizes`: of all verticals, or C where no background is."""
        dense_BC = torch.zeros(len(self.index_BK), sum(vertical_sizes), device=self.index_BK.device)
        if self.background_BM is not None:
            sizes_M = torch.tensor(vertical_sizes, device=self.index_BK.device)
            dense_BC += self.background_BM.repeat_interleave(sizes_M, dim=1)
        return dense_BC.scatter_add_(1, self.index_BK, self.probability_BK)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SoftTargets":
        parts = (self.index_BK, self.probability_BK, self.background_BM, self.weight_BM)
        return SoftTargets(*(None if part is None else change(part) for part in parts))


def _list_outputs(outputs: Iterable[int] | Tensor | np.ndarray, where: str) -> list[int]:
    """A sample's labels. Raises: DataError, as `SoftTargets.from_labels` says."""
    try:
        values = outputs.tolist() if isinstance(outputs, Tensor | np.ndarray) else list(outputs)
        numbers = [-1 if isinstance(value, bool | np.bool_) else operator.index(value) for value in values]
    except TypeError:  # one number, a text, fractions
        numbers = [-1]
    if min(numbers, default=0) < 0:
        raise DataError(
            f"{where} is {outputs!r}; expected a list of output indices from 0 on for each sample, as in [[3], [310, 7], []]"
        )
    if len(set(numbers)) < len(numbers):
        raise DataError(
            f"{where} is {outputs!r}, with an index twice; expected each once (of a row of zeros and ones the places of the ones)"
        )
    return numbers


def keep_top_k(probability_BV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K most probable classes of each sample, in falling order, and what they leave out.

    Args:
        probability_BV: sigmoids of one vertical's teacher.
        top_k: K; of a smaller vertical all classes are kept.

    Returns:
        index_BK (int64, inside the vertical), probability_BK, and the tail mass (B,), the sum of the dropped sigmoids.
    """
    kept = probability_BV.topk(min(top_k, probability_BV.shape[1]), dim=1)
    tail_B = (probability_BV.double().sum(1) - kept.values.double().sum(1)).clamp_min(0).float()
    return kept.indices, kept.values, tail_B


@dataclass(frozen=True)
class TargetRecords:
    """The stored targets of one vertical for one shard: a record for each view of each of its samples.

    Record n belongs to sample n // num_views and its view n % num_views, where num_views is N // R.

    Attributes:
        row: (R,) ordinals of the samples in the shard, rising.
        index: (N, K) class indices inside the vertical.
        probability: (N, K) float32.
        tail: (N,) float32, the sum of the dropped sigmoids.
        view: (N, 13) uint8, the views as `data.views.View` encodes them; None for the centre view.
    """

    row: np.ndarray
    index: np.ndarray
    probability: np.ndarray
    tail: np.ndarray
    view: np.ndarray | None = None

    def save(self, path: str | Path, codec: Codec, vertical_size: int) -> None:
        """Writes the file whole or not at all.

        With `plain`, numpy reads it; indices are exact, probabilities and tails keep 11 bits, and larger tails become 65,504.
        With `packed` it takes less than half as much, see `packed_targets`. The header holds a checksum of all arrays, because
        a probability with a changed bit still looks like one.

        Raises:
            DataError: the arrays are not as described, or the file cannot be written.
            ConfigError: there is no such codec.
        """
        check_choice("codec", codec, Codec)
        try:
            self._check(vertical_size)
            arrays = self._encode(codec, vertical_size)
        except ValueError as error:
            raise DataError(f"{path}: not written: {error}; correct the records") from None
        metadata = {"codec": codec, "vertical_size": str(vertical_size), "num_kept": str(self.index.shape[1])}
        metadata["crc32"] = compute_checksum(arrays)
        save_arrays(Path(path), arrays, metadata)

    def _encode(self, codec: Codec, vertical_size: int) -> dict[str, np.ndarray]:
        """The arrays of the file. Raises: ValueError where the packed codec cannot hold them."""
        arrays = {"row": self.row.astype(np.uint16 if self.row.max(initial=0) < 2**16 else np.uint32)}
        if codec == "packed":
            layout = PackedLayout(vertical_size, self.index.shape[1])
            arrays["record"] = pack(layout, self.index, self.probability, self.tail)
        else:
            arrays["index"] = self.index.astype(np.uint16 if vertical_size <= 2**16 else np.uint32)
            arrays["probability"] = self.probability.astype(np.float16)
            arrays["tail"] = np.minimum(self.tail, np.finfo(np.float16).max).astype(np.float16)
        if self.view is not None:  # the last bytes, saturation, light and interpolation, are mostly zero
            arrays["view"] = self.view if self.view[:, SHORT_VIEW_BYTES:].any() else self.view[:, :SHORT_VIEW_BYTES]
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _check(self, vertical_size: int) -> None:
        """Raises: ValueError where no such vertical has these records: narrow integers would make others of them."""
        if (self.row[1:] <= self.row[:-1]).any() or (self.row < 0).any():
            raise ValueError("rows do not rise from 0 on")
        num_rows, num_records = len(self.row), len(self.index)
        if num_records % max(1, num_rows) or (num_rows == 0) != (num_records == 0):
            raise ValueError(f"{num_rows} rows, but {num_records} records")
        check_records(vertical_size, self.index.shape[1], self.index, self.probability, self.tail)


def count_target_bytes(codec: Codec, vertical_size: int, top_k: int, num_rows: int, num_views: int) -> int:
    """Bytes of the stored targets of `num_rows` samples of a vertical, without the files' headers.

    `num_views` is 0 for targets of the centre view. A view with saturation, light or interpolation of its own takes three
    bytes more than counted here.
    """
    kept = min(top_k, vertical_size)
    if codec == "packed":
        record_bytes = PackedLayout(vertical_size, kept).record_bytes
    else:
        record_bytes = kept * ((2 if vertical_size <= 2**16 else 4) + 2) + 2
    if num_views:
        record_bytes += SHORT_VIEW_BYTES
    return num_rows * (2 + max(1, num_views) * record_bytes)


class TargetFile:
    """A shard's stored targets, memory-mapped: nothing is read before it is asked for.

    Attributes:
        row: (R,) as in `TargetRecords`.
        num_views: records of each sample.
        has_views: whether the records are of stored views; otherwise they are of the centre view.

    Raises:
        DataError: the file is missing or has another form, was made for a vertical of another size, or does not keep
            `num_kept` classes.
    """

    def __init__(self, path: str | Path, vertical_size: int, num_kept: int):
        self._path = Path(path)
        self._vertical_size = vertical_size
        metadata, arrays = map_arrays(self._path)
        found = {name: metadata.get(name) for name in ("codec", "vertical_size", "num_kept")}
        wanted = {"vertical_size": str(vertical_size), "num_kept": str(num_kept)}
        if found["codec"] not in get_args(Codec) or found != {"codec": found["codec"], **wanted}:
            raise DataError(f"{path}: holds {found}, expected {wanted}; make the targets again")
        self._layout = PackedLayout(vertical_size, num_kept) if found["codec"] == "packed" else None
        self._arrays = arrays
        self._checksum = metadata.get("crc32")
        self._check_form(num_kept)
        self.row: np.ndarray = arrays["row"]
        self.num_views = self._num_records // max(1, len(self.row))
        self.has_views = "view" in arrays

    def verify(self) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            DataError: the file is not what was written.
        """
        found = compute_checksum(self._arrays)
        if found != self._checksum:
            raise DataError(
                f"{self._path}: damaged (its checksum is {found}, {self._checksum!r} when it was written); make the targets again"
            )

    def read(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index (N, K) int64, probability (N, K) float32 and tail mass (N,) float32 of these N records.

        Raises:
            DataError: a record names a class outside the vertical, or holds what cannot be a probability or a tail mass.
        """
        try:
            if self._layout is not None:
                index, probability, tail = unpack(self._layout, self._arrays["record"][records])
            else:
                index, probability, tail = (self._arrays[n][records] for n in ("index", "probability", "tail"))
                self._check_values(index, probability, tail)
        except ValueError as error:
            raise DataError(f"{self._path}: damaged ({error}); make the targets again") from None
        return index.astype(np.int64), probability.astype(np.float32), tail.astype(np.float32)

    def read_views(self, records: np.ndarray) -> np.ndarray | None:
        """The views of these records, (N, 13) uint8; None where all are centre views."""
        if not self.has_views:
            return None
        view = self._arrays["view"][records]
        return np.pad(view, ((0, 0), (0, VIEW_BYTES - view.shape[1])))

    @property
    def _num_records(self) -> int:
        return len(self._arrays["tail" if self._layout is None else "record"])

    def _check_form(self, num_kept: int) -> None:
        num_bytes = None if self._layout is None else self._layout.record_bytes
        forms = {
            "row": ("u", ()),
            **({"view": ("u1", (self._count_view_bytes(),))} if "view" in self._arrays else {}),
            **({"record": ("u1", (num_bytes,))} if num_bytes else {}),
            **(
                {}
                if num_bytes
                else {"index": ("u", (num_kept,)), "probability": ("f2", (num_kept,)), "tail": ("f2", ())}
            ),
        }
        found = {name: (array.dtype.str[1:], array.shape[1:]) for name, array in self._arrays.items()}
        fits = found.keys() == forms.keys() and all(
            found[name][0].startswith(kind) and found[name][1] == shape for name, (kind, shape) in forms.items()
        )
        if not fits:
            raise DataError(f"{self._path}: holds {found}, expected {forms}; make the targets again")
        num_rows, lengths = len(self._arrays["row"]), {len(self._arrays[name]) for name in forms if name != "row"}
        if len(lengths) != 1 or (num_rows and (lengths == {0} or max(lengths) % num_rows)):
            raise DataError(f"{self._path}: {num_rows} rows, but records {lengths}; make the targets again")

    def _count_view_bytes(self) -> int:
        return SHORT_VIEW_BYTES if self._arrays["view"].shape[1:] == (SHORT_VIEW_BYTES,) else VIEW_BYTES

    def _check_values(self, index: np.ndarray, probability: np.ndarray, tail: np.ndarray) -> None:
        if index.size and int(index.max()) >= self._vertical_size:
            raise ValueError(f"class index {int(index.max())} in a vertical of {self._vertical_size} classes")
        if not ((probability >= 0) & (probability <= 1)).all():  # also refuses NaN
            raise ValueError("a probability lies outside [0, 1]")
        if not ((tail >= 0) & np.isfinite(tail)).all():
            raise ValueError("a tail mass is negative or not finite")
