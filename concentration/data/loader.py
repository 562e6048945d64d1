"""Loads the micro-batches of a training run. Micro-batch i of a rank is a pure function of i, so a loader's state is one integer.

Shapes: B samples of a rank's micro-batch, G samples of a global batch.
"""

import contextlib
import multiprocessing
import multiprocessing.util
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from concentration import preemption
from concentration.data.loader_workers import kill, start_worker
from concentration.data.order import Order
from concentration.data.prefetch import Prefetch, check_room
from concentration.data.reader import Reader
from concentration.distributed import slice_of_rank
from concentration.errors import ConcentrationError, DataError
from concentration.processes import check_semaphores
from concentration.targets import SoftTargets


class Batch(NamedTuple):
    """One rank's share of a micro-batch.

    images: (B, 3, H, W) uint8, channels last in memory; black if an image cannot be decoded. (B, 0) if the images are held on the
        device, which then makes their views (`resident`).
    targets: the targets of the samples.
    weight_B: float32; 1, or 0 for an image that cannot be decoded and for a place beyond the end of an epoch.
    skipped_B: bool, whether the image cannot be decoded.
    view_BV: (B, 13) uint8, the view of each image, as `View.encode` writes it; zeros if skipped.
    ordinal_B: int64, the sample's ordinal in its split.
    random_BR: uint8, the random bytes of views that are made on the device (`rendering.draw_random`); otherwise (B, 0).
    is_grey_B: bool, whether the image's file is grey (see `decode_view`); True if skipped, False for several crops.
    global_count: how many samples this step's global batch has, over all ranks and micro-batches.
    """

    images: Tensor
    targets: SoftTargets
    weight_B: Tensor
    skipped_B: Tensor
    view_BV: Tensor
    ordinal_B: Tensor
    random_BR: Tensor
    is_grey_B: Tensor
    global_count: int


class StepBatches(torch.utils.data.Dataset):
    """The micro-batches of one rank, numbered from 0 over the whole run.

    The global batch of step t of an epoch is places [t*G, (t+1)*G) of the epoch's order. Each rank takes a contiguous share of
    it, and each micro-batch a contiguous share of the rank's. Places beyond the end of the epoch are filled with samples of
    weight 0, so that every batch has the same shape. The world size and the number of workers decide which process reads a
    sample, but never which global batch it is in.

    Raises:
        DataError: there are fewer samples in a global batch than ranks times micro-batches.
        ConfigError: the cache of remote shards is too small for this order.
    """

    def __init__(self, reader: Reader, order: Order, batch_size: int, accumulate: int, rank: int, world_size: int):
        if batch_size < world_size * accumulate:
            raise DataError(
                f"{len(order)} samples and trainer.batch_size={batch_size} are too few for {world_size} processes with "
                f"{accumulate} micro-batches each; use fewer processes or a larger batch"
            )
        self._reader = reader
        self._order = order
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._rank = rank
        self._world_size = world_size
        self.steps_per_epoch = -(-len(order) // batch_size)
        if reader.cache is not None:
            check_room(reader.split, order, reader.cache)

    def begin_prefetch(self, numbers: range) -> Prefetch | None:
        """Starts to fetch the shards of these micro-batches; None if all shards lie on this machine, or `numbers` is empty."""
        if self._reader.cache is None or not numbers:
            return None
        epoch, place = self.locate(numbers[-1])
        return Prefetch(self._reader.split, self._order, self._reader.cache, (epoch, place + self._batch_size))

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, place): the epoch of a micro-batch, and the place at which its global batch begins in the epoch's order."""
        epoch, step_of_epoch = divmod(number // self._accumulate, self.steps_per_epoch)
        return epoch, step_of_epoch * self._batch_size

    def __getitem__(self, number: int) -> Batch:
        epoch, first = self.locate(number)
        mine = slice_of_rank(self._batch_size, self._rank, self._world_size)
        part = slice_of_rank(mine.stop - mine.start, number % self._accumulate, self._accumulate)
        places = np.arange(first + mine.start + part.start, first + mine.start + part.stop)
        is_real = places < len(self._order)
        ordinals = self._order.take(epoch, places % len(self._order))
        read = self._reader.read(ordinals, epoch)
        return Batch(
            images=read.images,
            targets=read.targets,
            weight_B=(torch.from_numpy(is_real) & ~read.skipped_B).float(),
            skipped_B=read.skipped_B,
            view_BV=read.view_BV,
            ordinal_B=torch.from_numpy(ordinals),
            random_BR=read.random_BR,
            is_grey_B=read.is_grey_B,
            global_count=min(self._batch_size, len(self._order) - first),
        )


class StepLoader:
    """The training loader of a whole run.

    Its state is the number of micro-batches that it has given so far: the same on every rank, for any number of workers.
    """

    def __init__(self, batches: StepBatches, num_batches: int, num_workers: int, pin_memory: bool):
        self._batches = batches
        self._num_batches = num_batches
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._next = 0

    def __len__(self) -> int:
        # NOTE: this counts the whole run, also after a resume. Lightning drops a batch of a stateful loader without a length.
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self._next, self._num_batches)
        for batch in build_loader(self._batches, numbers, self._num_workers, self._pin_memory):
            self._next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"num_yielded": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["num_yielded"]


def build_loader(
    batches: StepBatches, numbers: range, num_workers: int, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """A loader of the micro-batches with these numbers, in order. Up to `num_workers` processes read ahead."""
    num_workers = min(num_workers, len(numbers))
    if num_workers:
        check_semaphores()
    return _Loader(
        _Returned(batches),
        sampler=numbers,
        batch_size=None,
        num_workers=num_workers,
        # NOTE: a pipeline starts its jobs by a fork server, which would become the jobs' default, too. Their workers would then
        # come from a new fork server, which takes seconds to import torch, and would outlive a killed job, since they watch that
        # server instead of the job.
        multiprocessing_context="fork" if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_identity,
    )


class _Loader(torch.utils.data.DataLoader):
    """A DataLoader that raises the errors of its workers unchanged, and whose workers never outlive this process."""

    def __iter__(self) -> Iterator[Batch]:
        others = set(multiprocessing.active_children())
        with preemption.left_to_parent() if self.num_workers else contextlib.nullcontext():
            batches = super().__iter__()
        # NOTE: when a process exits while a loader is in use (an exception keeps the loader alive), torch asks the workers to
        # end by a signal that ours ignore, and waits for ever. This kills them first.
        workers = set(multiprocessing.active_children()) - others
        end = multiprocessing.util.Finalize(None, kill, args=(workers,), exitpriority=1)
        step_batches: StepBatches = self.dataset.batches
        # Only now, when the workers have been forked: a fork should not meet running threads.
        prefetch = step_batches.begin_prefetch(self.sampler)
        try:
            if prefetch is not None:
                prefetch.advance(*step_batches.locate(self.sampler[0]))
            for number, batch in zip(self.sampler, batches, strict=True):
                if isinstance(batch, ConcentrationError):
                    raise batch
                if prefetch is not None:
                    prefetch.advance(*step_batches.locate(number))
                yield batch
        finally:
            if prefetch is not None:
                prefetch.stop()
            batches = None  # this ends the workers, unless an exception still refers to the iterator
            if not any(worker.is_alive() for worker in workers):
                end.cancel()


class _Returned(torch.utils.data.Dataset):
    """Returns a ConcentrationError instead of raising it: torch would put the worker's traceback into its message."""

    def __init__(self, batches: StepBatches):
        self.batches = batches

    def __getitem__(self, number: int) -> Batch | ConcentrationError:
        try:
            return self.batches[number]
        except ConcentrationError as error:
            return error


def _identity(batch: Batch | ConcentrationError) -> Batch | ConcentrationError:
    return batch
