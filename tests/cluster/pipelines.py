"""`concentrate run` as the tests of a cluster use it: run on this machine, given to SLURM, watched, given again, compared."""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cluster.slurm_cluster import REPOSITORY, SlurmCluster
from real_runs import HOLD, RECORD, TINY, Finished, Running, load_json

#: Networks that are trained in a second. The teachers' own keys are those of `concentrate teacher` with `TINY`.
NETWORKS = (*TINY, "data.image_size=16", "teacher.top.top1=12", "teacher.top.top2=8", "teacher.top.norm=layer",
            "teacher.trainer.max_epochs=2", "teacher.trainer.batch_size=16", "teacher.trainer.num_workers=0",
            "teacher.trainer.log_every_steps=5", "num_processes=2")  # fmt: skip
ON_SLURM = ("launcher=slurm", "launcher.cpus_per_task=1")

#: The run directories of all that is trained.
TRAINED = ("teachers/fruit", "teachers/tools", "students/generalist", "students/student")


class Pipeline:
    """One working directory, and the options of its runs.

    Args:
        shards: what `write_shards` wrote.
        environment: of the commands and of the jobs.
    """

    def __init__(self, workdir: Path, shards: Path, environment: Mapping[str, str], options: tuple[str, ...] = ()):
        self.workdir = workdir
        self._environment = dict(environment)
        self._command = ("run", "data=shards", f"data.path={shards}", f"workdir={workdir}", *NETWORKS, *options)

    def start(self, *options: str) -> Running:
        return Running((*self._command, *options), self.workdir.parent, self._environment)

    def run(self, *options: str, code: int = 0) -> Finished:
        finished = self.start(*options).wait(400)
        assert finished.code == code, f"{finished.code}:\n{finished.out}\n{finished.err}"
        assert "Traceback" not in finished.err
        return finished

    def status(self) -> dict[str, str]:
        """By stage, its state and why."""
        command = ("status", f"workdir={self.workdir}")
        shown = Running(command, self.workdir.parent, self._environment).wait().out
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
        return {row[0]: f"{row[1]} {row[5]}".strip() for row in rows}

    def ids(self) -> dict[str, str]:
        """What SLURM calls the jobs, by their names."""
        path = self.workdir / "jobs/jobs.json"
        records = load_json(path)["jobs"] if path.exists() else {}
        return {name: record["slurm_id"] for name, record in records.items() if record["slurm_id"]}

    def step(self, run: str) -> int:
        """The last step of "students/student" that its status tells of; -1 before the first."""
        path = self.workdir / run / "status.json"
        return load_json(path)["done"] if path.exists() else -1

    def is_finished(self) -> bool:
        return (self.workdir / "report/index.html").exists()

    def log(self) -> str:
        """Of all jobs, their ends."""
        logs = sorted((self.workdir / "jobs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-8:]) for path in logs)


def submitted(finished: Finished) -> dict[str, str]:
    """SLURM's number of every batch that was submitted, by the jobs in it."""
    rows = [[cell.strip() for cell in line.split("│")] for line in finished.out.splitlines() if line.startswith("│")]
    return {row[2]: row[1] for row in rows if row[1].isdigit()}


def copy_stages(source: Path, target: Path, *stages: str) -> Path:
    """A working directory with these stages of another, finished ones: "shards", "students/generalist"."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
        if (result := source / f"{stage}.json").exists():
            shutil.copy2(result, target / f"{stage}.json")
    return target


def wait_for_queue(slurm: SlurmCluster, timeout_seconds: float = 300) -> None:
    """Waits until no job is left in the queue; those that were requeued start again soon."""

    def is_empty() -> bool:
        numbers = slurm.run("squeue", "--noheader", "--array", "--format=%i").split()
        for number in numbers:
            slurm.start_soon(number)
        return not numbers

    slurm.wait_until(is_empty, "an empty queue", timeout_seconds)


def recording(folder: Path, hold: str = "") -> dict[str, str]:
    """What has training record its samples in `folder`, and wait where `hold` says, on SLURM as here."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests / "cluster/recording", tests, REPOSITORY)))
    return {"PYTHONPATH": path, RECORD: str(folder), HOLD: hold}


def terminating_at_first(folder: Path) -> dict[str, str]:
    """What has every process of a job's first start get SIGTERM before its first line; later ones record as `recording` says."""
    folder.mkdir()
    path = recording(folder)["PYTHONPATH"]
    (folder / "sitecustomize.py").write_text(
        "import os, runpy, signal\n"
        "if 'SLURM_PROCID' in os.environ and os.environ.get('SLURM_RESTART_COUNT', '0') == '0':\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"runpy.run_path({str(Path(__file__).with_name('recording') / 'sitecustomize.py')!r})\n"
    )
    return {"PYTHONPATH": os.pathsep.join((str(folder), path))}


def assert_same_results(workdir: Path, expected: Path) -> None:
    """The same networks and targets, byte for byte, and the same evaluations."""
    paths = [Path(run) / "model.safetensors" for run in TRAINED]
    paths += [path.relative_to(expected) for path in expected.glob("targets/*/*/*.safetensors")]
    for path in paths:
        assert (workdir / path).read_bytes() == (expected / path).read_bytes(), path
    for name in ("student", "generalist", "specialists"):
        found, wanted = (load_json(root / f"evaluations/{name}.json") for root in (workdir, expected))
        assert found["mpvap"] == wanted["mpvap"], name


def assert_each_sample_once(
    taken: Mapping[int, list[list[int]]], expected: Mapping[int, list[list[int]]], num_epochs: int, may_repeat: bool
) -> None:
    """Every step took the undisturbed run's samples, each of which comes once an epoch.

    Args:
        taken, expected: by step, what each process took; of a disturbed run and of an undisturbed one.
        may_repeat: steps after a checkpoint, where a process was killed; else every step was taken once.
    """
    wanted = {step: sorted(itertools.chain(*takes)) for step, takes in expected.items()}
    steps = sorted(wanted)
    assert steps == list(range(len(steps)))
    steps_per_epoch = len(steps) // num_epochs
    samples = sorted(itertools.chain(*(wanted[step] for step in steps[:steps_per_epoch])))
    assert len(samples) > 100
    assert len(set(samples)) == len(samples)
    for start in range(0, len(steps), steps_per_epoch):
        epoch = itertools.chain(*(wanted[step] for step in steps[start : start + steps_per_epoch]))
        assert sorted(epoch) == samples, "an epoch of the undisturbed run"
    found = {step: sorted(itertools.chain(*takes)) for step, takes in taken.items()}
    assert found.keys() == wanted.keys()
    for step in steps:
        assert (sorted(set(found[step])) if may_repeat else found[step]) == wanted[step], f"step {step}"
