"""Files behind URLs against real servers: what is had, what is tried again, and the one line where it cannot be had."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from servers import answer, be_silent, hang_up, redirect, send, send_part, serve

import concentration.data.remote
from concentration.data.remote import Remote, WrongContentError, join, name_of, parse_location
from concentration.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(concentration.data.remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    with serve(folder) as running:
        yield running


def build_remote(retries=3, timeout_seconds=5.0, **options) -> Remote:
    return Remote(retries, timeout_seconds, options)


def copy(remote: Remote, url: str, folder) -> bytes:
    """Refuses what is not CONTENT, as the cache refuses what was not indexed."""

    def check(path) -> bytes:
        if (found := path.read_bytes()) != CONTENT:
            raise WrongContentError(f"{len(found)} bytes of another kind")
        return found

    return remote.copy(url, folder / "copy", check)


def refuse(expected: str, remote: Remote, url: str, folder, error=DataError) -> None:
    with pytest.raises(error) as caught:
        copy(remote, url, folder)
    assert str(caught.value).startswith(url)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_a_server_are_listed_measured_read_and_copied(server, tmp_path):
    for name in ("b.tar", "c.txt"):
        (tmp_path / "served" / name).write_bytes(b"12")
    (tmp_path / "served" / "more").mkdir()
    (tmp_path / "served" / "more" / "d.tar").write_bytes(b"3")
    remote = build_remote()
    assert remote.glob(f"{server.url}/*.tar") == [f"{server.url}/a.tar", f"{server.url}/b.tar"]
    assert remote.glob(f"{server.url}/more/*.tar") == [f"{server.url}/more/d.tar"]
    assert remote.glob(f"{server.url}/*.zip") == []
    assert remote.size(f"{server.url}/a.tar") == len(CONTENT)
    assert remote.read(f"{server.url}/c.txt") == b"12"
    assert copy(remote, f"{server.url}/a.tar", tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("faults", "num_requests"),
    [
        ([answer(503), answer(503)], 3),
        ([answer(500), answer(429), answer(408)], 4),
        ([hang_up], 2),
        ([send_part(CONTENT[:1000], len(CONTENT))] * 2, 3),
        ([be_silent(4)], 2),
        ([send(CONTENT[:-1])], 2),
        ([send(CONTENT[::-1])] * 3, 4),
    ],
    ids=["503", "500 429 408", "hangs up", "hangs up in the middle", "silent", "short", "other content"],
)
def test_what_may_pass_is_tried_again(faults, num_requests, server, tmp_path):
    server.faults["a.tar"] = list(faults)
    assert copy(build_remote(timeout_seconds=2), f"{server.url}/a.tar", tmp_path) == CONTENT
    assert server.count("a.tar") == num_requests


@pytest.mark.parametrize(
    ("fault", "expected", "num_requests"),
    [
        (answer(503), "the server answers 503 Service Unavailable (4 tries)", 4),
        (send_part(CONTENT[:1000], len(CONTENT)), "(4 tries)", 4),
        (be_silent(4), "no answer within 2 s (4 tries)", 4),
        (send(CONTENT[:1000]), "1000 bytes of another kind (4 tries)", 4),
        (answer(404), "no such file (1 try)", 1),
        (answer(403), "the server answers 403 Forbidden (1 try)", 1),
        (answer(401), "the server answers 401 Unauthorized (1 try)", 1),
    ],
    ids=["503", "cut", "silent", "short", "404", "403", "401"],
)
def test_what_does_not_pass_is_one_line_with_the_reason_and_the_tries(fault, expected, num_requests, server, tmp_path):
    server.faults["a.tar"] = [fault] * 10
    refuse(expected, build_remote(timeout_seconds=2), f"{server.url}/a.tar", tmp_path)
    assert server.count("a.tar") == num_requests


def test_a_redirect_that_leads_to_itself_is_told_as_that(server, tmp_path):
    server.faults["a.tar"] = [redirect("/a.tar")] * 100
    remote, url = build_remote(), f"{server.url}/a.tar"
    refuse("the server redirects it 10 times, and to no file (1 try)", remote, url, tmp_path)
    for ask in (remote.read, remote.size):
        with pytest.raises(DataError, match="redirects it 10 times"):
            ask(url)


def test_an_unavailable_server_is_not_taken_for_a_missing_file(server):
    """fsspec calls any failure of asking for a size a missing file."""
    server.faults["a.tar"] = [answer(503)] * 20
    with pytest.raises(DataError, match=r"answers 503 .*\(2 tries\)"):
        build_remote(retries=1).size(f"{server.url}/a.tar")
    with pytest.raises(DataError, match=r"no such file \(1 try\)"):
        build_remote().size(f"{server.url}/gone.tar")


def test_a_server_that_is_not_there_is_tried_again(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar"
    refuse("(4 tries)", build_remote(), url, tmp_path)


def test_waits_grow(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(concentration.data.remote, "FIRST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults["a.tar"] = [answer(503)] * 9
    refuse("(8 tries)", build_remote(retries=7), f"{server.url}/a.tar", tmp_path)
    waits = [wait for wait in waits if wait > 0.1]  # the server's own are 0
    assert len(waits) == 7
    for wait, middle in zip(waits, (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle


def test_a_full_disk_is_not_tried_again(server):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        build_remote().copy(f"{server.url}/a.tar", Path("/dev/full"), lambda path: None)
    assert server.count("a.tar") == 1


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("nothing://host/a.tar", {}, "Protocol not known: nothing"),
        ("http://127.0.0.1:1/a.tar", {"client_kwargs": 3}, "correct the URL or data.storage_options"),
        ("s3://bucket/a.tar", {"no_such_option": 3}, "data.storage_options"),
    ],
)
def test_a_file_system_that_cannot_be_made_is_a_mistake_of_the_config(url, options, expected, tmp_path):
    refuse(expected, build_remote(**options), url, tmp_path, error=ConfigError)


def test_without_s3fs_the_line_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["s3fs"] = None
from concentration.data.remote import Remote
from concentration.errors import ConfigError
try:
    Remote(0, 1, {}).read("s3://bucket/a")
except ConfigError as error:
    assert "pip install 'concentration[s3]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_forked_child_opens_connections_of_its_own(server, tmp_path):
    remote = build_remote()
    assert copy(remote, f"{server.url}/a.tar", tmp_path) == CONTENT
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(copy(remote, f"{server.url}/a.tar", tmp_path) != CONTENT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert copy(remote, f"{server.url}/a.tar", tmp_path) == CONTENT


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server with a bucket; credentials are in the environment, as they should be."""
    running = ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        options = {"endpoint_url": f"http://{host}:{port}"}
        system = fsspec.filesystem("s3", skip_instance_cache=True, **options)
        system.mkdir("bucket")
        for name in ("a.tar", "b.tar", "c.txt"):
            system.pipe_file(f"bucket/given/{name}", CONTENT)
        yield options
    running.stop()


def test_an_s3_bucket_is_listed_measured_read_and_copied(s3, tmp_path):
    remote = build_remote(**s3)
    assert remote.glob("s3://bucket/given/*.tar") == ["s3://bucket/given/a.tar", "s3://bucket/given/b.tar"]
    assert remote.size("s3://bucket/given/a.tar") == len(CONTENT)
    assert remote.read("s3://bucket/given/c.txt") == CONTENT
    assert copy(remote, "s3://bucket/given/a.tar", tmp_path) == CONTENT


def test_an_s3_file_that_is_not_there_is_one_line(s3, tmp_path):
    refuse("no such file (1 try)", build_remote(**s3), "s3://bucket/given/gone.tar", tmp_path)
    refuse("no such file (1 try)", build_remote(**s3), "s3://no-such-bucket/a.tar", tmp_path)


def test_an_s3_server_that_is_not_there_is_tried_again(tmp_path, s3):
    refuse("(2 tries)", build_remote(1, endpoint_url="http://127.0.0.1:1"), "s3://bucket/a.tar", tmp_path)


def test_s3_without_credentials_is_one_line(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refuse("credentials", build_remote(2, anon=False, **s3), "s3://bucket/given/a.tar", tmp_path)


def test_a_text_is_a_path_or_a_url(tmp_path):
    assert parse_location("data/x") == parse_location(parse_location("data/x"))
    assert not isinstance(parse_location("data/x"), str)
    assert parse_location("s3://bucket/x/") == "s3://bucket/x"
    assert join("s3://bucket/x", "a.tar") == "s3://bucket/x/a.tar"
    assert join(tmp_path, "a.tar") == tmp_path / "a.tar"
    assert name_of("s3://bucket/x/a.tar") == name_of(tmp_path / "a.tar") == "a.tar"
    with pytest.raises(ConfigError, match="name or password") as caught:
        parse_location("https://me:word@host/x")
    assert "me:word" not in str(caught.value)
    for url, expected in (
        ("https://host/x?token=3", "query"),
        ("zip://a.zip::s3://bucket/x", "several file systems"),
    ):
        with pytest.raises(ValueError, match=expected):
            parse_location(url)
