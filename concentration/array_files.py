"""Arrays in safetensors files: written with reproducible bytes, memory-mapped when read."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.schema import parse_json

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


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all; equal arrays and metadata give equal bytes.

    NOTE: the library orders metadata differently from run to run, but files are known by their hash: so they are sorted here.

    Raises:
        DataError: the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = safetensors.numpy.save(contiguous, None if metadata is None else dict(metadata))
    stop = 8 + int.from_bytes(content[:8], "little")
    write_atomically(path, content[:8] + _sort_metadata(content[8:stop]) + content[stop:])


def sort_metadata(path: Path) -> None:
    """Sorts the metadata of a file that `save_arrays` did not write, in place and without reading its arrays."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(_sort_metadata(header))


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
    metadata = load_metadata(path)  # this checks the header, and that the arrays fill the file
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
    """A CRC-32 in 8 hex digits. It covers names, types and shapes too, so two arrays of one size cannot swap places unnoticed."""
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array, checksum)
    return f"{checksum:08x}"


def _sort_metadata(header: bytes) -> bytes:
    entries = json.loads(header)
    if "__metadata__" in entries:
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(header))
    assert len(text) == len(header), "the library writes its header in another form than this"
    return text
