"""The cache against a real server: contents, damage, the bound, several processes, and kills in the middle."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from servers import Server, answer, be_silent, send, serve

import concentration.data.remote
from concentration.data.index import ShardIndex, index_shard
from concentration.data.reader import SampleReader
from concentration.data.remote import Remote
from concentration.data.sample_targets import LabelTargets
from concentration.data.shard_cache import Access, CacheConfig, ShardCache, load_cache, save_access
from concentration.data.split import Split, check_keys, load_split
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config

NUM_SHARDS = 6
_CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(concentration.data.remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def folder(write_shard, tmp_path) -> Path:
    """Six shards of two samples."""
    for number in range(NUM_SHARDS):
        write_shard(tmp_path / "served" / f"{number}.tar", [["gull"], ["taxi"]])
    return tmp_path / "served"


@pytest.fixture
def server(folder):
    with serve(folder) as running:
        yield running


@pytest.fixture
def shards(folder, server, taxonomy) -> list[ShardIndex]:
    return [index_shard(folder / f"{n}.tar", taxonomy, f"{server.url}/{n}.tar") for n in range(NUM_SHARDS)]


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return build_cache(tmp_path, 64 * 2**20)


def build_cache(tmp_path: Path, bound_bytes: int, retries: int = 2) -> ShardCache:
    remote = Access(cache=CacheConfig(retries=retries, timeout_seconds=5)).build_remote()
    return ShardCache(tmp_path / "cache", bound_bytes, 2, remote)


def read(cache: ShardCache, shard: ShardIndex) -> bytes:
    file = cache.open(shard)
    try:
        return os.pread(file, shard.size_bytes + 1, 0)
    finally:
        os.close(file)


def list_entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()} - {".lock"}


def entry_of(shard: ShardIndex) -> str:
    return f"{shard.digest[:32]}.shard"


def test_a_shard_is_fetched_once_and_then_read_from_the_disk(folder, server, shards, cache, tmp_path):
    for _ in range(3):
        assert [read(cache, shard) for shard in shards] == [(folder / f"{n}.tar").read_bytes() for n in range(6)]
    assert [server.count(f"{n}.tar") for n in range(6)] == [1] * 6
    assert list_entries(tmp_path) == {entry_of(shard) for shard in shards}


def test_a_shard_that_is_admitted_is_indexed_and_kept(folder, server, shards, cache, taxonomy):
    for number, shard in enumerate(shards):
        url = f"{server.url}/{number}.tar"
        index = cache.admit(url, lambda path, url=url: index_shard(path, taxonomy, url))
        assert (index.path, index.digest) == (url, shard.digest)
        assert read(cache, shard) == (folder / f"{number}.tar").read_bytes()
        assert server.count(f"{number}.tar") == 1


def test_a_shard_that_cannot_be_indexed_leaves_nothing(folder, server, cache, taxonomy, tmp_path):
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:1000])
    url = f"{server.url}/0.tar"
    with pytest.raises(DataError, match=rf"^{url}: .*truncated"):
        cache.admit(url, lambda path: index_shard(path, taxonomy, url))
    assert list_entries(tmp_path) == set()


@pytest.mark.parametrize("change", ["shorter", "an image's byte"])
def test_a_shard_that_was_replaced_at_its_source_is_never_taken_for_the_indexed_one(
    change, folder, server, shards, cache, tmp_path
):
    content = bytearray((folder / "0.tar").read_bytes())
    content[int(shards[0].image_offset[1]) + 3] ^= 1
    (folder / "0.tar").write_bytes(content[:-512] if change == "shorter" else content)
    expected = "bytes, but" if change == "shorter" else "the image of '0-1' is not the one that was indexed"
    with pytest.raises(DataError, match=rf"^{server.url}/0\.tar: cannot be fetched: .*{expected}.*\(3 tries\)"):
        cache.open(shards[0])
    assert list_entries(tmp_path) == set()


def test_what_was_damaged_on_the_way_is_fetched_again(folder, server, shards, cache):
    content = (folder / "0.tar").read_bytes()
    server.faults["0.tar"] = [answer(503), send(content[::-1])]
    assert read(cache, shards[0]) == content
    assert server.count("0.tar") == 3


def test_copies_used_longest_ago_go_first_and_open_ones_stay_readable(folder, server, shards, tmp_path):
    size = shards[0].size_bytes
    assert {shard.size_bytes for shard in shards} == {size}
    cache = build_cache(tmp_path, 3 * size + 100)
    for number in (0, 1, 2):
        read(cache, shards[number])
    kept_open = cache.open(shards[1])
    read(cache, shards[0])
    for number, expected in ((3, {0, 1, 3}), (4, {0, 3, 4}), (5, {3, 4, 5})):
        read(cache, shards[number])
        assert list_entries(tmp_path) == {entry_of(shards[n]) for n in expected}
    assert os.pread(kept_open, size, 0) == (folder / "1.tar").read_bytes()
    os.close(kept_open)
    assert server.count("1.tar") == 1


def test_files_of_others_in_the_directory_are_left_alone(shards, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("train-000000.tar", "notes.tmp", "x.shard"):
        (tmp_path / "cache" / name).write_bytes(bytes(10_000))
    cache = build_cache(tmp_path, shards[0].size_bytes + 10)
    for shard in shards[:3]:
        read(cache, shard)
    assert list_entries(tmp_path) == {"train-000000.tar", "notes.tmp", "x.shard", entry_of(shards[2])}


def test_a_shard_larger_than_the_bound_is_refused_at_once(server, shards, tmp_path):
    with pytest.raises(
        ConfigError, match=r"0\.tar: \d+ bytes, more than the cache may hold, 1000 .*larger data\.cache\.gib"
    ):
        build_cache(tmp_path, 1000).open(shards[0])
    assert server.requests == []


def test_a_directory_that_cannot_be_used_is_one_line(shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/cache: cannot be used .*data\.cache\.directory"):
        build_cache(tmp_path, 2**20).open(shards[0])


def test_a_full_disk_is_the_caches_and_not_the_servers(server, shards, tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    copy = Remote.copy
    monkeypatch.setattr(Remote, "copy", lambda remote, url, path, check: copy(remote, url, Path("/dev/full"), check))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/cache: cannot be used \(No space left on device\); free space"):
        build_cache(tmp_path, 2**20).open(shards[0])
    assert not list_entries(tmp_path)


def test_a_cache_that_is_removed_while_it_is_used_is_filled_again(folder, shards, cache, tmp_path):
    read(cache, shards[0])
    shutil.rmtree(tmp_path / "cache")
    assert read(cache, shards[0]) == (folder / "0.tar").read_bytes()


def start(target, *args) -> multiprocessing.Process:
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def read_or_exit(cache: ShardCache, shards: list[ShardIndex], folder: Path) -> None:
    for number, shard in enumerate(shards):
        if read(cache, shard) != (folder / f"{number}.tar").read_bytes():
            os._exit(3)


def test_processes_and_threads_that_need_a_shard_wait_for_the_one_that_fetches_it(folder, server, shards, cache):
    server.delay_seconds = 0.3
    processes = [start(read_or_exit, cache, shards[:1], folder) for _ in range(3)]
    threads = [threading.Thread(target=read, args=(cache, shards[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for waiting in (*processes, *threads):
        waiting.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.count("0.tar") == 1


def read_for_ever(cache: ShardCache, shards: list[ShardIndex], folder: Path, turns: int) -> None:
    for turn in range(turns):
        order = shards if (os.getpid() + turn) % 2 else shards[::-1]
        threads = [threading.Thread(target=read, args=(cache, shard)) for shard in order[:2]]
        for thread in threads:
            thread.start()
        for shard in order:
            if read(cache, shard) != (folder / f"{shards.index(shard)}.tar").read_bytes():
                os._exit(3)
        for thread in threads:
            thread.join()


def test_two_processes_with_threads_never_go_over_the_bound(folder, server, shards, tmp_path):
    """What is being written counts as whole."""
    size = shards[0].size_bytes
    cache = build_cache(tmp_path, 3 * size)
    server.delay_seconds = 0.005
    processes = [start(read_for_ever, cache, shards, folder, 4) for _ in range(2)]
    most = 0
    while any(process.is_alive() for process in processes):
        found = list_entries(tmp_path) if (tmp_path / "cache").exists() else set()
        # A copy that replaces its temporary file while the folder is listed may be seen twice.
        names = {name.strip(".").split(".")[0] for name in found}
        most = max(most, len(names))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0]
    assert most == 3
    assert len(list_entries(tmp_path)) == 3


def test_a_killed_download_blocks_nobody_and_leaves_nothing(folder, server, shards, tmp_path):
    size = shards[0].size_bytes
    cache = build_cache(tmp_path, 2 * size)
    server.faults = {f"{n}.tar": [be_silent(90)] for n in (0, 1)}
    processes = [start(read_or_exit, cache, shards[n : n + 1], folder) for n in (0, 1)]
    deadline = time.monotonic() + 60
    while len(server.requests) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {name.rpartition(".")[2] for name in list_entries(tmp_path)} == {"tmp"}
    waiting = start(read_or_exit, cache, shards[:1], folder)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    waiting.join(60)
    assert waiting.exitcode == 0, "one that waited for the killed one goes on"
    assert read(cache, shards[2]) == (folder / "2.tar").read_bytes(), "what it had taken is free again"
    assert list_entries(tmp_path) == {entry_of(shards[0]), entry_of(shards[2])}


def hold_lock(cache: ShardCache, name: str, ready, release) -> None:
    with cache._try_lock(name) as is_ours:
        assert is_ours
        ready.set()
        release.wait(60)


def test_a_child_that_is_forked_during_a_download_neither_holds_nor_inherits_its_lock(shards, cache):
    name = shards[0].digest[:32]
    ready, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold_lock, args=(cache, name, ready, release))
    thread.start()
    ready.wait()
    may_end = _CONTEXT.Event()
    child = start(wait_and_lock, cache, name, may_end)
    time.sleep(0.1)
    with cache._try_lock(name) as is_ours:
        assert not is_ours
    release.set()
    thread.join()
    with cache._try_lock(name) as is_ours:
        assert is_ours, "the child does not hold it"
    may_end.set()
    child.join(60)
    assert child.exitcode == 0


def wait_and_lock(cache: ShardCache, name: str, may_end) -> None:
    with cache._try_lock(name) as is_ours:
        assert not is_ours
    may_end.wait(10)
    with cache._try_lock(name) as is_ours:
        assert is_ours, "a lock that was held by a thread of the parent is free here"


@pytest.fixture
def split(shards, taxonomy, tmp_path) -> Split:
    """A split of remote shards whose indices lie in `work/shards`."""
    directory = tmp_path / "work" / "shards"
    for number, shard in enumerate(shards):
        shard.save(directory / f"train-{number:06d}.index")
    return load_split(directory, "train", taxonomy)


def test_a_split_knows_that_its_shards_are_remote_and_how_they_are_reached(server, split, tmp_path, monkeypatch):
    assert split.is_remote
    assert split.key(3) == "1.tar/1-1"
    check_keys(split)
    with pytest.raises(DataError, match=r"access\.json: missing.*`concentrate prepare` again"):
        load_cache(split)
    save_access(Access(cache=CacheConfig(gib=2, retries=7)), split.directory)
    cache = load_cache(split)
    assert (cache.directory, cache.bound_bytes, cache.remote.retries) == (tmp_path / "work" / "cache", 2**31, 7)
    monkeypatch.setenv("CONCENTRATION_CACHE", "/elsewhere")
    assert load_cache(split).directory == Path("/elsewhere")
    save_access(Access(cache=CacheConfig(directory=tmp_path / "own")), split.directory)
    assert load_cache(split).directory == tmp_path / "own"
    (split.directory / "access.json").write_text("{")
    with pytest.raises(DataError, match=r"access\.json: missing or damaged"):
        load_cache(split)


def build_reader(split: Split) -> SampleReader:
    save_access(Access(cache=CacheConfig(retries=2)), split.directory)
    return SampleReader(split, LabelTargets(split, smear=False), 8, None, 0)


def damage(path: Path, shard: ShardIndex) -> None:
    """As a failing disk does: the size and all but a byte of the first image are as before."""
    content = bytearray(path.read_bytes())
    content[int(shard.image_offset[0])] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again(is_cut, server, shards, split, tmp_path):
    reader, other = build_reader(split), build_reader(split)
    first, last = reader.read_encoded(0), other.read_encoded(1)
    copy = tmp_path / "work/cache" / entry_of(shards[0])
    os.truncate(copy, int(shards[0].image_offset[0])) if is_cut else damage(copy, shards[0])
    assert reader.read_encoded(0) == other.read_encoded(0) == first
    assert other.read_encoded(1) == last
    assert server.count("0.tar") == 2, "once more, and not for each who has noticed"


def test_a_source_that_was_replaced_is_named_where_its_copy_is_damaged_too(folder, server, shards, split, tmp_path):
    reader = build_reader(split)
    reader.read_encoded(0)
    for path in (folder / "0.tar", tmp_path / "work/cache" / entry_of(shards[0])):
        damage(path, shards[0])
    with pytest.raises(DataError, match=rf"^{server.url}/0\.tar: cannot be fetched: the image of '0-0' is not"):
        reader.read_encoded(0)


def test_a_disk_that_damages_every_copy_is_named(shards, split, tmp_path, monkeypatch):
    fetch = ShardCache._fetch

    def fetch_and_damage(cache, *arguments):
        fetched = fetch(cache, *arguments)
        damage(cache.directory / entry_of(shards[0]), shards[0])
        return fetched

    monkeypatch.setattr(ShardCache, "_fetch", fetch_and_damage)
    with pytest.raises(DataError, match=rf"^{tmp_path}/work/cache: its copy of .*/0\.tar is damaged again"):
        build_reader(split).read_encoded(0)


@pytest.mark.parametrize(
    "options",
    [{"secret": "x"}, {"key": "x"}, {"token": "x"}, {"client_kwargs": {"headers": {"Authorization": "x"}}}, {"account_key": "x"}],
)  # fmt: skip
def test_secrets_are_not_taken_since_they_would_be_written_to_disk(options):
    with pytest.raises(ConfigError) as caught:
        parse_config(Access, {"storage_options": options})
    assert "would be written to disk; use the environment's credentials" in str(caught.value)
    assert "'x'" not in str(caught.value)
    harmless = {"anon": True, "endpoint_url": "http://host:1", "client_kwargs": {"region_name": "here"}}
    parse_config(Access, {"storage_options": harmless})


def test_the_server_of_the_tests_counts_what_is_asked(server: Server, cache, shards):
    read(cache, shards[0])
    assert server.requests == ["GET /0.tar"], "one request a shard"
