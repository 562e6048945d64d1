"""Whole pipelines on a real SLURM, two at a time, disturbed at random until enough has happened; then compared with others.

python tests/cluster/random_faults.py --faults 50 --seed 0     # docs/faults.md, in half an hour to an hour on two cores
"""

import argparse
import datetime
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.faults import FAULTS, Fault, Victim
from cluster.pipelines import ON_SLURM, TRAINED, Pipeline, assert_each_sample_once, assert_same_results, recording
from cluster.slurm_cluster import ENDED, REPOSITORY, SlurmCluster, running_cluster
from real_runs import load_taken, write_shards

NUM_EPOCHS = 12
OPTIONS = (f"trainer.max_epochs={NUM_EPOCHS}", f"teacher.trainer.max_epochs={NUM_EPOCHS}", "trainer.checkpoint_every_seconds=0",
           "teacher.trainer.checkpoint_every_seconds=0", "trainer.timeout_seconds=30")  # fmt: skip
#: Seconds that a job is left alone after its first step, or its start, before something happens to it.
LEFT_ALONE_TRAINING, LEFT_ALONE_STARTING = (0.2, 3.0), (0.5, 20.0)
#: Faults of one job of a pipeline, where it trains a network and where not: so that it gets to its end.
MOST_OF_TRAINING, MOST_OF_OTHERS = 6, 2
#: Pipelines at a time.
NUM_PIPELINES = 2
#: After so long without a consequence, a job is said to have gone on.
WITHOUT_CONSEQUENCE_SECONDS = 60


@dataclass
class Injected:
    """A row of the table. `restarts`: of the job, before; `step`: that it had come to, None where nothing is trained."""

    pipeline: "DisturbedPipeline"
    job: str
    number: str
    fault: Fault
    restarts: str
    step: int | None
    nanoseconds: int
    outcome: str = ""


class DisturbedPipeline:
    """A pipeline on SLURM, and its undisturbed twin on this machine. With an even number, students have two nodes."""

    def __init__(self, slurm: SlurmCluster, shards: Path, folder: Path, number: int, rng: random.Random):
        folder.mkdir()
        self.number, self._slurm, self._rng = number, slurm, rng
        self.num_ranks = 1 + (number % 2 == 0)
        self.records, self.expected_records = folder / "records", folder / "expected-records"
        options = (*OPTIONS, f"seed={number}")
        self.expected = folder / "expected"
        twin = Pipeline(self.expected, shards, recording(self.expected_records), options)
        self._twin = twin.start(f"trainer.devices={self.num_ranks}")
        environment = {**slurm.environment, "MASTER_ADDR": "127.0.0.1", **recording(self.records)}
        self.pipeline = Pipeline(
            folder / "work", shards, environment, (*options, f"trainer.num_nodes={self.num_ranks}")
        )
        self.num_submissions = 0
        self._left = defaultdict(lambda: MOST_OF_OTHERS) | {job_of(run): MOST_OF_TRAINING for run in TRAINED}
        self._due: dict[tuple[str, str], float] = {}
        self._waiting: dict[tuple[str, str], int] = {}

    def submit(self) -> None:
        self.pipeline.run(*ON_SLURM)
        self.num_submissions += 1
        assert self.num_submissions < 100, self.pipeline.log()

    def find_victim(self, running: set[str]) -> tuple[str, str] | None:
        """A job whose time has come, with its number. Of every start, a third are disturbed before the first step."""
        for name, number in self.pipeline.ids().items():
            if number not in running:
                continue
            start = (number, self._slurm.describe(number)["Restarts"])
            if start not in self._waiting:
                self._waiting[start] = time.time_ns()
                if run_of(name) is None or self._rng.random() < 1 / 3:
                    self._due[start] = time.monotonic() + self._rng.uniform(*LEFT_ALONE_STARTING)
            if start not in self._due and self.starts(name, since=self._waiting[start]):
                self._due[start] = time.monotonic() + self._rng.uniform(*LEFT_ALONE_TRAINING)
            if self._due.get(start, float("inf")) <= time.monotonic() and self._left[name] > 0:
                self._due[start] = float("inf")
                self._left[name] -= 1
                return name, number
        return None

    def starts(self, name: str, since: int = 0) -> list[tuple[int, int, int]]:
        """Of every process that has trained a job's network: when it started, its first and its last step; in order."""
        run, found = run_of(name), []
        for path in self.records.glob(f"{run}-*") if run else ():
            steps = [int(line[1:].partition(",")[0]) for line in path.read_text().splitlines() if line.endswith("]")]
            started = int(path.name.split("-")[-2])
            if steps and started > since:
                found.append((started, steps[0], steps[-1]))
        return sorted(found)

    def check(self) -> None:
        finished = self._twin.wait(1200)
        assert finished.code == 0, finished.err
        assert_same_results(self.pipeline.workdir, self.expected)
        for run in (each.replace("/", "-") for each in TRAINED):
            taken, wanted = (load_taken(folder, run) for folder in (self.records, self.expected_records))
            assert_each_sample_once(taken, wanted, NUM_EPOCHS, may_repeat=True)


def run_of(job: str) -> str | None:
    """`students-student` of "student student"; None of what trains nothing."""
    verb, _, name = job.partition(" ")
    return f"{verb}s-{name}" if verb in ("teacher", "student") else None


def job_of(run: str) -> str:
    """ "student student" of `students/student`."""
    return run.replace("s/", " ", 1)


def disturb(slurm: SlurmCluster, shards: Path, folder: Path, num_faults: int, seed: int) -> list[Injected]:
    """Runs pipelines, until so many faults were injected and all have finished as their twins."""
    rng, rows, numbers = random.Random(seed), [], itertools.count()
    while len(rows) < num_faults:
        some = [
            DisturbedPipeline(slurm, shards, folder / str(number), number, rng)
            for number in itertools.islice(numbers, NUM_PIPELINES)
        ]
        while going_on := [one for one in some if not one.pipeline.is_finished()]:
            queued = slurm.run("squeue", "--noheader", "--array", "--format=%i|%T").split()
            states = dict(line.split("|") for line in queued)
            for number in (each for each, state in states.items() if state == "PENDING"):
                slurm.start_soon(number)
            note_outcomes(slurm, rows)
            running = {each for each, state in states.items() if state == "RUNNING"}
            for one in going_on:
                if states.keys().isdisjoint(one.pipeline.ids().values()):
                    one.submit()
                elif len(rows) < num_faults and (victim := one.find_victim(running)):
                    rows.append(inject(slurm, one, *victim, rng))
                    break  # what runs now is to be asked again
            time.sleep(0.3)
        note_outcomes(slurm, rows)
        for one in some:
            one.check()
            print(f"pipeline {one.number}: as its twin, {len(rows)} faults so far", flush=True)
    return rows


def inject(slurm: SlurmCluster, disturbed: DisturbedPipeline, name: str, number: str, rng: random.Random) -> Injected:
    has_ranks = name.startswith("student") and disturbed.num_ranks > 1
    fault = rng.choice([fault for fault in FAULTS if has_ranks or not fault.needs_ranks])
    run, starts = run_of(name), disturbed.starts(name)
    step = None if run is None else starts[-1][2] + 1 if starts else 0
    row = Injected(disturbed, name, number, fault, slurm.describe(number)["Restarts"], step, time.time_ns())
    directory = disturbed.pipeline.workdir / (run or "").replace("-", "/", 1)
    try:
        fault.inject(Victim(slurm, number, directory, rng))
    except AssertionError as error:
        row.outcome = "had ended before" if slurm.state(number) in ENDED else ""
        print(error, file=sys.stderr)
    print(f"{disturbed.number}, {name} at step {step}: {fault.name}", flush=True)
    return row


def note_outcomes(slurm: SlurmCluster, rows: list[Injected]) -> None:
    """What has become of the jobs: where they were started again, or have ended, or nothing has come of it."""
    for row in (row for row in rows if not row.outcome):
        described = slurm.describe(row.number)
        if described["Restarts"] != row.restarts:
            row.outcome = "requeued"
        elif described["JobState"] in ENDED:
            has_finished = described["JobState"] == "COMPLETED"
            row.outcome = (
                "went on and finished" if has_finished else f"{described['JobState'].lower()}, submitted again"
            )
        elif time.time_ns() - row.nanoseconds > WITHOUT_CONSEQUENCE_SECONDS * 1e9:
            row.outcome = "went on"


def count_repeated(row: Injected) -> int | None:
    """Steps that were taken again after it; None where the process went on, or nothing was trained."""
    starts = row.pipeline.starts(row.job)
    earlier = [last for started, _, last in starts if started < row.nanoseconds]
    later = [first for started, first, _ in starts if started >= row.nanoseconds]
    if row.step is None or not later or "went on" in row.outcome:
        return None
    return max(earlier) + 1 - later[0] if earlier else 0


def describe(rows: list[Injected], seed: int, minutes: float) -> str:
    """The page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    pipelines = list(dict.fromkeys(row.pipeline for row in rows))
    outcomes = Counter(row.outcome.partition(",")[0] for row in rows)
    repeated = [count_repeated(row) for row in rows]
    given = ", ".join(f"{one.num_submissions} times for pipeline {one.number}" for one in pipelines)
    lines = [
        "# Faults",
        "",
        f"{len(rows)} faults, drawn with seed {seed}, were done to the running jobs of {len(pipelines)} pipelines of",
        "`concentrate run launcher=slurm`, two at a time, on a real SLURM of two nodes (on one machine). Each pipeline",
        "ended as its undisturbed twin on this machine: the four networks and all stored targets are the same byte for byte,",
        "the evaluations say the same, and every step of every training took the same samples, each sample once an epoch.",
        "",
        f"`python tests/cluster/random_faults.py --faults {len(rows)} --seed {seed}` at {commit},",
        f"{datetime.date.today():%d %B %Y}, {minutes:.0f} minutes on two cores of an AMD EPYC that others were using.",
        "Pipelines of even number train students on two nodes. A third of all starts are disturbed before the first step.",
        "The command was given again whenever no job",
        f"was left in the queue: {given}.",
        "",
        f"What became of the jobs: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.most_common())}.",
        f"Steps that were taken again, since no checkpoint had them: {sum(filter(None, repeated))} in all (a checkpoint is",
        "written after every step, of two ranks after every 20th and after a validation).",
        "",
        "| | pipeline, job | at step | what was done to it | what became of it | steps again |",
        "|---|---|---|---|---|---|",
    ]
    for number, (row, again) in enumerate(zip(rows, repeated, strict=True), 1):
        step = "-" if row.step is None else row.step
        lines.append(
            f"| {number} | {row.pipeline.number}, {row.job} | {step} | {row.fault.name} | {row.outcome} "
            f"| {'-' if again is None else again} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs/faults.md")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, running_cluster(Path(folder, "slurm")) as slurm:
        rows = disturb(slurm, write_shards(Path(folder, "given")), Path(folder), options.faults, options.seed)
        _, mark, kept = options.page.read_text().partition("\n## ") if options.page.exists() else ("", "", "")
        page = describe(rows, options.seed, (time.monotonic() - started) / 60)
        options.page.write_text(page + mark + kept)  # what is written by hand stays


if __name__ == "__main__":
    main()
