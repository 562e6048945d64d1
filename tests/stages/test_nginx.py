"""Shards behind a real nginx: its listing page, names that it escapes, and a folder that it does not list."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_runs import IMAGE_SIZE, TINY, concentrate, load_json, load_weights, one_line, prepare_shards

# Debian puts it where only root looks.
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")

CONFIG = """\
{user}
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location / {{ autoindex {autoindex}; }}
  }}
}}
"""


@contextlib.contextmanager
def run_nginx(root: Path, folder: Path, autoindex: str = "on") -> Iterator[str]:
    """The URL under which `root` is served; nginx's own files lie in `folder`."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not read what the tests wrote
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(user=user, folder=folder, root=root, port=port, autoindex=autoindex))
    process = subprocess.Popen([NGINX, "-c", str(config), "-e", str(folder / "error.log")], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def prepare(url: str, workdir: Path, *overrides: str, **options):
    return concentrate("prepare", "data=shards", f"data.path={url}", f"data.image_size={IMAGE_SIZE}", *overrides,
                       f"workdir={workdir}", "num_processes=1", directory=workdir.parent, **options)  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("local")
    prepare_shards(directory)
    return directory


def test_shards_are_found_by_the_listing_page_and_train_as_local_ones(local, tmp_path):
    workdir, train = tmp_path / "work", ("teacher", "vertical=fruit", *TINY, "trainer.window_shards=2")
    with run_nginx(local / "given", tmp_path / "nginx") as url:
        prepare(url, workdir)
        assert load_json(workdir / "shards/DONE.json") == load_json(local / "work/shards/DONE.json")
        shutil.rmtree(workdir / "cache")
        concentrate(*train, f"workdir={workdir}", directory=tmp_path)
    concentrate(*train, f"workdir={local / 'work'}", directory=tmp_path)
    here, there = load_weights(local / "work/teachers/fruit"), load_weights(workdir / "teachers/fruit")
    assert all((here[name] == there[name]).all() for name in here)


def test_names_that_the_page_shortens_or_escapes_are_found_whole(local, tmp_path):
    """nginx shows 50 characters of a name; the link holds all, with what is special in a URL escaped."""
    root = tmp_path / "root"
    shutil.copytree(local / "given", root / "a folder")
    for number, name in enumerate(("n" * 100, "with blank", "50%25", "zäh")):
        (root / "a folder" / f"train-{number:06d}.tar").rename(root / "a folder" / f"train-{name}.tar")
    with run_nginx(root, tmp_path / "nginx") as url:
        prepare(f"{url}/a%20folder", tmp_path / "work")
    facts = load_json(tmp_path / "work/shards/DONE.json")["splits"]["train"]
    assert (facts["shards"], facts["samples"]) == (4, 200)


def test_a_folder_without_a_listing_needs_braces(local, tmp_path):
    with run_nginx(local / "given", tmp_path / "nginx", autoindex="off") as url:
        message = one_line(prepare(url, tmp_path / "work", "data.cache.retries=0", code=2))
        assert message.startswith(f"{url}/train-*.tar: cannot be fetched: the server answers 403 Forbidden")
        names = ('data.train="train-{000000..000003}.tar"', "data.val=val-000000.tar", "data.test=null")
        prepare(url, tmp_path / "work", *names)
    assert load_json(tmp_path / "work/shards/DONE.json")["splits"]["train"]["shards"] == 4


def test_new_tars_are_appended(local, tmp_path):
    shutil.copytree(local / "given", tmp_path / "root")
    (tmp_path / "root/train-000002.tar").rename(tmp_path / "later")
    with run_nginx(tmp_path / "root", tmp_path / "nginx") as url:
        prepare(url, tmp_path / "work")
        (tmp_path / "later").rename(tmp_path / "root/train-000002.tar")
        assert "5 shards are indexed already; new: 1" in prepare(url, tmp_path / "work", "append=true").out
    assert load_json(tmp_path / "work/shards/DONE.json")["splits"]["train"]["samples"] == 200
