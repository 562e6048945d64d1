"""Soft targets: sparse (class, probability) pairs of a batch, and their file form.

Shapes: B batch, K kept classes, V classes of one vertical, C all classes, R rows of a shard.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from concentration.errors import DataError


@dataclass(frozen=True)
class SoftTargets:
    """Targets of a batch; classes that are not listed have target 0 (Gao et al., section 3.1).

    Attributes:
        index_BK: int64 output indices. A class listed twice counts with the sum of its probabilities.
        probability_BK: float32 in [0, 1]. Unused places hold index 0 and probability 0.
    """

    index_BK: Tensor
    probability_BK: Tensor

    @classmethod
    def from_labels(cls, labels: Sequence[Sequence[int]]) -> "SoftTargets":
        """Hard labels as targets of probability 1; samples may have different numbers of labels, or none."""
        width = max((len(outputs) for outputs in labels), default=0) or 1
        index_BK = torch.zeros(len(labels), width, dtype=torch.int64)
        probability_BK = torch.zeros(len(labels), width)
        for row, outputs in enumerate(labels):
            index_BK[row, : len(outputs)] = torch.as_tensor(outputs, dtype=torch.int64)
            probability_BK[row, : len(outputs)] = 1.0
        return cls(index_BK, probability_BK)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SoftTargets":
        return SoftTargets(
            self.index_BK.to(device, non_blocking=non_blocking),
            self.probability_BK.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "SoftTargets":
        return SoftTargets(self.index_BK.pin_memory(), self.probability_BK.pin_memory())

    def dense(self, num_classes: int) -> Tensor:
        """(B, C) float32, for tests and small problems."""
        dense_BC = torch.zeros(len(self.index_BK), num_classes, device=self.index_BK.device)
        return dense_BC.scatter_add_(1, self.index_BK, self.probability_BK)


def keep_top_k(probability_BV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K most probable classes of each sample in falling order, and what they leave out.

    Args:
        probability_BV: sigmoids of one vertical's teacher.
        top_k: K; all classes of a smaller vertical are kept.

    Returns:
        index_BK int64 inside the vertical, probability_BK, and the tail mass (B,): the sum of the dropped sigmoids.
    """
    kept = probability_BV.topk(min(top_k, probability_BV.shape[1]), dim=1)
    tail_B = (probability_BV.double().sum(1) - kept.values.double().sum(1)).clamp_min(0).float()
    return kept.indices, kept.values, tail_B


@dataclass(frozen=True)
class TargetRecords:
    """The stored targets of one vertical for one shard (`codec=plain`), one record a row.

    Attributes:
        row: (R,) int32 ordinals of the samples in the shard, rising.
        index: (R, K) class indices inside the vertical; uint16, or uint32 in verticals of more than 65,536 classes.
        probability: (R, K) float16.
        tail: (R,) float16, the sum of the dropped sigmoids; larger ones are kept as 65,504.
    """

    row: np.ndarray
    index: np.ndarray
    probability: np.ndarray
    tail: np.ndarray

    @classmethod
    def from_tensors(
        cls, row: np.ndarray, index_RK: Tensor, probability_RK: Tensor, tail_R: Tensor, vertical_size: int
    ):
        """Narrows to the file's types; indices are exact, probabilities keep 11 significant bits."""
        index_type = np.uint16 if vertical_size <= 2**16 else np.uint32
        return cls(
            row.astype(np.int32),
            index_RK.numpy().astype(index_type),
            probability_RK.numpy().astype(np.float16),
            tail_R.clamp(max=torch.finfo(torch.float16).max).numpy().astype(np.float16),
        )

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the file whole or not at all."""
        arrays = {"row": self.row, "index": self.index, "probability": self.probability, "tail": self.tail}
        content = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, dict(metadata))
        write_atomically(path, sort_metadata(content))

    @classmethod
    def load(cls, path: Path, vertical_size: int) -> "TargetRecords":
        """Raises: DataError where the file is missing, damaged, or names a class outside the vertical."""
        arrays = load_arrays(path, ("row", "index", "probability", "tail"))
        records = cls(**arrays)
        num_rows = len(records.row)
        if (
            records.index.shape != records.probability.shape
            or len(records.index) != num_rows
            or len(records.tail) != num_rows
        ):
            raise DataError(f"{path}: rows, indices and probabilities have different lengths; make the targets again")
        if records.index.dtype.kind != "u":
            raise DataError(f"{path}: indices are {records.index.dtype}, expected uint16 or uint32; make them again")
        if records.index.size and int(records.index.max()) >= vertical_size:
            raise DataError(
                f"{path}: class index {int(records.index.max())} in a vertical of {vertical_size} classes; "
                "the targets belong to another taxonomy; make them again"
            )
        if not ((records.probability >= 0) & (records.probability <= 1)).all():  # also refuses NaN
            raise DataError(f"{path}: a probability lies outside [0, 1]; make the targets again")
        if not ((records.tail >= 0) & np.isfinite(records.tail)).all():
            raise DataError(f"{path}: a tail mass is negative or not finite; make the targets again")
        return records


def sort_metadata(content: bytes) -> bytes:
    """The safetensors file `content` with its metadata in the order of their keys.

    NOTE: the library writes them in an order that changes from run to run; but files are known by their hash, so the same
    arrays must give the same bytes.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the arrays so
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads named arrays of a safetensors file.

    Raises:
        DataError: the file is missing or damaged, or lacks one of them.
    """
    try:
        arrays = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the step that writes it has not finished: run it again") from None
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run the step that writes it again") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: lacks {', '.join(missing)}, found {', '.join(arrays)}; run the step that writes it again"
        )
    return {name: arrays[name] for name in names}


def load_metadata(path: Path) -> dict[str, str]:
    """The header of a safetensors file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run the step that writes it again") from None


def write_atomically(path: Path, content: bytes | str | Mapping) -> None:
    """Writes bytes, text or a mapping as JSON so that a reader, or a crash, meets the old file or the new, never a half."""
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free space or correct the permissions"
        ) from None
