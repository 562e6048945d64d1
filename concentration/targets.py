"""Soft targets: sparse (class, probability) pairs of a batch, and their file form.

Shapes: B batch, K kept classes, V classes of one vertical, C all classes, M verticals, R rows of a shard, N records.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from concentration.errors import DataError
from concentration.packed_targets import SHORT_VIEW_BYTES, VIEW_BYTES, PackedLayout, pack, unpack
from concentration.schema import parse_json
from concentration.temporaries import name_temporary

#: How stored targets are written.
Codec = Literal["plain", "packed"]


@dataclass(frozen=True)
class SoftTargets:
    """Targets of a batch; classes that are not listed have their vertical's background, 0 as a rule (Gao et al., section 3.1).

    Attributes:
        index_BK: int64 output indices. A class listed twice counts with the sum of its probabilities.
        probability_BK: float32, what is added to the background of the listed classes. Unused places hold index 0 and
            probability 0.
        background_BM: float32, the target of every class of a vertical before the listed ones are added; None is 0.
        weight_BM: float32, what a sample's loss in a vertical counts; None is 1.
    """

    index_BK: Tensor
    probability_BK: Tensor
    background_BM: Tensor | None = None
    weight_BM: Tensor | None = None

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
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SoftTargets":
        return self._map(Tensor.pin_memory)

    def weighted(self, weight_B: Tensor, num_verticals: int) -> "SoftTargets":
        """The same, each sample's loss multiplied by its weight in every vertical."""
        weight_BM = weight_B.unsqueeze(1).expand(-1, num_verticals)
        return replace(self, weight_BM=weight_BM if self.weight_BM is None else self.weight_BM * weight_BM)

    def dense(self, *vertical_sizes: int) -> Tensor:
        """(B, C) float32, for tests and small problems; with a background the sizes of all verticals are needed."""
        dense_BC = torch.zeros(len(self.index_BK), sum(vertical_sizes), device=self.index_BK.device)
        if self.background_BM is not None:
            sizes_M = torch.tensor(vertical_sizes, device=self.index_BK.device)
            dense_BC += self.background_BM.repeat_interleave(sizes_M, dim=1)
        return dense_BC.scatter_add_(1, self.index_BK, self.probability_BK)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SoftTargets":
        parts = (self.index_BK, self.probability_BK, self.background_BM, self.weight_BM)
        return SoftTargets(*(None if part is None else change(part) for part in parts))


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
    """The stored targets of one vertical for one shard: for each row its views, for each view a record.

    Record n is of row n // num_views and view n % num_views, num_views being N // R.

    Attributes:
        row: (R,) ordinals of the samples in the shard, rising.
        index: (N, K) class indices inside the vertical.
        probability: (N, K) float32.
        tail: (N,) float32, the sum of the dropped sigmoids.
        view: (N, 13) uint8, which views these are, as `data.views.View` encodes them; None for the centre view.
    """

    row: np.ndarray
    index: np.ndarray
    probability: np.ndarray
    tail: np.ndarray
    view: np.ndarray | None = None

    def save(self, path: Path, codec: Codec, vertical_size: int) -> None:
        """Writes the file whole or not at all.

        plain: numpy reads it. Indices are exact, probabilities and tails keep 11 bits; tails above 65,504 are kept as that.
        packed: a third of that, see `packed_targets`.
        The header holds a checksum of all arrays: a changed bit of a probability is a probability, too.
        """
        narrow = np.uint16 if self.row.max(initial=0) < 2**16 else np.uint32
        arrays = {"row": self.row.astype(narrow)}
        if codec == "packed":
            layout = PackedLayout(vertical_size, self.index.shape[1])
            arrays["record"] = pack(layout, self.index, self.probability, self.tail)
        else:
            arrays["index"] = self.index.astype(np.uint16 if vertical_size <= 2**16 else np.uint32)
            arrays["probability"] = self.probability.astype(np.float16)
            arrays["tail"] = np.minimum(self.tail, np.finfo(np.float16).max).astype(np.float16)
        if self.view is not None:  # most views have no saturation, light or interpolation of their own
            arrays["view"] = self.view if self.view[:, SHORT_VIEW_BYTES:].any() else self.view[:, :SHORT_VIEW_BYTES]
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {"codec": codec, "vertical_size": str(vertical_size), "num_kept": str(self.index.shape[1])}
        metadata["crc32"] = compute_checksum(arrays)
        content = safetensors.numpy.save(arrays, metadata)
        write_atomically(path, sort_metadata(content))


def count_target_bytes(codec: Codec, vertical_size: int, top_k: int, num_rows: int, num_views: int) -> int:
    """Bytes of the stored targets of `num_rows` samples of a vertical, without the files' headers.

    `num_views` is 0 where they are of the centre view. Where views have a saturation, light or interpolation of their own, each
    takes three bytes more.
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
    """A shard's stored targets, memory-mapped: any record is one look away, and nothing is read before it is asked for.

    Attributes:
        row: (R,) as in `TargetRecords`.
        num_views: records of a row.
        has_views: whether these are of stored views; else of the centre view.

    Raises:
        DataError: the file is missing or has another form, or was made for a vertical of another size, or keeps other than
            `num_kept` classes.
    """

    def __init__(self, path: Path, vertical_size: int, num_kept: int):
        self._path = path
        self._vertical_size = vertical_size
        metadata, arrays = map_arrays(path)
        found = {name: metadata.get(name) for name in ("codec", "vertical_size", "num_kept")}
        wanted = {"vertical_size": str(vertical_size), "num_kept": str(num_kept)}
        if found["codec"] not in get_args(Codec) or found != {"codec": found["codec"], **wanted}:
            raise DataError(f"{path}: holds {found}, expected {wanted}; the targets belong to others: make them again")
        self._layout = PackedLayout(vertical_size, num_kept) if found["codec"] == "packed" else None
        self._arrays = arrays
        self._checksum = metadata.get("crc32")
        self._check_form(num_kept)
        self.row: np.ndarray = arrays["row"]
        self.num_views = self._num_records // max(1, len(self.row))
        self.has_views = "view" in arrays

    def verify(self) -> None:
        """Reads the whole file.

        Raises:
            DataError: it is not what was written.
        """
        found = compute_checksum(self._arrays)
        if found != self._checksum:
            raise DataError(
                f"{self._path}: damaged (its checksum is {found}, {self._checksum!r} when it was written); make the targets again"
            )

    def read(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index (N, K) int64, probability (N, K) float32 and tail mass (N,) float32 of these records.

        Raises:
            DataError: a record names a class outside the vertical, or what it holds is no probability.
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
        """The views of these records, (N, 13) uint8; None where they are of the centre."""
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


def sort_metadata(content: bytes) -> bytes:
    """The safetensors file `content` with its metadata in the order of their keys.

    NOTE: the library writes them in an order that changes from run to run; but files are known by their hash, so the same
    arrays must give the same bytes.
    """
    stop = 8 + int.from_bytes(content[:8], "little")
    return content[:8] + _sort_header(content[8:stop]) + content[stop:]


def sort_metadata_of_file(path: Path) -> None:
    """`sort_metadata` in place, without reading the arrays."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(_sort_header(header))


def _sort_header(header: bytes) -> bytes:
    entries = json.loads(header)
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(header))
    assert len(text) == len(header), "the library writes its header in another form than this"
    return text


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads named arrays of a safetensors file.

    Raises:
        DataError: the file is missing or damaged, or lacks one of them.
    """
    _, arrays = map_arrays(path)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}, found {list(arrays)}; run the step that writes it again")
    return {name: np.array(arrays[name]) for name in names}


def map_arrays(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The header and the arrays of a safetensors file, memory-mapped.

    Raises:
        DataError: the file is missing or damaged.
    """
    metadata = load_metadata(path)  # the library checks the header, and that the arrays fill the file
    content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = parse_json(content[8:start].tobytes(), str(path))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise DataError(
                f"{path}: {name!r} is {entry['dtype']}, expected one of {', '.join(_DTYPES)}; make it again"
            )
        first, last = entry["data_offsets"]
        flat = content[start + first : start + last].view(_DTYPES[entry["dtype"]])
        try:
            arrays[name] = flat.reshape(entry["shape"])
        except ValueError as error:  # an empty array with sides that numpy has not
            raise DataError(f"{path}: damaged ({name!r}: {error}); make it again") from None
    return metadata, arrays


_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}


def load_metadata(path: Path) -> dict[str, str]:
    """The header of a safetensors file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the step that writes it has not finished: run it again") from None
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())  # it quotes the file
        raise DataError(f"{path}: damaged ({reason}); delete it and run the step that writes it again") from None


def compute_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """8 hex digits, of the arrays' names, types and shapes, too: two arrays of one size may change places."""
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array, checksum)
    return f"{checksum:08x}"


def write_atomically(path: Path, content: bytes | memoryview | str | Mapping) -> None:
    """Writes bytes, text or a mapping as JSON so that a reader, or a crash, meets the old file or the new, never a half."""
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another path to write to; when that is done, it takes the place of `path`, whole and safe on the disk.

    Raises:
        DataError: it cannot be written; the old file is as it was.
    """
    temporary = name_temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise _cannot_be_written(path, error) from None
        raise


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file.

    Raises:
        DataError: it cannot be written; a part of the text may be there.
    """
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def _cannot_be_written(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(f"{path}: cannot be written ({reason}); free space or correct the permissions")
