"""What is given to SLURM, without one: batches, dependencies, the job script under a made-up srun; `dry_run`."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from real_runs import IMAGE_SIZE, TINY_NETWORK, Finished, concentrate, one_line, write_shards
from slurm_words import CANCELLED, OUT_OF_TIME, REQUEUED, RUNNING

from concentration.errors import ConfigError
from concentration.pipeline.jobs import Job, Resources
from concentration.pipeline.records import JobRecord, JobRecords
from concentration.pipeline.slurm import SlurmConfig, build_batches, build_command, build_script, find_active, ids_of
from concentration.pipeline.slurm_queue import QueuedJob, load_queue, load_settled_queue
from concentration.stages.evaluate import EvaluateConfig

TEACHERS = ("teacher a", "teacher b", "teacher c")
CONFIG = SlurmConfig(cpus_per_task=2)


def build_jobs(workdir: Path) -> list[Job]:
    """prepare, three teachers and their targets, and a student."""

    def job(name: str, after=(), task=None) -> Job:
        config = EvaluateConfig(workdir=workdir, name=name.replace(" ", "-"))
        return Job(name, name.split()[0], config, workdir / name, after, "", task=task)

    teachers = [job(name, ("prepare",), number) for number, name in enumerate(TEACHERS)]
    targets = [job(t.name.replace("teacher", "targets"), (t.name,), t.task) for t in teachers]
    return [job("prepare"), *teachers, *targets, job("student x", tuple(t.name for t in targets))]


def commands(jobs: list[Job], known: dict[str, str] | None = None) -> list[str]:
    """What would be submitted of these jobs, where some are on their way with `known` ids."""
    ids = dict(known or {})
    batches = build_batches([job for job in jobs if job.name not in ids], ids)
    said = []
    for number, batch in enumerate(batches, 100):
        said.append(" ".join(build_command(batch, CONFIG, ids, batches)))
        ids |= ids_of(batch, str(number))
    return said


def option(command: str, name: str) -> str | None:
    found = re.search(rf"--{name}=(\S+)", command)
    return found and found[1]


def test_the_targets_of_a_vertical_wait_for_its_own_teacher(tmp_path):
    prepare, teachers, targets, student = commands(build_jobs(tmp_path))
    assert option(prepare, "dependency") is None
    assert (option(teachers, "array"), option(teachers, "dependency")) == ("0-2", "afterok:100")
    assert (option(targets, "array"), option(targets, "dependency")) == ("0-2", "aftercorr:101")
    assert option(student, "dependency") == "afterok:102"
    assert targets.endswith("job.sh 0=targets-a 1=targets-b 2=targets-c")


def test_what_is_done_is_not_waited_for(tmp_path):
    without_a = [job for job in build_jobs(tmp_path) if job.name not in ("prepare", "teacher b")]
    teachers, first, second, student = commands(without_a)
    assert (option(teachers, "array"), option(teachers, "dependency")) == ("0,2", None)
    assert (option(first, "array"), option(first, "dependency")) == ("0,2", "aftercorr:100")
    assert (option(second, "array"), option(second, "dependency")) == ("1", None)
    assert option(second, "job-name") == "concentrate-targets-2"
    assert option(student, "dependency") == "afterok:101:102"


def test_of_an_array_that_is_on_its_way_single_tasks_are_waited_for(tmp_path):
    """The array as a whole would never be well: the task of c has failed."""
    known = {"targets a": "7_0", "targets b": "7_1"}
    jobs = [job for job in build_jobs(tmp_path) if job.name in (*known, "targets c", "student x")]
    targets, student = commands(jobs, known)
    assert option(targets, "array") == "2"
    assert option(student, "dependency") == "afterok:100:7_0:7_1"


def test_jobs_with_other_resources_are_an_array_of_their_own(tmp_path):
    jobs = [replace(j, resources=Resources("gpu", 2, 4)) if j.name == "teacher c" else j for j in build_jobs(tmp_path)]
    _, on_cpu, on_gpu, *_ = commands(jobs)
    assert (option(on_cpu, "array"), option(on_cpu, "gpus-per-node")) == ("0-1", None)
    assert (option(on_gpu, "nodes"), option(on_gpu, "ntasks-per-node"), option(on_gpu, "gpus-per-node")) == (
        "2",
        "4",
        "4",
    )


def test_jobs_are_found_in_the_queue_or_out_of_it(tmp_path):
    jobs = build_jobs(tmp_path)
    for job in jobs:
        job.freeze()
        frozen = job.file(".json")
        frozen.write_text(frozen.read_text().replace(f'"verb": "{job.verb}"', '"verb": "evaluate"'))
    ids = {job.name: job.name.replace("targets ", "5_").replace("teacher ", "4_") for job in jobs}
    records = JobRecords(user="me", jobs={j.name: _record(j, ids[j.name]) for j in jobs})
    queue = {
        "4_a": QueuedJob("FAILED", "NonZeroExitCode"),
        "4_b": QueuedJob("RUNNING", "None"),
        "5_a": QueuedJob("PENDING", "DependencyNeverSatisfied"),
        "5_b": QueuedJob("PENDING", "Dependency"),
        "student x": QueuedJob("PENDING", "Dependency"),
    }
    due = {job.name for job in jobs} - {"prepare"}
    active, in_vain = find_active(jobs, due, records, queue)
    assert active == {"teacher b": "4_b", "targets b": "5_b"}
    assert in_vain == ["5_a", "student x"]
    other = [replace(job, config=job.config.model_copy(update={"gallery": 3})) for job in jobs]
    with pytest.raises(ConfigError, match=r"teacher b is in SLURM's queue as 4_b with another configuration"):
        find_active(other, due, records, queue)


def test_the_queue_is_read_and_refusals_are_one_line(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '12_3|PENDING|Dependency'\necho '13|RUNNING|None'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert load_queue("me") == {"12_3": QueuedJob("PENDING", "Dependency"), "13": QueuedJob("RUNNING", "None")}
    squeue.write_text("#!/bin/sh\necho 'squeue: error: no controller' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="squeue failed: no controller"):
        load_queue("me")


def test_a_job_on_its_way_out_is_waited_for_until_it_is_known_what_becomes_of_it(tmp_path, monkeypatch):
    squeue, answers = tmp_path / "squeue", tmp_path / "answers"
    answers.write_text("7|COMPLETING|None\n7|CANCELLED|None\n")
    squeue.write_text(f"#!/bin/sh\nhead -n 1 {answers}; sed -i 1d {answers}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert load_settled_queue("me", ["7", "8"]) == {"7": QueuedJob("CANCELLED", "None")}


def run_script(folder: Path, exit_code: str | None, srun_code: int, restarts: int, says: str, setup: str = ":") -> int:
    """Runs the job script as the second task of an array, under stand-ins; returns its exit code.

    Args:
        exit_code: what the job writes of its own end; None where it was killed.
        says: what `scontrol show job` does; what it is asked to requeue is noted in `said`.
    """
    (folder / "jobs").mkdir()
    (folder / "jobs/teacher-b.exit").write_text("75\n")  # of an earlier start
    writes = f'echo {exit_code} >"${{@: -1:1}}.tmp"; mv "${{@: -1:1}}.tmp" "$(dirname "${{@: -1:1}}")/teacher-b.exit"'
    for name, body in (
        ("srun", f"echo ran\n{writes if exit_code else ':'}\nexit {srun_code}"),
        ("scontrol", f'if [ $1 = requeue ]; then echo "$@" >>{folder}/said; else echo "{says}"; fi'),
        ("sleep", ":"),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    script = build_script(folder, SlurmConfig(max_restarts=2, setup=("echo set up", "export MINE=1", setup)))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9",
                   "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    command = ["bash", "-c", script, "job.sh", "0=teacher-a", "1=teacher-b"]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("exit_code", "srun_code", "restarts", "says", "expected", "is_requeued"),
    [
        pytest.param("0", 0, 0, RUNNING, 0, False, id="finished"),
        pytest.param("75", 143, 0, RUNNING, 75, True, id="preempted-and-srun-says-another-code"),
        pytest.param("75", 75, 2, RUNNING, 75, False, id="preempted-too-often"),
        pytest.param("2", 2, 0, RUNNING, 2, False, id="mistake"),
        pytest.param(None, 137, 0, RUNNING, 137, False, id="killed"),
        pytest.param(None, 143, 0, RUNNING, 75, True, id="SIGTERM-before-signals-are-noted"),
        pytest.param(None, 138, 0, RUNNING, 75, True, id="SIGUSR1-before-signals-are-noted"),
        pytest.param("75", 75, 0, CANCELLED, 143, False, id="cancelled"),
        pytest.param(None, 143, 0, CANCELLED, 143, False, id="cancelled-before-signals-are-noted"),
        pytest.param("75", 75, 0, OUT_OF_TIME, 75, True, id="out-of-time"),
        pytest.param("75", 75, 0, REQUEUED, 75, True, id="requeued-by-slurm"),
    ],
)
def test_the_job_script_requeues_what_was_saved(tmp_path, exit_code, srun_code, restarts, says, expected, is_requeued):
    assert run_script(tmp_path, exit_code, srun_code, restarts, says) == expected
    # The last task of an array has the array's number: it would requeue all the others, too.
    assert not is_requeued or (tmp_path / "said").read_text() == "requeue 9_1\n"
    assert (tmp_path / "said").exists() == is_requeued
    assert (tmp_path / "jobs/teacher-b.log").read_text().startswith("set up\nran\n")
    left = tmp_path / "jobs/teacher-b.exit"
    assert (left.read_text().strip() if left.exists() else None) == {137: None}.get(expected, str(expected))


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_while_a_job_is_set_up_has_it_requeued_before_anything_runs(tmp_path, name):
    assert run_script(tmp_path, "0", 0, 0, RUNNING, f"kill -{name} $$") == 75
    assert (tmp_path / "said").read_text() == "requeue 9_1\n"
    assert (tmp_path / "jobs/teacher-b.log").read_text() == "set up\n"


@pytest.fixture
def workdir(tmp_path) -> Path:
    write_shards(tmp_path / "given")
    return tmp_path / "work"


def dry_run(workdir: Path, *options: str, code: int = 0, **environment: str) -> Finished:
    data = ("data=shards", f"data.path={workdir.parent}/given", f"data.image_size={IMAGE_SIZE}")
    command = ("run", *data, *TINY_NETWORK, "dry_run=true", f"workdir={workdir}", *options)
    finished = concentrate(*command, directory=workdir.parent, code=code, **environment)
    assert not workdir.exists(), "a dry run writes nothing"
    return finished


def test_a_dry_run_prints_the_graph_and_the_commands_for_slurm(workdir):
    shown = dry_run(workdir, "launcher=slurm", "launcher.partition=gpu", "launcher.cpu_partition=small", "trainer=gpu",
                    "launcher.time=1-00:00:00", 'launcher.options=["--exclude=n7"]', "launcher.max_parallel=4").out  # fmt: skip
    lines = {option(line, "job-name"): line for line in shown.splitlines() if line.startswith("sbatch ")}
    assert re.search(r"targets fruit +│ due +│ teacher fruit ", shown)
    assert option(lines["concentrate-prepare"], "partition") == "small"
    assert option(lines["concentrate-student-student"], "partition") == "gpu"
    assert option(lines["concentrate-student-student"], "dependency") == "afterok:<targets>"
    assert option(lines["concentrate-teacher"], "array") == "0-1%4"
    assert all(f"#SBATCH --{line}" in shown for line in ("time=1-00:00:00", "exclude=n7", "kill-on-invalid-dep=yes"))


def test_the_commands_that_are_shown_can_be_typed_where_the_workdir_has_a_space(workdir):
    spaced = workdir.with_name("my work")
    shown = dry_run(spaced, "launcher=slurm").out
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("sbatch ")]
    assert commands
    assert all(f"{spaced}/jobs/job.sh" in words for words in commands)
    shown = one_line(dry_run(spaced, "dry_run=false", "plan=true", code=2))
    assert f"workdir='{spaced}'" in shlex.split(shown.split("`")[1])


def test_a_dry_run_of_several_leaves_nothing(workdir, tmp_path):
    (tmp_path / "$tmp").mkdir()
    dry_run(workdir, "-m", "seed=0,1", TMPDIR=str(tmp_path / "$tmp"))
    assert not list(tmp_path.glob("$tmp/concentrate-*"))


def test_a_dry_run_prints_the_commands_of_this_machine(workdir):
    shown = dry_run(workdir, "trainer.devices=2").out
    assert f"-m concentration.pipeline {workdir}/jobs/teacher-fruit.json" in shown
    assert f"--nproc-per-node=2 -m concentration.pipeline {workdir}/jobs/student-student.json" in shown


def test_wrong_values_are_one_line(workdir):
    assert "launcher.time" in one_line(dry_run(workdir, "launcher=slurm", "launcher.time=tomorrow", code=2))
    assert "plan=true with dry_run=true" in one_line(dry_run(workdir, "plan=true", code=2))
    assert "launcher=slrm: no such choice; did you mean 'slurm'?" in one_line(dry_run(workdir, "launcher=slrm", code=2))


def _record(job: Job, slurm_id: str) -> JobRecord:
    return JobRecord(
        directory=Path(job.name), file_name=job.file_name, proof=job.proof, after=job.after, slurm_id=slurm_id
    )
