"""The memory that a training step needs, found without allocating any: its allocations are counted on tensors without content.

Two whole steps (forward, backward, optimizer) run on fake tensors, which have shapes and types but no memory. Every storage
is counted from its creation until it is freed, so what a layer keeps for its backward pass, or a loss needs for a moment, is
known from what the code does, not from a formula. What this cannot see: memory used inside one operation (a convolution's
workspace; for matrix products on a GPU a measured number is added), and what an allocator rounds up or leaves unused.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from concentration.distributed import slice_of_rank
from concentration.errors import ConfigError
from concentration.networks.cost import build_without_weights
from concentration.networks.student import NetworkConfig, Student
from concentration.targets import SoftTargets
from concentration.training.backward_updates import BackwardUpdates
from concentration.training.configs import TrainerConfig, check_batch
from concentration.training.optimizers import RunLength, ScheduleConfig, build_optimizer

Moment = Literal["forward", "backward", "optimizer"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)

#: What memory is used for, in the order in which it is shown.
Part = Literal[
    "parameters", "buffers", "gradients", "optimizer state", "moving average", "DDP's buckets", "batch", "activations",
    "temporary", "work space of products",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)

#: The workspace that torch gives cuBLAS for forward and backward pass on a Hopper GPU (seen on an H200); other GPUs get less.
WORK_SPACE_ON_GPU = 65 << 20


@dataclass(frozen=True)
class StepShape:
    """What a training step's memory depends on besides network, optimizer and trainer.

    targets_per_image: K, the listed classes of a sample.
    has_background, has_weight: whether the targets have a background, and weights per vertical.
    """

    targets_per_image: int
    has_background: bool = False
    has_weight: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one process in bytes.

    at_peak: for each moment of a step, the bytes of each part when that moment needs most.
    local_batch: images of a micro-batch in this process.
    """

    at_peak: dict[Moment, dict[Part, int]]
    local_batch: int

    @property
    def moment(self) -> Moment:
        """The moment that needs most."""
        return max(MOMENTS, key=self.total)

    def total(self, moment: Moment) -> int:
        return sum(self.at_peak[moment].values())

    @property
    def peak_bytes(self) -> int:
        return self.total(self.moment)


def plan_memory(
    network: NetworkConfig, optimizer: ScheduleConfig, trainer: TrainerConfig, shape: StepShape
) -> MemoryPlan:
    """The memory of one process in every step after the first.

    Raises:
        ConfigError: the base network cannot be built, the batch is too small for the processes, or the head is spread.
    """
    world_size = trainer.num_processes
    if trainer.batch_size < world_size * trainer.accumulate:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is too small for {world_size} processes with "
            f"{trainer.accumulate} micro-batches each; use fewer processes or a larger batch"
        )
    if trainer.shard_head and world_size > 1:
        raise ConfigError(
            f"plan=true with trainer.shard_head=true and {world_size} processes: what is moved between them is not planned; "
            "plan with trainer.shard_head=false: a process then holds its share of the classifiers and of their state instead"
        )
    of_rank = slice_of_rank(trainer.batch_size, world_size - 1, world_size)  # the last rank has the largest share
    local_batch = -(-(of_rank.stop - of_rank.start) // trainer.accumulate)
    empty = build_without_weights(network)
    with FakeTensorMode(allow_non_fake_inputs=True), _Ledger() as ledger:
        student = empty.to_empty(device="cpu").train()
        check_batch(student, trainer.batch_size, world_size, trainer.accumulate)
        ledger.file("parameters", student.parameters())
        ledger.file("buffers", student.buffers())
        if trainer.class_weight != "none":
            student.class_weight_C = torch.empty(student.num_outputs)
            ledger.file("buffers", [student.class_weight_C])
        images, targets = make_batch(student, local_batch, shape)
        ledger.file("batch", [images, *(part for part in vars(targets).values() if part is not None)])
        average = [torch.empty_like(t) for t in student.state_dict().values()] if trainer.has_average else []
        ledger.file("moving average", average)
        buckets = [torch.empty_like(parameter) for parameter in student.parameters()] if world_size > 1 else []
        ledger.file("DDP's buckets", buckets)
        updates = BackwardUpdates(student, optimizer, RunLength(1, 1)) if trainer.update_in_backward else None
        is_fused = trainer.accelerator == "cpu" or (optimizer.fuses_on_gpu and trainer.precision != "16-mixed")
        stepper = build_optimizer(optimizer, student, updates.weights if updates else (), is_fused)
        for group in stepper.param_groups:  # torch's choice on a GPU: all parameters at once
            group["foreach"] = not is_fused
        for _ in range(2):  # the first step finds no gradients of an earlier one, and creates the optimizer's state
            at_peak = _run_step(ledger, student, stepper, updates, trainer, images, targets)
    for bytes_of in at_peak.values():
        bytes_of["work space of products"] = WORK_SPACE_ON_GPU if trainer.accelerator == "gpu" else 0
    return MemoryPlan(at_peak, local_batch)


def make_batch(student: Student, num_images: int, shape: StepShape) -> tuple[Tensor, SoftTargets]:
    """Random images (B, 3, H, W) and targets of this shape: there is nothing to learn from them, but a step can run."""
    index_BK = torch.randint(student.num_outputs, (num_images, shape.targets_per_image))
    of_verticals = (num_images, len(student.config.verticals))
    targets = SoftTargets(
        index_BK,
        torch.full(index_BK.shape, 0.5),
        torch.full(of_verticals, 0.01) if shape.has_background else None,
        torch.ones(of_verticals) if shape.has_weight else None,
    )
    return torch.randint(256, (num_images, 3, student.image_size, student.image_size), dtype=torch.uint8), targets


def _run_step(
    ledger: "_Ledger",
    student: Student,
    stepper: torch.optim.Optimizer,
    updates: BackwardUpdates | None,
    trainer: TrainerConfig,
    images: Tensor,
    targets: SoftTargets,
) -> dict[Moment, dict[Part, int]]:
    """Runs one step as Lightning orders it; returns the bytes at each moment's peak."""
    precision = trainer.autocast_dtype
    peaks: dict[Moment, _Peak] = {}
    for number in range(trainer.accumulate):
        ledger.begin_moment()
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            loss = student(images, targets).sum()
        kept = set(ledger.alive())
        _keep_higher(peaks, "forward", ledger.end_moment(kept))
        if number == 0:
            stepper.zero_grad()  # NOTE: after the forward pass, so the last step's gradients still exist during that
        ledger.begin_moment()
        loss.backward()
        ledger.file("gradients", (p.grad for p in student.parameters() if p.grad is not None))
        _keep_higher(peaks, "backward", ledger.end_moment(kept))
        del loss
    ledger.begin_moment()
    if trainer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), trainer.clip_norm)
    stepper.step()
    state = [list(stepper.state.values()), updates.state_dict() if updates else {}]
    ledger.file("optimizer state", _tensors_in(state))
    peaks["optimizer"] = ledger.end_moment(set())
    return {moment: ledger.sort(peak) for moment, peak in peaks.items()}


@dataclass(frozen=True)
class _Peak:
    """The storages that were alive when a moment needed most: bytes by number, and which of them a backward pass keeps."""

    bytes_of: dict[int, int]
    kept: set[int]

    @property
    def total(self) -> int:
        return sum(self.bytes_of.values())


def _keep_higher(peaks: dict[Moment, _Peak], moment: Moment, peak: _Peak) -> None:
    if moment not in peaks or peak.total > peaks[moment].total:
        peaks[moment] = peak


class _Ledger(TorchDispatchMode):
    """Follows every storage from its first operation until nothing holds it."""

    def __init__(self):
        super().__init__()
        self._number_of: dict[int, int] = {}  # by the storage's id, which a later storage may have again
        self._references: dict[int, weakref.ref] = {}
        self._alive: dict[int, int] = {}
        self._part_of: dict[int, Part] = {}
        self._num_seen = self._bytes = self._peak_bytes = 0
        # The peak is what was seen by then and is alive, or was freed later: a copy at each new peak would be quadratic.
        self._num_seen_at_peak = 0
        self._freed_since_peak: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            self._see(tensor)
        return result

    def file(self, part: Part, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are."""
        for tensor in tensors:
            self._part_of[self._see(tensor)] = part

    def alive(self) -> Iterator[int]:
        return iter(self._alive)

    def begin_moment(self) -> None:
        self._note_peak()

    def end_moment(self, kept: set[int]) -> _Peak:
        bytes_of = self._alive | self._freed_since_peak
        return _Peak({number: size for number, size in bytes_of.items() if number <= self._num_seen_at_peak}, kept)

    def sort(self, peak: _Peak) -> dict[Part, int]:
        """The bytes of each part; what nobody has filed counts as activations if it was kept, else as temporary."""
        bytes_of = dict.fromkeys(PARTS, 0)
        for number, size in peak.bytes_of.items():
            bytes_of[self._part_of.get(number, "activations" if number in peak.kept else "temporary")] += size
        return bytes_of

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._number_of:
            self._num_seen += 1
            number = self._number_of[key] = self._num_seen
            self._alive[number] = storage.nbytes()
            self._references[number] = weakref.ref(storage, lambda _: self._forget(key, number))
            self._bytes += storage.nbytes()
            if self._bytes > self._peak_bytes:
                self._note_peak()
        return self._number_of[key]

    def _note_peak(self) -> None:
        self._peak_bytes, self._num_seen_at_peak = self._bytes, self._num_seen
        self._freed_since_peak.clear()

    def _forget(self, key: int, number: int) -> None:
        self._freed_since_peak[number] = self._alive.pop(number)
        self._bytes -= self._freed_since_peak[number]
        del self._number_of[key], self._references[number]


def _tensors_in(result: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
