"""Real runs over http and s3: the same weights as from local shards, kills in the middle, one line for a mistake."""

import shutil

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from real_runs import (
    IMAGE_SIZE,
    TINY,
    Plant,
    Running,
    concentrate,
    load_json,
    load_weights,
    one_line,
    prepare_shards,
)
from servers import answer, be_silent, serve

STUDENT = ("student", "targets=labels", "name=generalist", *TINY, "trainer.window_shards=2")
TEACHER = ("teacher", "vertical=fruit", *TINY, "trainer.window_shards=2")
BRACES = ('data.train="train-{000000..000003}.tar"', "data.val=val-000000.tar", "data.test=null")


def prepare_remote(directory, url: str, *overrides: str, name="remote", **options):
    return concentrate("prepare", "data=shards", f"data.path={url}", f"data.image_size={IMAGE_SIZE}",
                       f"workdir={directory / name}", "num_processes=1", *overrides, directory=directory, **options)  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Shards, and a teacher and a generalist that were trained on them where they lie."""
    directory = tmp_path_factory.mktemp("local")
    prepare_shards(directory)
    for verb in (TEACHER, STUDENT):
        concentrate(*verb, f"workdir={directory / 'work'}", directory=directory)
    return directory


@pytest.fixture
def server(local):
    with serve(local / "given") as running:
        yield running


def assert_same_weights(left, right) -> None:
    left, right = load_weights(left), load_weights(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_networks_from_http_are_those_from_local_shards(num_workers, server, local, tmp_path):
    prepare_remote(tmp_path, server.url)
    assert load_json(tmp_path / "remote/shards/DONE.json") == load_json(local / "work/shards/DONE.json")
    shutil.rmtree(tmp_path / "remote" / "cache")
    for verb in (TEACHER, STUDENT):
        concentrate(*verb, f"trainer.num_workers={num_workers}", f"workdir={tmp_path / 'remote'}", directory=tmp_path)
    for name in ("teachers/fruit", "students/generalist"):
        assert_same_weights(local / "work" / name, tmp_path / "remote" / name)
    concentrate("evaluate", "name=generalist", f"workdir={tmp_path / 'remote'}", directory=tmp_path)
    assert server.count("test-000000.tar") == 2, "once indexed, once fetched again"


def test_networks_from_s3_are_those_from_local_shards(local, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    running = ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}"}
        system = fsspec.filesystem("s3", skip_instance_cache=True, **options)
        system.mkdir("shards")
        system.put(str(local / "given"), "shards/given", recursive=True)
        environment = {name: "testing" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        override = f'data.storage_options={{endpoint_url:"{options["endpoint_url"]}"}}'
        prepare_remote(tmp_path, "s3://shards/given", override, **environment)
        shutil.rmtree(tmp_path / "remote" / "cache")
        concentrate(*STUDENT, f"workdir={tmp_path / 'remote'}", directory=tmp_path, **environment)
    finally:
        running.stop()
    assert_same_weights(local / "work/students/generalist", tmp_path / "remote/students/generalist")


def test_a_run_that_is_killed_in_the_middle_of_a_download_is_resumed(server, local, tmp_path):
    prepare_remote(tmp_path, server.url)
    workdir = tmp_path / "remote"
    shutil.rmtree(workdir / "cache")
    num_before = len(server.requests)
    server.faults = {f"train-{n:06d}.tar": [be_silent(30)] for n in range(4)}
    running = Running([*STUDENT, f"workdir={workdir}"], tmp_path)
    running.wait_for(lambda: len(server.requests) > num_before and any((workdir / "cache").glob(".*.tmp")))
    running.process.kill()
    assert running.wait().code == -9
    assert list((workdir / "cache").glob("*.shard")) == []
    concentrate(*STUDENT, f"workdir={workdir}", directory=tmp_path)
    assert_same_weights(local / "work/students/generalist", workdir / "students/generalist")


def test_a_preparation_that_is_killed_goes_on_where_it_was(server, local, tmp_path):
    plant = Plant("concentration.data.index:ShardIndex.save", call=3, when="after")
    prepare_remote(tmp_path, server.url, plant=plant, code=-9)
    prepare_remote(tmp_path, server.url)
    assert [server.count(f"train-{n:06d}.tar") for n in range(4)] == [1] * 4
    assert load_json(tmp_path / "remote/shards/DONE.json") == load_json(local / "work/shards/DONE.json")


def test_a_small_cache_gives_the_same_weights_or_is_refused_with_the_numbers(server, local, tmp_path):
    """Preparing again notes another size, and leaves the rest as it is."""
    largest = max(path.stat().st_size for path in (local / "given").glob("*.tar"))
    prepare_remote(tmp_path, server.url, f"data.cache.gib={1.1 * largest / 2**30}", "data.cache.directory=own")
    finished = concentrate(*STUDENT, f"workdir={tmp_path / 'remote'}", directory=tmp_path, code=2)
    line = finished.err.splitlines()[-1]
    assert line.startswith(f"concentrate: {tmp_path}/own: may hold ")
    assert "but 2 shards are read at a time" in line
    done = (tmp_path / "remote/shards/DONE.json").read_bytes()
    prepare_remote(tmp_path, server.url, f"data.cache.gib={4 * largest / 2**30}", "data.cache.directory=own")
    assert (tmp_path / "remote/shards/DONE.json").read_bytes() == done
    concentrate(*STUDENT, f"workdir={tmp_path / 'remote'}", directory=tmp_path)
    assert_same_weights(local / "work/students/generalist", tmp_path / "remote/students/generalist")
    assert not (tmp_path / "remote" / "cache").exists()
    copies = [path.stat().st_size for path in (tmp_path / "own").glob("*.shard")]
    assert sum(copies) <= 4 * largest


def test_names_in_braces_need_no_listing_and_are_all_expected(server, tmp_path):
    server.faults[""] = [answer(403)] * 20
    line = one_line(prepare_remote(tmp_path, server.url, code=2))
    assert line.startswith(f"{server.url}/train-*.tar: ")
    assert "403" in line
    prepare_remote(tmp_path, server.url, *BRACES)
    done = load_json(tmp_path / "remote/shards/DONE.json")
    assert {split: facts["shards"] for split, facts in done["splits"].items()} == {"train": 4, "val": 1}
    missing = ('data.train="train-{000000..000004}.tar"', *BRACES[1:])
    finished = prepare_remote(tmp_path, server.url, *missing, name="other", code=2)
    assert f"{server.url}/train-000004.tar: cannot be fetched: no such file (1 try)" in finished.err
    assert "Traceback" not in finished.err


def test_a_shard_that_was_replaced_since_it_was_indexed_is_one_line(local, tmp_path):
    shutil.copytree(local / "given", tmp_path / "given")
    with serve(tmp_path / "given") as server:
        prepare_remote(tmp_path, server.url, "data.cache.retries=1")
        shutil.rmtree(tmp_path / "remote" / "cache")
        shutil.copy(tmp_path / "given/train-000001.tar", tmp_path / "given/train-000000.tar")
        finished = concentrate(*TEACHER, f"workdir={tmp_path / 'remote'}", directory=tmp_path, code=2)
    assert "Traceback" not in finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("concentrate: ")]
    assert f"{server.url}/train-000000.tar: cannot be fetched: the image of " in line
    assert "is not the one that was indexed (2 tries)" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.storage_options={secret:x}"], "storage_options.secret would be written to disk"),
        (["data.path=given", "data.storage_options={anon:true}"], "data.path is no URL; remove them"),
        (["data.path=given", "data.cache.gib=3"], "data.path is no URL; remove them"),
        (["data.path=https://me:word@host/x"], "a URL of the data holds a name or password"),
        (["data.path=nothing://host/x"], "Protocol not known: nothing"),
        (["data.labels=both"], "data.labels=both: expected 'auto', 'json' or 'cls'"),
        (["data.cache.retries=0", "data.path=http://127.0.0.1:1/x"], "http://127.0.0.1:1/x/taxonomy.json: cannot be fetched"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(overrides, expected, tmp_path):
    line = one_line(prepare_remote(tmp_path, "http://127.0.0.1:1", *overrides, code=2))
    assert expected in line
    assert "me:word" not in line
    assert not list((tmp_path / "remote").rglob("*.json")), "nothing was begun, and no secret was written"
