"""The files of a head that is spread over ranks: each rank writes its part beside the checkpoint.

    checkpoints/step-000000500.ckpt                 everything else; written last, so that it is there only if the others are
    checkpoints/step-000000500.head-0-of-3.pt       what rank 0 of 3 holds of the head, with its optimizer's state

A file is loadable with `weights_only=True`: {"parts": [{"vertical": name, "start": int, "stop": int, "tensors": {key: tensor},
"state": {key: {name: tensor}}}, ...]}, where a key is `weight`, `bias`, `pace.gamma` and so on. Tensors have one row per class
of the part, or one row where a vertical has one number. So any number of ranks can read what any other number has written.

All ranks must see the directory.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concentration import distributed
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.networks.head_plan import Part
from concentration.networks.student import Student

#: What reading a damaged `torch.save` file raises.
DAMAGES = (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


@dataclass(frozen=True)
class _Held:
    """The rows of one of the student's tensors that belong to one part.

    key: the tensor's key in a file.
    name: its name in the student's `state_dict`.
    """

    part: Part
    key: str
    name: str
    rows: slice
    is_per_class: bool


def list_head_names(student: Student) -> list[str]:
    """The tensors of the student's `state_dict` that are its head's: classifiers and pace."""
    return [name for name in student.state_dict() if name.startswith(("top.classifiers.", "pace."))]


def save_head(checkpoint: Path, student: Student, optimizer: torch.optim.Optimizer | None) -> None:
    """Writes this rank's part, and its optimizer's state if given, beside `checkpoint`, whole or not at all."""
    tensors, verticals = student.state_dict(), list(student.config.verticals)
    parameters = dict(student.named_parameters())
    content: dict[Part, dict[str, Any]] = {}
    for held in _list_held(student):
        part = held.part
        where = {"vertical": verticals[part.vertical], "start": part.start, "stop": part.stop}
        entry = content.setdefault(part, {**where, "tensors": {}, "state": {}})
        tensor = tensors[held.name]
        entry["tensors"][held.key] = tensor[held.rows].detach().cpu().clone()
        if optimizer is not None and held.name in parameters:
            state = optimizer.state[parameters[held.name]]
            entry["state"][held.key] = {
                name: (value[held.rows] if value.shape == tensor.shape else value).detach().cpu().clone()
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
    buffer = io.BytesIO()
    torch.save({"parts": list(content.values())}, buffer)
    path = _name_file(checkpoint, distributed.rank(), distributed.world_size())
    write_atomically(path, buffer.getvalue())


def load_head(checkpoint: Path, world_size: int, student: Student) -> dict[str, dict[str, Tensor]]:
    """Loads this rank's part of the head from what `world_size` ranks have written beside `checkpoint`.

    Returns:
        The optimizer's state of each parameter of this rank's part, by the parameter's name in the student.

    Raises:
        DataError: a file is damaged, or some classes of a vertical are in none of the files.
    """
    saved = _load_parts(checkpoint, world_size)
    tensors, verticals = student.state_dict(), list(student.config.verticals)
    states: dict[str, dict[str, Tensor]] = {}
    for held in _list_held(student):
        vertical, tensor = verticals[held.part.vertical], tensors[held.name]
        pieces = [(piece["start"], piece["stop"], piece) for piece in saved if piece["vertical"] == vertical]
        _check_covered(checkpoint, vertical, held.part.start, held.part.stop, [piece[:2] for piece in pieces])
        for start, stop, piece in pieces:
            first, last = max(start, held.part.start), min(stop, held.part.stop)
            if first >= last:
                continue
            here, there = slice(held.rows.start, held.rows.stop), slice(None)
            if held.is_per_class:
                offset = held.rows.start - held.part.start
                here, there = slice(offset + first, offset + last), slice(first - start, last - start)
            tensor[here] = piece["tensors"][held.key][there]
            for name, value in piece["state"].get(held.key, {}).items():
                state = states.setdefault(held.name, {})
                if value.shape != piece["tensors"][held.key].shape:  # the number of steps, which all ranks have alike
                    state[name] = value
                else:
                    state.setdefault(name, torch.zeros_like(tensor, device="cpu"))[here] = value[there]
    return states


def check_head(checkpoint: Path, world_size: int, verticals: Mapping[str, int]) -> None:
    """Raises: DataError where a file is damaged, or some classes of a vertical, which is named, are in none of the files."""
    saved = _load_parts(checkpoint, world_size)
    for vertical, size in verticals.items():
        ranges = [(part["start"], part["stop"]) for part in saved if part["vertical"] == vertical]
        _check_covered(checkpoint, vertical, 0, size, ranges)


def drop_head(checkpoint: dict, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Takes the head, which is in the ranks' files, out of Lightning's checkpoint, whose optimizer state is then by name."""
    head = set(list_head_names(student))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    in_order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    [state] = checkpoint["optimizer_states"]
    for name in head:
        del checkpoint["state_dict"][f"student.{name}"]
    by_name = {in_order[index]: values for index, values in state["state"].items() if in_order[index] not in head}
    groups = [{**group, "params": []} for group in state["param_groups"]]
    checkpoint["optimizer_states"] = [{"state": by_name, "param_groups": groups}]
    checkpoint["head"] = {"world_size": distributed.world_size(), "verticals": dict(student.config.verticals)}


def restore_head(checkpoint: dict, path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Undoes `drop_head`, with this rank's part of the head from the files beside `path`.

    Args:
        optimizer: any optimizer of the student: only the order of its parameters is used.

    Raises:
        DataError: as `load_head`.
    """
    states = load_head(path, checkpoint["head"]["world_size"], student)
    tensors = student.state_dict()
    checkpoint["state_dict"] |= {f"student.{name}": tensors[name] for name in list_head_names(student)}
    [state] = checkpoint["optimizer_states"]
    states |= state["state"]
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    by_index: dict[int, dict] = {}
    groups, index = [], 0
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        places = range(index, index + len(group["params"]))
        for place, parameter in zip(places, group["params"], strict=True):
            if (name := names[id(parameter)]) in states:  # some optimizers keep no state
                by_index[place] = states[name]
        groups.append({**saved, "params": list(places)})
        index = places.stop
    checkpoint["optimizer_states"] = [{"state": by_index, "param_groups": groups}]


def gather_head(student: Student, directory: Path) -> None:
    """Makes the head of rank 0 whole, by files in `directory`; the other ranks keep their parts."""
    path = directory / "final.ckpt"
    save_head(path, student, optimizer=None)
    distributed.wait_for_all()
    if distributed.rank() == 0:
        student.unshard_head()
        load_head(path, distributed.world_size(), student)


def load_verified(path: Path) -> dict[str, Any]:
    """The content of a `torch.save` file, memory-mapped, after a check of every byte.

    Raises:
        One of DAMAGES, where the file is not what was written.
    """
    # NOTE: torch.save stores a CRC-32 of every tensor in its zip, which torch.load does not compare, but zipfile does.
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError) as error:
        raise ValueError(str(error)) from None
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def remove_heads(directory: Path, keep: set[str]) -> None:
    """Removes the files of heads, except those beside checkpoints with these names (without suffix)."""
    for path in directory.glob("*.head-*-of-*.pt"):
        if path.name.partition(".head-")[0] not in keep:
            path.unlink()


def _list_held(student: Student) -> Iterator[_Held]:
    if student.sharding is None:
        parts = [Part(number, 0, size) for number, size in enumerate(student.config.verticals.values())]
    else:
        parts = student.sharding.parts
    first = 0
    for number, part in enumerate(parts):
        for key in ("weight", "bias"):
            yield _Held(part, key, f"top.classifiers.{number}.{key}", slice(0, len(part)), is_per_class=True)
        for key in student.pace.state_dict():
            is_per_class = student.pace.is_per_class(key)
            rows = slice(first, first + len(part)) if is_per_class else slice(number, number + 1)
            yield _Held(part, f"pace.{key}", f"pace.{key}", rows, is_per_class)
        first += len(part)


def _load_parts(checkpoint: Path, world_size: int) -> list[dict[str, Any]]:
    """The parts in all files that exist; `_check_covered` finds what is missing."""
    parts = []
    for rank in range(world_size):
        path = _name_file(checkpoint, rank, world_size)
        try:
            parts += load_verified(path)["parts"]
        except FileNotFoundError:
            continue
        except DAMAGES as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: damaged ({reason}); restore it, or train again with overwrite=true") from None
    return parts


def _check_covered(checkpoint: Path, vertical: str, start: int, stop: int, ranges: list[tuple[int, int]]) -> None:
    covered = start
    for first, last in sorted(ranges):
        if first <= covered:
            covered = max(covered, last)
    if covered < stop:
        what = f"vertical '{vertical}' is" if not ranges else f"classes from {covered} on of vertical '{vertical}' are"
        raise DataError(
            f"{checkpoint}: {what} in none of its files {checkpoint.stem}.head-*.pt; restore the one that is missing, "
            "or train again with overwrite=true"
        )


def _name_file(checkpoint: Path, rank: int, world_size: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.head-{rank}-of-{world_size}.pt")
