"""Ranks, and what they exchange. Every function also works in a single process."""

import contextlib
import datetime
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from concentration.errors import ConcentrationError, ConfigError

T = TypeVar("T")


#: The port at which the processes of a SLURM job meet is taken from this range by the job's number.
_FIRST_PORT, _NUM_PORTS = 20_000, 20_000

#: How often a rank that waits for rank 0 without a limit asks whether it is there.
_POLL_SECONDS = 0.5

#: All ranks make the same calls in the same order, so they number them alike.
_NUMBERS = itertools.count()

_is_alone = False


def start(accelerator: str, timeout_seconds: float = 600) -> None:
    """Joins the other processes where torchrun or srun has started this one; otherwise, and the second time, does nothing.

    They communicate by NCCL for `accelerator` "gpu" and by gloo for "cpu". If one of them dies or hangs, the others wait for
    `timeout_seconds` and then raise an error.
    """
    if _has_group():
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # Only srun sets this variable: a batch script is not a task of a step.
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
            return
        os.environ.update(translate_slurm(os.environ))
    backend = "nccl" if accelerator == "gpu" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))


def translate_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, from those of srun; a given MASTER_ADDR or MASTER_PORT is kept."""
    [tasks_of_node] = re.findall(r"^\d+", environment["SLURM_STEP_TASKS_PER_NODE"])
    first, inside, after = re.match(
        r"([^\[,]+)(?:\[(\w+)[^]]*\])?([^\[,]*)", environment["SLURM_STEP_NODELIST"]
    ).groups()
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks_of_node,
        "GROUP_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", f"{first}{inside or ''}{after}"),
        "MASTER_PORT": environment.get("MASTER_PORT", str(_FIRST_PORT + (job + 97 * step) % _NUM_PORTS)),
    }


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_distributed() else 1


def choose_device(accelerator: str) -> torch.device:
    """The device of this process for `accelerator` "cpu" or "gpu".

    Raises:
        ConfigError: a GPU is asked for, but torch finds none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("a GPU is asked for, but torch finds no GPU here; use the CPU, or install torch for your GPU")
    return torch.device("cuda" if accelerator == "gpu" else "cpu")


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, on every rank; `value` itself is not changed."""
    if not is_distributed():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def all_to_all(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Sends `tensors[r]` to rank r, and returns what every rank has sent here, in rank order.

    Args:
        tensors: one per rank, all of one type.
        shapes: the shapes of what each rank sends here, which both sides must know.
    """
    if not is_distributed():
        return [tensor.view(*shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    # As bytes, because gloo does not move every type.
    sent = torch.cat([tensor.reshape(-1) for tensor in tensors]).view(torch.uint8)
    sizes = [math.prod(shape) for shape in shapes]
    received = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    num_bytes = received.element_size()
    dist.all_to_all_single(
        received.view(torch.uint8),
        sent,
        [size * num_bytes for size in sizes],
        [tensor.numel() * num_bytes for tensor in tensors],
    )
    return [part.view(*shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def gather_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every rank's `sizes`, in rank order. On a GPU this waits for all its queued work."""
    if not is_distributed():
        return [list(sizes)]
    own = torch.tensor([int(size) for size in sizes], device=device)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return torch.stack(gathered).tolist()


def wait_for_all() -> None:
    """Returns when every rank has called it."""
    if is_distributed():
        dist.barrier()


def broadcast_flag(flag: bool, device: torch.device) -> bool:
    """Rank 0's flag, on every rank: clocks differ, so rank 0's decides."""
    if not is_distributed():
        return flag
    tensor = torch.tensor(int(flag), device=device)
    dist.broadcast(tensor, 0)
    return bool(tensor)


def gather_objects(value: object) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_zero(compute: Callable[[], T]) -> T:
    """The result, on every rank, of `compute`, which only rank 0 calls; a `ConcentrationError` is also raised on every rank.

    Inside of `compute`, rank 0 takes itself for the only process: what it calls there waits for no other rank.
    """
    if not is_distributed():
        return compute()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            with _alone():
                outcome[0] = compute()
        except ConcentrationError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_rank_zero_at_last(compute: Callable[[], T]) -> T:
    """As `from_rank_zero`, for what may take hours: the other ranks wait for as long as rank 0 lives, whatever the timeout is."""
    if not is_distributed():
        return compute()
    store, key = dist.distributed_c10d._get_default_store(), f"from_rank_zero_at_last/{next(_NUMBERS)}"

    def compute_and_tell() -> T:
        try:
            return compute()
        finally:
            store.set(key, "")

    while rank() != 0 and not store.check([key]):
        time.sleep(_POLL_SECONDS)
    return from_rank_zero(compute_and_tell)


def slice_of_rank(count: int, rank: int, world_size: int) -> slice:
    """The contiguous share of `count` places that belongs to a rank; shares differ by at most one."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def is_distributed() -> bool:
    """Whether this process belongs to a group of processes, even if it is alone in it, and is not in `from_rank_zero`."""
    return _has_group() and not _is_alone


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False
