"""Prefetching against a real server: what is fetched when, that it saves the waiting, and that nothing hangs on it."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from servers import Fault, answer, be_silent, serve

import concentration.data.remote
from concentration.data.index import index_shard
from concentration.data.loader import StepBatches, StepLoader, build_loader
from concentration.data.order import ClassBalancedOrder, SequentialOrder, WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.shard_cache import Access, CacheConfig, load_cache, save_access
from concentration.data.split import Split, load_split
from concentration.errors import ConfigError, DataError

NUM_SHARDS, NUM_SAMPLES, WINDOW = 8, 6, 2


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(concentration.data.remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def server(write_shard, tmp_path):
    for number in range(NUM_SHARDS):
        write_shard(tmp_path / "served" / f"{number}.tar", [["gull"]] * NUM_SAMPLES)
    with serve(tmp_path / "served") as running:
        yield running


@pytest.fixture
def make_remote(server, taxonomy, tmp_path):
    """(options of the cache, name): a split of the server's shards, with a cache of its own."""

    def make(name="work", **options) -> Split:
        directory = tmp_path / name / "shards"
        for number in range(NUM_SHARDS):
            url = f"{server.url}/{number}.tar"
            index = index_shard(tmp_path / "served" / f"{number}.tar", taxonomy, url)
            index.save(directory / f"train-{number:06d}.index")
        save_access(Access(cache=CacheConfig(**options)), directory)
        return load_split(directory, "train", taxonomy)

    return make


def build_batches(split: Split, order=None, batch_size=NUM_SAMPLES) -> StepBatches:
    order = order or WindowOrder(split.by_shard(range(len(split))), seed=5, window_shards=WINDOW)
    reader = SampleReader(split, LabelTargets(split, smear=False), 8, None, 0)
    return StepBatches(reader, order, batch_size, 1, 0, 1)


def wait_for(condition, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def list_windows(split: Split, epoch: int) -> list[set[str]]:
    """The shards of each window, from the samples themselves."""
    order = WindowOrder(split.by_shard(range(len(split))), seed=5, window_shards=WINDOW)
    ordinals = order.take(epoch, np.arange(len(order))).reshape(-1, WINDOW * NUM_SAMPLES)
    return [{f"/{split.shard_of(ordinal)}.tar" for ordinal in window} for window in ordinals]


def asked_for(server) -> set[str]:
    return {request.removeprefix("GET ") for request in server.requests}


def test_the_next_window_is_fetched_while_this_one_is_used_and_no_other(server, make_remote):
    split = make_remote()
    windows = list_windows(split, 0)
    loaded = iter(StepLoader(build_batches(split), NUM_SHARDS, 0, pin_memory=False))
    for number in range(NUM_SHARDS):
        next(loaded)
        expected = set().union(*windows[: number // WINDOW + 2])
        wait_for(lambda expected=expected: asked_for(server) == expected)
    assert list(loaded) == []
    assert sorted(server.requests) == [f"GET /{n}.tar" for n in range(NUM_SHARDS)], "each once"


def test_workers_and_the_threads_of_the_main_process_fetch_each_shard_once(server, make_remote):
    """The workers read ahead, here further than the threads fetch."""
    server.delay_seconds = 0.05
    loader = StepLoader(build_batches(make_remote()), NUM_SHARDS, num_workers=2, pin_memory=False)
    assert len(list(loader)) == NUM_SHARDS
    assert sorted(server.requests) == [f"GET /{n}.tar" for n in range(NUM_SHARDS)]


def test_the_first_window_of_the_next_epoch_comes_after_the_last(server, make_remote):
    split = make_remote()
    cache = load_cache(split)
    loaded = iter(StepLoader(build_batches(split), 2 * NUM_SHARDS, 0, pin_memory=False))
    for _ in range(NUM_SHARDS - WINDOW):
        next(loaded)
    for shard in split.shards:
        cache.discard(shard)
    next(loaded)
    *_, last = list_windows(split, 0)
    expected = last | list_windows(split, 1)[0]
    copies = [
        cache.directory / f"{shard.digest[:32]}.shard"
        for shard in split.shards
        if shard.path.removeprefix(server.url) in expected
    ]
    assert len(copies) == len(expected) > WINDOW
    wait_for(lambda: all(copy.exists() for copy in copies))


def compute_gib(split: Split, num_shards: int) -> float:
    return num_shards * int(split.shard_bytes.max()) / 2**30


def test_nothing_is_fetched_behind_the_end_of_the_run(server, make_remote):
    split = make_remote()
    windows = list_windows(split, 0)
    batches = list(StepLoader(build_batches(split), WINDOW, 0, pin_memory=False))
    assert len(batches) == WINDOW
    time.sleep(0.1)
    assert asked_for(server) == windows[0]


def test_a_resumed_loader_begins_at_its_own_window(server, make_remote):
    split = make_remote()
    loader = StepLoader(build_batches(split), NUM_SHARDS, 0, pin_memory=False)
    loader.load_state_dict({"num_yielded": 2 * WINDOW})
    assert len(list(loader)) == NUM_SHARDS - 2 * WINDOW
    assert asked_for(server) == set().union(*list_windows(split, 0)[2:])


def test_samples_in_sequence_are_fetched_shard_by_shard(server, make_remote):
    split = make_remote()
    batches = build_batches(split, SequentialOrder(np.arange(len(split))), batch_size=3)
    loaded = iter(build_loader(batches, range(batches.steps_per_epoch), num_workers=0))
    next(loaded)
    wait_for(lambda: asked_for(server) == {"/0.tar", "/1.tar"})
    assert len(list(loaded)) == 2 * NUM_SHARDS - 1
    assert sorted(server.requests) == [f"GET /{n}.tar" for n in range(NUM_SHARDS)]


def read_epoch(server, split: Split, num_workers: int, patience_seconds: float) -> tuple[list[bool], float]:
    """For each window whether all of it was asked for before any of it was answered; and how long the epoch took, in seconds.

    The server answers a shard when the others of its window have been asked for, too, or it has lost patience.
    """
    server.requests.clear()
    batches, windows = build_batches(split), list_windows(split, 0)
    is_together = [True] * len(windows)

    def wait_for_others(number: int) -> Fault:
        def wait(_) -> bool:
            deadline = time.monotonic() + patience_seconds
            while not windows[number] <= asked_for(server) and time.monotonic() < deadline:
                time.sleep(0.002)
            is_together[number] &= windows[number] <= asked_for(server)
            return False

        return wait

    server.faults = {name[1:]: [wait_for_others(n)] for n, window in enumerate(windows) for name in window}
    started = time.perf_counter()
    assert len(list(build_loader(batches, range(batches.steps_per_epoch), num_workers))) == NUM_SHARDS
    return is_together, time.perf_counter() - started


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prefetching_hides_the_waiting_for_the_server(num_workers, server, make_remote, monkeypatch):
    """The shards of a window are fetched at the same time, not one by one as they are read."""
    server.delay_seconds = 0.05
    with_it, with_seconds = read_epoch(server, make_remote("with"), num_workers, patience_seconds=30)
    monkeypatch.setattr(StepBatches, "begin_prefetch", lambda self, numbers: None)
    without, without_seconds = read_epoch(server, make_remote("without"), num_workers, patience_seconds=0)
    print(f"{num_workers} workers: {with_seconds:.2f} s with prefetch, {without_seconds:.2f} s without")
    assert with_it == [True] * (NUM_SHARDS // WINDOW)
    assert without == [False] * (NUM_SHARDS // WINDOW)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_cannot_be_had_is_one_error_when_it_is_needed(num_workers, server, make_remote):
    split = make_remote(retries=1)
    lost = sorted(list_windows(split, 0)[1])[0]
    server.faults[lost[1:]] = [answer(503)] * 50
    seen = []
    loader = StepLoader(build_batches(split), NUM_SHARDS, num_workers, pin_memory=False)
    with pytest.raises(DataError) as caught:
        seen.extend(loader)
    assert str(caught.value).startswith(f"{server.url}{lost}: cannot be fetched: the server answers 503")
    assert "(2 tries)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(seen) == WINDOW, "not before it is needed"


def test_what_failed_in_the_background_and_passed_is_no_error(server, make_remote):
    """The second window's shards fail once, in the background, and are there when they are needed."""
    split = make_remote(retries=0)
    second = list_windows(split, 0)[1]
    server.faults = {name[1:]: [answer(503)] for name in second}
    loaded = iter(StepLoader(build_batches(split), NUM_SHARDS, 0, pin_memory=False))
    next(loaded)
    wait_for(lambda: second <= asked_for(server))
    assert len(list(loaded)) == NUM_SHARDS - 1
    assert all(server.requests.count(f"GET {name}") == 2 for name in second)


IN_USE = []  # keeps a loader, as the traceback of an error does


def read_one_and_exit(batches: StepBatches) -> None:
    IN_USE.append(iter(StepLoader(batches, NUM_SHARDS, 1, pin_memory=False)))
    next(IN_USE[0])


def test_a_process_ends_while_shards_are_being_fetched(server, make_remote):
    split = make_remote()
    for name in list_windows(split, 0)[1]:
        server.faults[name[1:]] = [be_silent(90)]
    process = multiprocessing.get_context("fork").Process(target=read_one_and_exit, args=(build_batches(split),))
    process.start()
    process.join(60)
    is_alive = process.is_alive()
    process.kill()
    assert not is_alive
    assert process.exitcode == 0


def count_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_threads_end_with_their_loader(make_remote):
    split = make_remote(connections=3)
    before = count_threads()
    loaded = iter(StepLoader(build_batches(split), NUM_SHARDS, 0, pin_memory=False))
    next(loaded)
    assert count_threads() == before + 3
    loaded.close()
    wait_for(lambda: count_threads() == before)


def test_shards_on_this_machine_are_not_fetched(make_split, tmp_path):
    split = make_split(tmp_path, [[["gull"]] * 4])
    batches = build_batches(split, batch_size=2)
    assert batches.begin_prefetch(range(2)) is None
    before = count_threads()
    for _ in build_loader(batches, range(2), num_workers=0):
        assert count_threads() == before


def test_a_cache_that_is_too_small_is_refused_with_the_numbers_before_anything_is_fetched(server, make_remote):
    """Two windows, or all there is."""
    needed = compute_gib(make_remote(), 2 * WINDOW)
    build_batches(make_remote("enough", gib=needed))
    split = make_remote("small", gib=needed * 0.99)
    expected = rf"small/cache: may hold .* GiB \(data\.cache\.gib\), but {WINDOW} shards .*trainer\.window_shards"
    with pytest.raises(ConfigError, match=expected):
        build_batches(split)
    build_batches(split, SequentialOrder(np.arange(len(split))))
    balanced = ClassBalancedOrder([np.arange(len(split))], len(split), seed=0)
    with pytest.raises(ConfigError, match=f"{NUM_SHARDS} shards"):
        build_batches(split, balanced)
    build_batches(make_remote("all", gib=compute_gib(split, NUM_SHARDS)), balanced)
    assert server.requests == []


def test_copies_that_were_evicted_do_not_fill_the_disk_as_open_files(make_remote, tmp_path):
    split = make_remote("small", gib=compute_gib(make_remote(), 2 * WINDOW))
    most = 0
    for _ in StepLoader(build_batches(split), 2 * NUM_SHARDS, 0, pin_memory=False):
        files = [read_link(fd) for fd in os.listdir("/proc/self/fd")]
        gone = [name for name in files if name.startswith(f"{tmp_path}/small") and name.endswith("(deleted)")]
        most = max(most, len(gone))
    assert most <= 2 * WINDOW, "of the two windows that were read last"


def read_link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
