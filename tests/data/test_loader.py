"""Batches: the same global batches for any ranks, micro-batches and workers, exact resume, and workers that end."""

import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from labelled_shards import NUM_SAMPLES, SEED, build_reader

from concentration.data.loader import Batch, StepBatches, StepLoader, build_loader
from concentration.data.loader_workers import start_worker
from concentration.data.order import SequentialOrder, WindowOrder
from concentration.errors import DataError


@pytest.fixture
def order(split):
    return WindowOrder(split.by_shard(np.arange(NUM_SAMPLES)), seed=SEED, window_shards=2)


def join_global_batch(batches_of_rank: list[StepBatches], step: int, accumulate: int) -> Batch:
    """What all ranks see in all micro-batches of a step, in order of the places."""
    parts = [batches[step * accumulate + micro] for batches in batches_of_rank for micro in range(accumulate)]
    assert len({part.global_count for part in parts}) == 1
    targets = torch.cat([part.targets.dense(11) for part in parts])
    joined = [
        torch.cat([getattr(part, name) for part in parts])
        for name in Batch._fields
        if name not in ("targets", "global_count")
    ]
    images, *others = joined
    return Batch(images, targets, *others, parts[0].global_count)


def assert_same(left: Batch, right: Batch) -> None:
    assert left.ordinal_B.tolist() == right.ordinal_B.tolist()
    assert left.weight_B.tolist() == right.weight_B.tolist()
    assert left.skipped_B.tolist() == right.skipped_B.tolist()
    assert left.global_count == right.global_count
    assert torch.equal(left.images, right.images)
    assert torch.equal(left.view_BV, right.view_BV)
    if isinstance(left.targets, torch.Tensor):
        assert torch.equal(left.targets, right.targets)
    else:
        assert torch.equal(left.targets.index_BK, right.targets.index_BK)
        assert torch.equal(left.targets.probability_BK, right.targets.probability_BK)


@pytest.mark.parametrize("batch_size", [5, 7, 12, 16, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_all_ranks_and_micro_batches_together_are_the_slices_of_the_order(
    batch_size, world_size, accumulate, split, order
):
    """Also where the ranks do not divide the batch, nor the batch the epoch."""
    if batch_size < world_size * accumulate:
        with pytest.raises(DataError, match=f"batch_size={batch_size} .*{world_size} processes.*{accumulate} micro"):
            StepBatches(build_reader(split), order, batch_size, accumulate, 0, world_size)
        return
    reader = build_reader(split)
    batches = [StepBatches(reader, order, batch_size, accumulate, rank, world_size) for rank in range(world_size)]
    (one,) = (StepBatches(build_reader(split), order, batch_size, 1, 0, 1),)
    steps_per_epoch = -(-NUM_SAMPLES // batch_size)
    assert {b.steps_per_epoch for b in batches} == {steps_per_epoch}
    for epoch in (0, 1):
        seen = []
        whole = order.take(epoch, np.arange(NUM_SAMPLES)).tolist()
        for step_of_epoch in range(steps_per_epoch):
            step = epoch * steps_per_epoch + step_of_epoch
            batch = join_global_batch(batches, step, accumulate)
            assert_same(batch, join_global_batch([one], step, 1))
            real = whole[step_of_epoch * batch_size : (step_of_epoch + 1) * batch_size]
            num_padded = batch_size - len(real)
            assert batch.ordinal_B[: len(real)].tolist() == real
            assert len(batch.ordinal_B) == batch_size
            assert batch.weight_B.tolist() == [1.0] * len(real) + [0.0] * num_padded
            assert batch.weight_B.dtype == torch.float32
            assert batch.global_count == len(real)
            seen += batch.ordinal_B[batch.weight_B == 1].tolist()
        assert sorted(seen) == list(range(NUM_SAMPLES))


def test_micro_batches_of_ranks_differ_by_one_at_most(split, order):
    sizes = {
        len(StepBatches(build_reader(split), order, 13, 2, rank, 3)[micro].ordinal_B)
        for rank in range(3)
        for micro in (0, 1)
    }
    assert max(sizes) - min(sizes) <= 1


def test_a_sequence_is_seen_in_its_order_once(split):
    ordinals = np.array([3, 1, 8, 15, 0])
    batches = StepBatches(build_reader(split, None), SequentialOrder(ordinals), 2, 1, 0, 1)
    loaded = list(build_loader(batches, range(batches.steps_per_epoch), num_workers=0))
    assert [batch.ordinal_B[: batch.global_count].tolist() for batch in loaded] == [[3, 1], [8, 15], [0]]


@pytest.fixture
def batches(split, order):
    return StepBatches(build_reader(split), order, batch_size=6, accumulate=2, rank=1, world_size=2)


def test_any_number_of_workers_gives_the_same_batches(batches):
    alone, shared = (list(StepLoader(batches, 9, num_workers, pin_memory=False)) for num_workers in (0, 2))
    assert len(alone) == len(shared) == 9
    for number, (left, right) in enumerate(zip(alone, shared, strict=True)):
        assert_same(left, right)
        assert_same(left, batches[number])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_gives_the_remaining_batches_exactly(num_workers, batches):
    expected = [batches[number] for number in range(9)]
    for num_seen in (0, 1, 5, 9):
        begun = StepLoader(batches, 9, num_workers, pin_memory=False)
        seen = list(itertools.islice(begun, num_seen))
        state = begun.state_dict()
        assert state == {"num_yielded": num_seen}, "what is read ahead does not count"
        resumed = StepLoader(batches, 9, 2 - num_workers, pin_memory=False)
        resumed.load_state_dict(state)
        assert len(resumed) == 9
        for left, right in zip(itertools.chain(seen, resumed), expected, strict=True):
            assert_same(left, right)
        assert resumed.state_dict() == {"num_yielded": 9}
        assert list(resumed) == []


def test_batches_are_a_function_of_their_number_alone(batches):
    expected = [batches[number] for number in range(8)]
    for number in (7, 0, 3, 3, 6):
        assert_same(batches[number], expected[number])


def test_epochs_see_other_views_of_a_sample(split, order):
    batches = StepBatches(build_reader(split), order, NUM_SAMPLES, 1, 0, 1)
    first, second = (batches[epoch] for epoch in (0, 1))
    assert first.ordinal_B.tolist() != second.ordinal_B.tolist()
    images = [dict(zip(batch.ordinal_B.tolist(), batch.images, strict=True)) for batch in (first, second)]
    assert any(not torch.equal(images[0][ordinal], images[1][ordinal]) for ordinal in range(NUM_SAMPLES))


REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StruckAtBirth:
    """While it lives, every process that is forked sends itself what asks a job to stop, before anything else."""

    def __init__(self):
        multiprocessing.util.register_after_fork(self, StruckAtBirth.strike)

    def strike(self):
        for number in REQUESTS_TO_STOP:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("is_struck_at_birth", [False, True])
def test_workers_outlive_the_signals_that_ask_the_main_process_to_stop(batches, is_struck_at_birth):
    others = set(multiprocessing.active_children())
    strike = StruckAtBirth() if is_struck_at_birth else None  # noqa: F841
    loaded = []
    for batch in StepLoader(batches, 40, num_workers=2, pin_memory=False):
        if not loaded:
            workers = set(multiprocessing.active_children()) - others
            assert len(workers) == 2
            for worker, number in itertools.product(workers, REQUESTS_TO_STOP):
                os.kill(worker.pid, number)
        loaded.append(batch)
    assert len(loaded) == 40
    for number, batch in enumerate(loaded):
        assert_same(batch, batches[number])


IN_USE = []  # keeps a loader, as the traceback of an error does


def leave_in_use(batches: StepBatches) -> None:
    IN_USE.append(iter(StepLoader(batches, 40, num_workers=2, pin_memory=False)))
    next(IN_USE[0])


def test_a_process_that_exits_with_a_loader_in_use_does_not_wait_for_its_workers(batches):
    process = multiprocessing.get_context("fork").Process(target=leave_in_use, args=(batches,))
    process.start()
    process.join(60)
    is_alive = process.is_alive()
    process.kill()
    assert not is_alive
    assert process.exitcode == 0


def lose_a_batch_after_the_end() -> None:
    start_worker(0)
    queue = multiprocessing.Queue()
    queue.close()
    queue._on_queue_feeder_error(OSError("no space"), (0, "a batch"))


def test_a_batch_that_is_lost_when_nobody_waits_any_more_is_not_told():
    """Two workers may find shared memory full, and the second one when the first has ended the run."""
    process = multiprocessing.get_context("fork").Process(target=lose_a_batch_after_the_end)
    process.start()
    process.join(60)
    assert process.exitcode == 0
