"""Runs of the real command line in processes of their own, and a data set that is written in a tenth of a second.

The processes are forked from a server that has imported torch already, so one starts in milliseconds and can be killed.
"""

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")

IMAGE_SIZE = 16
SKY = ("moon", "star", "comet")
#: A network that one thread trains at some 100 steps a second, without batch statistics.
TINY_NETWORK = ("base.channels=[4,8]", "base.norm=group", "top.top1=12", "top.top2=8", "top.norm=layer")
#: 13 steps an epoch over the 200 images of `write_shards`.
TINY_TRAINER = ("trainer.num_workers=0", "trainer.batch_size=16", "trainer.max_epochs=2", "trainer.log_every_steps=5")
TINY = (*TINY_NETWORK, *TINY_TRAINER)

#: Environment variables: a folder to which every training process writes the samples of its steps; and a step of a run,
#: "students-student:10", before which each of its ranks waits there, the first time, until a signal or a file `go` comes.
RECORD, HOLD = "RECORD_SAMPLES_OF_STEPS", "HOLD_BEFORE_STEP"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["concentration.pipeline.graph", "concentration.training.fit", "concentration.cli", "hydra._internal.hydra"]
)


@dataclass(frozen=True)
class Plant:
    """Sends the process a signal at the n-th call of a function: `module:Class.method` or `module:function`."""

    where: str
    call: int = 1
    when: str = "before"
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Finished:
    """A process that has ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


class Running:
    """A process that runs `concentrate ARGUMENTS`."""

    def __init__(
        self,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str | None] | None = None,
        plant: Plant | None = None,
    ):
        number = next(_NUMBERS)
        self._arguments = arguments
        self._out, self._err = (directory / f".{number}.{name}" for name in ("out", "err"))
        for path in (self._out, self._err):  # a process that is killed at once has written none
            path.touch()
        self.process = _CONTEXT.Process(
            target=_enter,
            args=(list(arguments), str(self._out), str(self._err), str(directory), dict(environment or {}), plant),
        )
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout_seconds: float = 300) -> Finished:
        self.process.join(timeout_seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"{self._arguments} ran longer than {timeout_seconds} s:\n{self._err.read_text()}")
        return Finished(self.process.exitcode, self._out.read_text(), self._err.read_text())

    def wait_for(self, condition, timeout_seconds: float = 60) -> None:
        """Waits until `condition()` holds or the process has ended."""
        deadline = time.monotonic() + timeout_seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline, f"{self._arguments}: nothing happened in {timeout_seconds} s"
            time.sleep(0.005)


_NUMBERS = itertools.count()


def concentrate(*arguments: str | Path, directory: Path, code: int = 0, plant: Plant | None = None, **environment):
    """Runs `concentrate ARGUMENTS` in `directory` and expects the exit code."""
    finished = Running([str(a) for a in arguments], directory, environment, plant).wait()
    assert finished.code == code, f"exit code {finished.code} of {arguments}:\n{finished.out}\n{finished.err}"
    return finished


def concentrate_here(verb: str, *overrides: str | Path) -> str:
    """Runs `concentrate VERB OVERRIDES` in this process, which saves the imports of another; its errors are raised.

    Returns: what it printed.
    """
    import hydra

    from concentration.config import VERBS, check_config, find_config_directory

    printed = io.StringIO()
    with (
        hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        config = check_config(verb, hydra.compose(verb, [str(override) for override in overrides]))
        VERBS[verb].load()[0](config)
    return printed.getvalue()


def run_command(*command: str | Path, directory: Path, code: int = 0, **environment: str | None) -> Finished:
    """Runs a command that a user would type, from the start of its interpreter: seconds slower than `concentrate`."""
    values = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(
        [str(c) for c in command], cwd=directory, env=values, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == code, f"exit code {done.returncode} of {command}:\n{done.stdout}\n{done.stderr}"
    return Finished(done.returncode, done.stdout, done.stderr)


def one_line(finished: Finished) -> str:
    """The one line that a user's mistake is answered with."""
    assert "Traceback" not in finished.err, finished.err
    lines = [line for line in finished.err.splitlines() if line.strip()]
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("concentrate: "), finished.err
    return lines[0].removeprefix("concentrate: ")


def load_weights(run_path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run_path / "model.safetensors")


def load_lines(run_path: Path) -> list[dict]:
    return [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def taxonomy_of_fruit_and_tools() -> dict:
    """Two verticals, interleaved in the file: fruit with two levels and a class with two parents, tools flat."""
    classes = [
        ("fruit", [], "fruit"),
        ("hammer", [], "tools"),
        ("citrus", ["fruit"], "fruit"),
        ("berry", ["fruit"], "fruit"),
        ("saw", [], "tools"),
        ("lemon", ["citrus"], "fruit"),
        ("yuzu", ["citrus", "berry"], "fruit"),
        ("cherry", ["berry"], "fruit"),
        ("drill", [], "tools"),
        ("file", ["citrus"], "tools"),  # a parent in another vertical: no part of smearing
    ]
    return {"classes": [{"id": i, "name": i.title(), "parents": p, "vertical": v} for i, p, v in classes]}


LEAVES = ("lemon", "yuzu", "cherry", "hammer", "saw", "drill", "file")


def read_labels(folder: Path, split: str) -> list[list[str]]:
    """The labels of every sample of a split, in the order of the shards."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m))["labels"] for m in tar.getmembers() if m.name.endswith(".json")]
    return found


def smear_by_walking(labels: Sequence[str], taxonomy: dict) -> set[str]:
    """The labels and their ancestors inside their verticals, by asking each class for its parents."""
    classes = {c["id"]: c for c in taxonomy["classes"]}
    found = set()
    for label in labels:
        waiting = [label]
        while waiting:
            here = waiting.pop()
            if classes[here]["vertical"] == classes[label]["vertical"]:
                found.add(here)
                waiting += classes[here]["parents"]
    return found


def draw_image(label: str, number: int, extension: str = "png") -> bytes:
    """A pattern of the class's own under noise that `number` fixes."""
    pattern = np.random.default_rng(sum(label.encode())).integers(0, 256, (4, 4, 3))
    noise = np.random.default_rng([sum(label.encode()), number]).normal(0, 60, (IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = (pattern.repeat(4, 0).repeat(4, 1) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, extension)
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, Sequence[str], bytes]]) -> None:
    """A WebDataset shard of (key, labels, encoded image)."""
    with tarfile.open(path, "w") as tar:
        for key, labels, image in samples:
            for extension, content in (("png", image), ("json", json.dumps({"labels": list(labels)}).encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_shards(
    folder: Path, num_train: int = 200, damaged: Sequence[int] = (), damaged_test: Sequence[int] = ()
) -> Path:
    """Shards of fruit and tools: train in 4, val and test in 1 each; `damaged` training images cannot be decoded.

    Every tenth image is labelled with an inner class, every seventh with a class of the other vertical, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "taxonomy.json").write_text(json.dumps(taxonomy_of_fruit_and_tools()))
    start = 0
    for split, count, num_shards in (("train", num_train, 4), ("val", 40, 1), ("test", 60, 1)):
        samples = []
        for number in range(count):
            label = LEAVES[number % len(LEAVES)]
            labels = ["berry" if number % 10 == 9 else label]
            if number % 7 == 6:
                labels = [label, "cherry" if label in ("hammer", "saw", "drill", "file") else "saw"]
            is_damaged = number in {"train": damaged, "val": (), "test": damaged_test}[split]
            samples.append(
                (f"{split}{number}", labels, b"no image" if is_damaged else draw_image(label, start + number))
            )
        start += count
        for shard in range(num_shards):
            write_tar(folder / f"{split}-{shard:06d}.tar", samples[shard::num_shards])
    return folder


def prepare_shards_here(directory: Path, **options) -> Path:
    """As `prepare_shards`, in this process."""
    shards, workdir = write_shards(directory / "given", **options), directory / "work"
    concentrate_here("prepare", "data=shards", f"data.path={shards}", f"data.image_size={IMAGE_SIZE}",
                     f"workdir={workdir}", "num_processes=1")  # fmt: skip
    return workdir


def prepare_shards(directory: Path, **options) -> Path:
    """A working directory in `directory` whose shards are prepared."""
    shards = write_shards(directory / "given", **options)
    workdir = directory / "work"
    concentrate("prepare", "data=shards", f"data.path={shards}", f"data.image_size={IMAGE_SIZE}", f"workdir={workdir}",
                "num_processes=1", directory=directory)  # fmt: skip
    return workdir


def append_sky(directory: Path) -> None:
    """Tars of a new vertical, some of whose images are labelled with an old class, too; and their classes behind the others."""
    given = directory / "given"
    taxonomy = taxonomy_of_fruit_and_tools()
    taxonomy["classes"] += [{"id": c, "vertical": "sky"} for c in SKY]
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))
    for split, count, number in (("train", 48, 4), ("val", 18, 1), ("test", 18, 1)):
        labels = [[SKY[n % 3], "saw"] if n % 8 == 7 else [SKY[n % 3]] for n in range(count)]
        samples = [(f"sky-{split}{n}", of, draw_image(of[0], 3000 + n)) for n, of in enumerate(labels)]
        write_tar(given / f"{split}-{number:06d}.tar", samples)
    concentrate_here("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={directory / 'work'}",
                "num_processes=1", "append=true")  # fmt: skip


def record_samples() -> None:
    """From now on this process writes what `load_taken` reads, and waits where it is told to."""
    from concentration.training.module import StudentModule

    original, started, folder = StudentModule.training_step, time.time_ns(), Path(os.environ[RECORD])

    def training_step(self, batch, batch_idx):
        run_path = Path(self.trainer.default_root_dir)
        run = f"{run_path.parent.name}-{run_path.name}"
        _hold(folder / f"held-{run}-{self.global_rank}", f"{run}:{self.global_step}")
        taken = batch.ordinal_B[batch.weight_B > 0].tolist()
        with open(folder / f"{run}-{started}-{os.getpid()}", "a") as file:
            file.write(json.dumps([self.global_step, taken]) + "\n")
        return original(self, batch, batch_idx)

    folder.mkdir(parents=True, exist_ok=True)
    StudentModule.training_step = training_step


def _hold(mark: Path, step: str) -> None:
    from concentration.preemption import noted_signal

    if step != os.environ.get(HOLD) or mark.exists():
        return
    mark.touch()
    while not noted_signal() and not mark.with_name("go").exists():
        time.sleep(0.05)


def wait_for_hold(folder: Path, run: str, num_ranks: int = 1, timeout_seconds: float = 300) -> None:
    """Waits until all ranks of a run wait before the step that `HOLD` names."""
    deadline = time.monotonic() + timeout_seconds
    while len(list(folder.glob(f"held-{run}-*"))) < num_ranks:
        assert time.monotonic() < deadline, f"{run} did not come to its step in {timeout_seconds} s"
        time.sleep(0.05)


def load_taken(folder: Path, run: str) -> dict[int, list[list[int]]]:
    """By step, the samples that each process of a run ("students-student", all of its starts) took."""
    taken: dict[int, list[list[int]]] = {}
    for path in sorted(folder.glob(f"{run}-*")):
        for line in path.read_text().splitlines():
            if line.endswith("]"):  # the last may be cut by a kill
                step, ordinals = json.loads(line)
                taken.setdefault(step, []).append(ordinals)
    return taken


def _enter(
    arguments: list[str], out: str, err: str, directory: str, environment: dict[str, str | None], plant: Plant | None
) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(directory)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if plant is not None:
        _dig_in(plant)
    if environment.get(RECORD):
        record_samples()
    from concentration.cli import main
    from concentration.pipeline import local

    # NOTE: `concentrate run` would start a server of its own, which imports for seconds what this process has imported.
    local.multiprocessing = types.SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))

    main(arguments)


def start_ranks(
    arguments: Sequence[str],
    directory: Path,
    world_size: int,
    environment_of_rank: Sequence[Mapping[str, str]],
    plant: Plant | None = None,
) -> list[Running]:
    """The processes that torchrun would start on one machine; the plant is rank 0's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}  # fmt: skip
    return [
        Running(
            arguments,
            directory,
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment_of_rank[rank]},
            plant if rank == 0 else None,
        )
        for rank in range(world_size)
    ]


def _dig_in(plant: Plant) -> None:
    module, _, dotted = plant.where.partition(":")
    *outer, name = dotted.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        is_due = next(calls) == plant.call
        if is_due and plant.when == "before":
            os.kill(os.getpid(), plant.signal)
        result = original(*args, **kwargs)
        if is_due and plant.when == "after":
            os.kill(os.getpid(), plant.signal)
        return result

    setattr(owner, name, call)
