"""Shared by all tests: a small taxonomy, and functions that draw images and write WebDataset shards by hand.

The fixtures give functions where a test needs several of a thing, or of its own choosing.
"""

import io
import itertools
import multiprocessing.forkserver
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# The CPU is shared: before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU, Triton's interpreter runs the kernels; it is chosen when triton is first imported, which Lightning does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from labelled_shards import encode_labels

from concentration.data.index import index_shard
from concentration.data.split import Split, load_split
from concentration.taxonomy import Taxonomy

# The same examples in every run, however busy the machine is.
hypothesis.settings.register_profile(
    "concentration", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("concentration")

#: (id, parents, vertical): interleaved, so that positions in the file and outputs differ; `osprey` has two parents, and
#: `egg` a parent in another vertical.
CLASSES = (
    ("bird", (), "birds"),
    ("car", (), "cars"),
    ("seabird", ("bird",), "birds"),
    ("osprey", ("raptor", "seabird"), "birds"),
    ("soup", (), "dishes"),
    ("raptor", ("bird",), "birds"),
    ("taxi", ("car",), "cars"),
    ("egg", ("soup", "bird"), "dishes"),
    ("gull", ("seabird",), "birds"),
    ("ramen", ("soup",), "dishes"),
    ("tram", ("car",), "cars"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """With `-n`, one process runs all tests of a file, or of tests/cluster: what these share is made once.

    NOTE: `--dist loadgroup` of pytest-xdist 3.8 groups nothing under pytest 9.2, which does not let it rename tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "tests/cluster" if "tests/cluster/" in path else path

    return ByFile(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the server that processes are forked from, where tests start some.

    NOTE: a process has one, with what it was first started with. One that a test's own `prepare` started would lack Lightning,
    and every training of the whole session would import that for seconds.
    """
    if "real_runs" in sys.modules:
        multiprocessing.forkserver.ensure_running()


class Sample(NamedTuple):
    """What was written into a shard."""

    key: str
    labels: tuple[str, ...]
    extension: str
    image: bytes


@pytest.fixture(scope="session")
def taxonomy() -> Taxonomy:
    """11 classes in 3 verticals: birds, a graph with two parents; cars; dishes."""
    classes = [{"id": i, "name": i.title(), "parents": list(p), "vertical": v} for i, p, v in CLASSES]
    return Taxonomy.from_json({"classes": classes})


@pytest.fixture(scope="session")
def encode_image() -> Callable[..., bytes]:
    """(format, size=(width, height), seed, mode, options of Pillow's `save`): an encoded image of smooth noise."""

    def encode(extension="png", size=(16, 16), seed=0, mode="RGB", **options) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "jpeg" if extension == "jpg" else extension, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """(path, [(name, content), ...], format of tarfile): a tar with these members; a TarInfo may stand for a name."""

    def write(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], format=tarfile.PAX_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in members:
                member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def write_shard(write_tar, encode_image) -> Callable[..., list[Sample]]:
    """(path, labels of each sample): a WebDataset tar of PNG, JPEG and WebP images with .json labels."""

    def write(path: Path, labels: Sequence[Sequence[str]], size=(20, 16)) -> list[Sample]:
        samples = []
        for number, (ids, extension) in enumerate(zip(labels, itertools.cycle(("png", "jpg", "webp")), strict=False)):
            key = f"{path.stem}-{number}"
            seed = sum(key.encode()) * 1000 + number
            samples.append(Sample(key, tuple(ids), extension, encode_image(extension, size, seed)))
        write_tar(path, [member for sample in samples for member in list_members(sample)])
        return samples

    return write


@pytest.fixture(scope="session")
def make_split(taxonomy, write_shard) -> Callable[..., Split]:
    """(folder, labels of each sample of each shard, name): an indexed split of shards in this folder."""

    def make(folder: Path, labels: Sequence[Sequence[Sequence[str]]], name="train", size=(20, 16)) -> Split:
        for number, labels_of_shard in enumerate(labels):
            shard = folder / f"{name}-{number:06d}.tar"
            write_shard(shard, labels_of_shard, size)
            index_shard(shard, taxonomy, shard.name).save(shard.with_suffix(".index"))
        return load_split(folder, name, taxonomy)

    return make


def list_members(sample: Sample) -> list[tuple[str, bytes]]:
    return [
        (f"{sample.key}.{sample.extension}", sample.image),
        (f"{sample.key}.json", encode_labels(*sample.labels)),
    ]
