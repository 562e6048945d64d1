"""Batches by step: micro-batch i of a rank is a pure function of i, so a loader's whole state is one integer.

Shapes: B samples of a rank's micro-batch, G samples of a global batch.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from concentration import preemption
from concentration.data.decoding import UNDECODABLE, decode_shrunk, describe_undecodable
from concentration.data.index import Split
from concentration.data.loader_workers import kill, start_worker
from concentration.data.order import Order
from concentration.data.prefetch import Prefetch, check_room
from concentration.data.sample_targets import LabelTargets, SampleTargets
from concentration.data.shard_cache import ShardCache, load_cache
from concentration.data.views import CentreView, View, ViewConfig, Views, decode_view, draw_views
from concentration.distributed import slice_of_rank
from concentration.errors import ConcentrationError, DataError
from concentration.packed_targets import VIEW_BYTES
from concentration.processes import check_semaphores
from concentration.targets import SoftTargets

#: An image's bytes are read with others, until they are so many: see `SampleReader.read`.
_READ_TOGETHER_BYTES = 2**18


class Batch(NamedTuple):
    """One rank's share of a micro-batch.

    images: (B, 3, H, W) uint8, black where an image could not be decoded; in memory a pixel's three values lie together. (B, 0)
        from a reader of `resident`, whose views are made where the images are.
    targets: of each sample.
    weight_B: float32, 1; 0 for an undecodable image and for places behind the end of an epoch.
    skipped_B: bool, where an image could not be decoded.
    view_BV: (B, 13) uint8, the views that were seen, as `View.encode` writes them; zeros where skipped.
    ordinal_B: int64, which samples these are.
    random_BR: uint8, what views that are yet to be made need beside their records, `rendering.draw_random`; else (B, 0).
    is_grey_B: bool, whether the image's file is grey, as `decode_view` has it; True where skipped, False for crops.
    global_count: samples with a place in this step's global batch, over all ranks and micro-batches.
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


class ReadSamples(NamedTuple):
    """Images (B, 3, H, W) uint8, targets, and (B,), (B, 13), (B, R), (B,): as in `Batch`."""

    images: Tensor
    targets: SoftTargets
    skipped_B: Tensor
    view_BV: Tensor
    random_BR: Tensor
    is_grey_B: Tensor


class Reader(Protocol):
    """Reads samples by ordinal, inside worker processes, too.

    Attributes:
        split: of the samples.
        cache: of shards that lie elsewhere; None where all that is read is here.
    """

    split: Split
    cache: ShardCache | None

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """The samples' images and targets in this epoch."""


class SampleReader:
    """Reads and decodes samples by ordinal; holds open files, which do not travel to worker processes.

    Raises:
        DataError: a shard cannot be read or fetched, or has changed since it was indexed.
    """

    def __init__(self, split: Split, targets: SampleTargets, image_size: int, views: ViewConfig | None, seed: int):
        self.split = split
        self._targets = targets
        self._image_size = image_size
        self._views = views
        self._seed = seed
        #: None where the shards lie on this machine.
        self.cache = load_cache(split)
        self._files: dict[int, int] = {}

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __del__(self):
        for file in self._files.values():
            os.close(file)

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """The samples' images and targets in this epoch."""
        size = self._image_size
        # As decoders give them: a transposing copy of each image would be the dearest step beside decoding small ones.
        images = np.empty((len(ordinals), size, size, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
        views = self.choose_views(ordinals, epoch)
        seen: list[View | None] = []
        is_grey_B = np.ones(len(ordinals), dtype=bool)
        # NOTE: decoding empties the processor's caches of everything else, so that what comes between two images takes
        # several times as long as it does alone: hence the loop does no more than it must, and files are read in stretches.
        for row, content in enumerate(self._read_stretches(ordinals)):
            try:
                images[row], view, is_grey_B[row] = decode_view(content, views, row, size)
            except UNDECODABLE:
                images[row], view = 0, None
            seen.append(view)
        skipped_B = np.array([view is None for view in seen], dtype=bool)
        records = b"".join(bytes(VIEW_BYTES) if view is None else view.encode() for view in seen)
        view_BV = np.frombuffer(bytearray(records), dtype=np.uint8).reshape(len(ordinals), VIEW_BYTES)
        images, skipped_B, view_BV, is_grey_B = map(torch.from_numpy, (images, skipped_B, view_BV, is_grey_B))
        return ReadSamples(images, self.lookup(ordinals, epoch), skipped_B, view_BV, view_BV[:, :0], is_grey_B)

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        """The samples' targets alone."""
        return self._targets.lookup(ordinals, epoch)

    def choose_views(self, ordinals: np.ndarray, epoch: int) -> Views:
        """The views that the targets are of, where they are of stored ones; else new ones."""
        if stored := self._targets.views(ordinals, epoch):
            return stored
        return CentreView() if self._views is None else draw_views(self._views, self._seed, epoch, ordinals)

    def read_encoded(self, ordinal: int) -> bytes:
        """The image's bytes as they lie in the shard."""
        return next(self._read_stretches(np.array([ordinal])))

    def _read_stretches(self, ordinals: np.ndarray) -> Iterator[bytes]:
        """The images' bytes in turn, of which a few are read at once, and never so many that they would fill the memory."""
        contents, num_bytes = [], 0
        for place in self._locate(ordinals):
            contents.append(self._read_at(*place))
            num_bytes += len(contents[-1])
            if num_bytes >= _READ_TOGETHER_BYTES:
                yield from contents
                contents, num_bytes = [], 0
        yield from contents

    def _locate(self, ordinals: np.ndarray) -> list[list[int]]:
        """For each sample: its shard's number and its row there, and its image's offset, size and checksum."""
        numbers = np.searchsorted(self.split.shard_start, ordinals, side="right") - 1
        rows = ordinals - self.split.shard_start[numbers]
        places = np.empty((len(ordinals), 5), dtype=np.int64)
        places[:, 0], places[:, 1] = numbers, rows
        for number in set(numbers.tolist()):
            shard, of_shard = self.split.shards[number], numbers == number
            for column, values in enumerate((shard.image_offset, shard.image_size, shard.image_crc32), start=2):
                places[of_shard, column] = values[rows[of_shard]]
        return places.tolist()

    def _read_at(self, number: int, row: int, offset: int, size: int, crc32: int) -> bytes:
        """The bytes of an image, by what `_locate` says of it."""
        content, error = self._read_unchecked(number, offset, size)
        if self.cache is not None and zlib.crc32(content) != crc32:
            # The copy was checked when it was fetched: the disk has damaged it since, or somebody has.
            self._discard_copy(number)
            content, error = self._read_unchecked(number, offset, size)
        if error is None and zlib.crc32(content) == crc32:
            return content
        shard = self.split.shards[number]
        if self.cache is not None:
            raise DataError(
                f"{self.cache.directory}: its copy of {shard.path} is damaged again, just after it was fetched anew; look after "
                "that disk, or run `concentrate prepare` again with another data.cache.directory"
            )
        if error is not None:
            raise DataError(f"{shard.path}: cannot be read ({error.strerror}); bring it back")
        if len(content) != size:
            raise DataError(
                f"{shard.path}: ends inside the sample '{shard.keys[row]}'; the shard changed while it was read: "
                "bring it back and run the same command again"
            )
        raise DataError(
            f"{shard.path}: the image of '{shard.keys[row]}' is not the one that was indexed; the shard was replaced or "
            "damaged: bring it back and run the same command again, or prepare again"
        )

    def _read_unchecked(self, number: int, offset: int, size: int) -> tuple[bytes, OSError | None]:
        """The bytes there, or what stood against reading them."""
        try:
            return os.pread(self._open(number), size, offset), None
        except OSError as error:
            return b"", error

    def _discard_copy(self, number: int) -> None:
        """Takes a damaged copy out of the cache, unless another process has done so and fetched it again."""
        if number in self._files:
            file = self._files.pop(number)
            if os.fstat(file).st_nlink > 0:
                self.cache.discard(self.split.shards[number])
            os.close(file)

    def _open(self, number: int) -> int:
        if number not in self._files:
            if self.cache is not None:
                self._close_evicted()
            if len(self._files) >= 256:
                os.close(self._files.pop(next(iter(self._files))))
            shard = self.split.shards[number]
            self._files[number] = (
                os.open(shard.path, os.O_RDONLY) if isinstance(shard.path, Path) else self.cache.open(shard)
            )
        return self._files[number]

    def _close_evicted(self) -> None:
        """Closes copies that the cache has removed: open, they would go on filling the disk."""
        for number, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(number))


def explain_skipped(split: Split, ordinal: int) -> str:
    """Why the image of a sample was skipped: decoded once more, as readers say only that it was.

    Raises:
        DataError: as `SampleReader`.
    """
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size=1, views=None, seed=0)
    try:
        decode_shrunk(reader.read_encoded(ordinal), shorter_side=1)
    except UNDECODABLE as error:
        return describe_undecodable(error)
    return "cannot be seen in its stored views (it could not be decoded when they were drawn)"


class StepBatches(torch.utils.data.Dataset):
    """Micro-batch i of one rank, for every i from 0.

    A step's global batch is places [t*G, (t+1)*G) of its epoch's order; ranks take contiguous shares of it, and micro-batches
    contiguous shares of those. Places behind the end of the epoch are filled with samples of weight 0, so that every
    batch has the same shape. World size and number of workers change who reads a sample, never which batch it is in.
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
        """Fetches ahead for these micro-batches; None where the shards lie on this machine, or nothing is read."""
        if self._reader.cache is None or not numbers:
            return None
        epoch, place = self.locate(numbers[-1])
        return Prefetch(self._reader.split, self._order, self._reader.cache, (epoch, place + self._batch_size))

    def locate(self, number: int) -> tuple[int, int]:
        """The epoch of a micro-batch, and the place in it at which the global batch begins."""
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
    """The training loader of a whole run; its state is the number of micro-batches that it has handed out.

    The state is the same on every rank, whatever the number of workers.
    """

    def __init__(self, batches: StepBatches, num_batches: int, num_workers: int, pin_memory: bool):
        self._batches = batches
        self._num_batches = num_batches
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._next = 0

    def __len__(self) -> int:
        # NOTE: of the whole run, also after a resume. Lightning drops a batch of a stateful loader without a length.
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
    """The micro-batches with these numbers, in order, read ahead by at most `num_workers` processes."""
    num_workers = min(num_workers, len(numbers))
    if num_workers:
        check_semaphores()
    return _Loader(
        _Returned(batches),
        sampler=numbers,
        batch_size=None,
        num_workers=num_workers,
        # NOTE: said here, since a pipeline's jobs would take their own way of starting, a server that first imports torch
        # for seconds; and its workers would outlive a killed job, as they look for its server, not for it.
        multiprocessing_context="fork" if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_identity,
    )


class _Loader(torch.utils.data.DataLoader):
    """Raises the workers' errors as they were, and ends the workers with this process."""

    def __iter__(self) -> Iterator[Batch]:
        others = set(multiprocessing.active_children())
        with preemption.left_to_parent() if self.num_workers else contextlib.nullcontext():
            batches = super().__iter__()
        # NOTE: a process that exits with a loader still in use (an error keeps all that was in use) asks workers to end by
        # a signal, which they do not see, and would wait for ever.
        workers = set(multiprocessing.active_children()) - others
        end = multiprocessing.util.Finalize(None, kill, args=(workers,), exitpriority=1)
        step_batches: StepBatches = self.dataset.batches
        prefetch = step_batches.begin_prefetch(self.sampler)  # its threads begin when the workers have been forked
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
            batches = None  # ends the workers, unless an error keeps hold of it
            if not any(worker.is_alive() for worker in workers):
                end.cancel()


class _Returned(torch.utils.data.Dataset):
    """Returns an error of ours instead of raising it: torch would put the worker's whole traceback into its one line."""

    def __init__(self, batches: StepBatches):
        self.batches = batches

    def __getitem__(self, number: int) -> Batch | ConcentrationError:
        try:
            return self.batches[number]
        except ConcentrationError as error:
            return error


def _identity(batch: Batch | ConcentrationError) -> Batch | ConcentrationError:
    return batch
