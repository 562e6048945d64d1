"""Submits the jobs of a graph to SLURM: as arrays where there are many of a kind, each task after those that it needs.

SLURM is told what a job must wait for when the job is submitted; after that, nothing of ours has to keep running.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from concentration import preemption
from concentration.errors import ConfigError, Preempted
from concentration.files import write_atomically
from concentration.pipeline.failures import describe_failures
from concentration.pipeline.jobs import CANCELLED, FROZEN, JOBS, Job, Resources, load_frozen
from concentration.pipeline.records import JobRecords, load_records, record_jobs
from concentration.pipeline.slurm_queue import QueuedJob, cancel_jobs, load_queue, load_settled_queue, submit_script
from concentration.pipeline.states import find_states
from concentration.schema import Config, write_override
from concentration.stages.run_directory import RunDirectory

#: The batch script, in `jobs/`.
SCRIPT_FILE = "job.sh"
#: The suffix of the files into which SLURM itself writes about a job.
SLURM_LOG = ".slurm"

#: Time between two looks at the queue.
POLL_SECONDS = 3.0

#: How long a run waits for another one that is submitting jobs of the same folder.
_SUBMIT_SECONDS = 300.0

TimeLimit = Annotated[str, pydantic.StringConstraints(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")]


class SlurmConfig(Config):
    """The command submits the jobs and returns; given again, it submits what is missing.

    partition, account, qos: as sbatch takes them; None leaves them to the cluster.
    cpu_partition: the partition of jobs without a GPU; None takes `partition`.
    time: a job's time limit. A job that reaches it saves before, is queued again, and continues.
    cpus_per_task: CPUs of each process.
    memory: memory of each node, such as "64G".
    max_parallel: how many tasks of an array run at a time.
    max_restarts: how often a job may be preempted or reach its time limit.
    signal_seconds: how long before the time limit a job begins to save.
    setup: lines of bash before each job.
    options: further options of sbatch, for all jobs.
    wait: wait until the last job has ended.
    """

    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    cpu_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: TimeLimit | None = None
    cpus_per_task: pydantic.PositiveInt = 4
    memory: str | None = None
    max_parallel: pydantic.PositiveInt | None = None
    max_restarts: pydantic.NonNegativeInt = 20
    signal_seconds: pydantic.PositiveInt = 120
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    wait: bool = False


@dataclass(frozen=True)
class Batch:
    """What one `sbatch` submits: one job, or those of an array.

    Attributes:
        name: its name in SLURM's queue is "concentrate-" and this.
        jobs: they have one verb and the same resources.
    """

    name: str
    jobs: tuple[Job, ...]

    @property
    def is_array(self) -> bool:
        return self.jobs[0].task is not None


class SlurmLauncher:
    """Submits graphs of jobs."""

    def __init__(self, config: SlurmConfig, workdir: Path):
        self._config = config
        self._workdir = workdir

    def submit(self, jobs: Sequence[Job], due: Set[str]) -> dict[Batch, str]:
        """Submits the jobs that are due and not yet queued or running; returns the batches with their ids.

        Raises:
            ConfigError: SLURM is not installed here or refuses a job; or a job is queued or running with another config.
        """
        folder = RunDirectory(self._workdir / JOBS)
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.lock(".lock", _SUBMIT_SECONDS):  # each run sees what the other has submitted
            return self._submit(jobs, due)

    def _submit(self, jobs: Sequence[Job], due: Set[str]) -> dict[Batch, str]:
        records = load_records(self._workdir)
        submitted_before = [record.slurm_id for record in records.jobs.values() if record.slurm_id]
        queue = load_settled_queue(records.user, submitted_before)
        active, in_vain = find_active(jobs, due, records, queue)
        if in_vain:
            cancel_jobs(in_vain)
        ids = {name: (slurm_id, records.jobs[name].submitted) for name, slurm_id in active.items()}
        record_jobs(self._workdir, jobs, ids)
        batches = build_batches([job for job in jobs if job.name in due - active.keys()], active)
        submitted = {}
        write_atomically(self._workdir / JOBS / SCRIPT_FILE, build_script(self._workdir, self._config))
        for batch in batches:
            for job in batch.jobs:
                job.freeze()
            known = {name: slurm_id for name, (slurm_id, _) in ids.items()}
            submitted[batch] = submit_script(build_command(batch, self._config, known, batches))
            ids |= {name: (slurm_id, time.time()) for name, slurm_id in ids_of(batch, submitted[batch]).items()}
            record_jobs(self._workdir, jobs, ids)
        return submitted

    def wait(self, jobs: Sequence[Job]) -> None:
        """Waits until all jobs have finished, and prints what changes in the meantime.

        Raises:
            JobFailed: some failed; all that do not depend on them were run.
            Preempted: the user interrupts the waiting; the jobs go on.
        """
        shown: dict[str, str] = {}
        preemption.stop_at_once()
        try:
            while True:
                records = load_records(self._workdir)
                queue = load_queue(records.user)
                states = find_states(self._workdir, records, queue)
                for job in jobs:
                    if shown.get(job.name, "waiting") != states[job.name].state:
                        print(f"{job.name}: {states[job.name].state}", file=sys.stderr, flush=True)
                    shown[job.name] = states[job.name].state
                coming = {name for name, state in shown.items() if state != "done"}
                if not find_active(jobs, coming, records, queue)[0] and "running" not in shown.values():
                    break
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            look = f"concentrate status {write_override('workdir', str(self._workdir))}"
            raise Preempted(f"no longer waiting; the jobs go on: `{look}`, or the same command again") from None
        failed = {job.name: job.exit_code() for job in jobs if shown[job.name] in ("failed", "preempted")}
        failed |= {job.name: CANCELLED for job in jobs if shown[job.name] == "cancelled"}
        if failed:
            raise describe_failures(jobs, failed, [job for job in jobs if shown[job.name] == "waiting"], {})


def refuse_beside_queue(workdir: Path) -> None:
    """Raises: ConfigError where SLURM still has jobs of this directory, which this machine would do beside them."""
    records = load_records(workdir)
    ids = {name: record.slurm_id for name, record in records.jobs.items() if record.slurm_id}
    if not ids:
        return
    try:
        queue = load_settled_queue(records.user, list(ids.values()))
    except ConfigError:
        return  # where SLURM is not, nobody waits for it
    left = {name: i for name, i in ids.items() if i in queue and (queue[i].is_waiting or queue[i].is_running)}
    if left:
        shown = ", ".join(f"{name} as {slurm_id}" for name, slurm_id in list(left.items())[:3])
        numbers = " ".join(dict.fromkeys(slurm_id.partition("_")[0] for slurm_id in left.values()))
        raise ConfigError(
            f"{workdir}: SLURM has jobs of this in its queue ({shown}{', ...' * (len(left) > 3)}); go on with launcher=slurm, or "
            f"end them first: scancel {numbers}"
        )


def find_active(
    jobs: Sequence[Job], due: Set[str], records: JobRecords, queue: Mapping[str, QueuedJob]
) -> tuple[dict[str, str], list[str]]:
    """The ids of due jobs that are queued or running, and the ids of those that wait in vain for a job that has failed.

    Raises:
        ConfigError: a job is queued or running with another config.
    """
    active: dict[str, str] = {}
    in_vain: list[str] = []
    for job in jobs:
        record = records.jobs.get(job.name)
        queued = None if record is None or record.slurm_id is None else queue.get(record.slurm_id)
        if job.name not in due or queued is None:
            continue
        is_fed = all(name not in due or name in active for name in job.after)
        if queued.is_running or (queued.is_waiting and is_fed):
            if load_frozen(job.file(FROZEN)).identity() != job.config.identity():
                raise ConfigError(
                    f"{job.name} is in SLURM's queue as {record.slurm_id} with another configuration, {job.file(FROZEN)}; "
                    f"restore the values, give another name or workdir, or end it: scancel {record.slurm_id}"
                )
            active[job.name] = record.slurm_id
        elif queued.state == "PENDING":
            in_vain.append(record.slurm_id)
    return active, in_vain


def build_batches(jobs: Sequence[Job], ids: Mapping[str, str]) -> list[Batch]:
    """The jobs in few batches: jobs of one verb with the same resources, which wait for the same array, are one array.

    Args:
        ids: the ids of jobs that were submitted before, by name.
    """
    groups: dict[tuple, list[Job]] = {}
    group_of: dict[str, tuple] = {}
    for job in jobs:
        awaited = frozenset(group_of.get(n, ids.get(n, "").partition("_")[0]) for n in job.after)
        key = (job.name,) if job.task is None else (job.verb, job.resources, awaited)
        group_of[job.name] = key
        groups.setdefault(key, []).append(job)
    batches: list[Batch] = []
    for members in groups.values():
        first = members[0]
        name = first.file_name if first.task is None else first.verb
        count = sum(batch.is_array and batch.jobs[0].verb == first.verb for batch in batches)
        name = f"{name}-{count + 1}" if count and first.task is not None else name
        batches.append(Batch(name, tuple(sorted(members, key=lambda job: job.task or 0))))
    return batches


def ids_of(batch: Batch, number: str) -> dict[str, str]:
    """The ids of the batch's jobs, by name, once SLURM has given the batch this number."""
    return {job.name: number if job.task is None else f"{number}_{job.task}" for job in batch.jobs}


def build_command(batch: Batch, config: SlurmConfig, ids: Mapping[str, str], batches: Sequence[Batch]) -> list[str]:
    """The `sbatch` command; `ids` are those of unfinished jobs, for which this batch may have to wait."""
    first, folder = batch.jobs[0], batch.jobs[0].config.workdir.resolve() / JOBS
    resources = first.resources
    log = folder / f"{batch.name}{'-%a' if batch.is_array else ''}{SLURM_LOG}"
    options = [f"--job-name=concentrate-{batch.name}", f"--output={log}"]
    if batch.is_array:
        throttle = f"%{config.max_parallel}" if config.max_parallel else ""
        options.append(f"--array={_compress([job.task for job in batch.jobs])}{throttle}")
    if dependency := _describe_dependency(batch, ids, batches):
        options.append(f"--dependency={dependency}")
    if partition := _choose_partition(resources, config):
        options.append(f"--partition={partition}")
    options += [f"--nodes={resources.num_nodes}", f"--ntasks-per-node={resources.processes_per_node}"]
    if resources.accelerator == "gpu":
        options.append(f"--gpus-per-node={resources.processes_per_node}")
    names = [f"{job.task}={job.file_name}" for job in batch.jobs] if batch.is_array else [first.file_name]
    return ["sbatch", "--parsable", *options, str(folder / SCRIPT_FILE), *names]


def build_script(workdir: Path, config: SlurmConfig) -> str:
    """The script that SLURM runs: it starts the job's process by `srun`, and requeues a job that was stopped and has saved."""
    values = {"account": config.account, "qos": config.qos, "time": config.time, "mem": config.memory}
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    options = "\n".join(f"#SBATCH {option}" for option in [*given, *config.options])
    setup = "".join(f"{line}\n" for line in config.setup)
    return _SCRIPT.format(
        options=f"{options}\n" if options else "",
        setup=setup,
        signal_seconds=config.signal_seconds,
        cpus_per_task=config.cpus_per_task,
        folder=shlex.quote(str(workdir.resolve() / JOBS)),
        python=shlex.quote(sys.executable),
        preempted=Preempted.exit_code,
        cancelled=CANCELLED,
        max_restarts=config.max_restarts,
    )


#: The signal goes to the job's steps and not to the script: there is no "B:".
_SCRIPT = """#!/usr/bin/env bash
# Written by `concentrate run launcher=slurm`, which submits it with the name of a job, or with those of an array's: 3=NAME.
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=USR1@{signal_seconds}
#SBATCH --cpus-per-task={cpus_per_task}
{options}TOLD=
trap TOLD=1 TERM USR1  # before all else: this script outlives the signal that makes the job save
NAME=$1
for each in "$@"; do
    [[ $each == "${{SLURM_ARRAY_TASK_ID:-none}}="* ]] && NAME=${{each#*=}}
done
JOB={folder}/$NAME
ID=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
ID=${{ID:-$SLURM_JOB_ID}}  # of an array's last task, the job's number is that of the whole array
exec >>"$JOB.log" 2>&1
rm -f "$JOB.exit"
{setup}CODE=143  # as of a process that SIGTERM has ended
if [[ -z $TOLD ]]; then
    CODE=0
    srun --cpus-per-task={cpus_per_task} --kill-on-bad-exit=1 {python} -m concentration.pipeline "$JOB.json" || CODE=$?
fi
# The job notes signals, and writes how it ended: one that such a signal has killed was in its first moments.
if [[ ! -f $JOB.exit && $CODE != 0 && ( -n $TOLD || $CODE == 143 || $CODE == 138 ) ]]; then
    echo {preempted} >"$JOB.exit"
fi
if [[ -f $JOB.exit && $(<"$JOB.exit") == {preempted} ]]; then
    CODE={preempted}
    SAID=$(scontrol --oneliner show job "$ID")
    # One that makes room or nears its limit is still RUNNING. Of one that SLURM itself has requeued, the restart is counted.
    if [[ $SAID == *" JobState=COMPLETING "* && $SAID == *" Restarts=${{SLURM_RESTART_COUNT:-0}} "* &&
          $SAID != *" Reason=TimeLimit "* && $SAID != *" PreemptTime=2"* ]]; then
        CODE={cancelled}
        echo "concentrate: ended by scancel, so it is not requeued; what is done is saved"
        echo "$CODE" >"$JOB.exit"
    elif (( ${{SLURM_RESTART_COUNT:-0}} < {max_restarts} )); then
        # Before the script ends, so that what depends on the job goes on waiting.
        scontrol requeue "$ID" && sleep 60  # until SLURM ends this script: its exit code would count as the job's
    else
        echo "concentrate: stopped more than {max_restarts} times (launcher.max_restarts); what is done is saved"
    fi
fi
exit "$CODE"
"""


def _choose_partition(resources: Resources, config: SlurmConfig) -> str | None:
    if resources.accelerator == "cpu" and config.cpu_partition is not None:
        return config.cpu_partition
    return config.partition


def _describe_dependency(batch: Batch, ids: Mapping[str, str], batches: Sequence[Batch]) -> str:
    """`aftercorr` for tasks that wait for the task of their own number, `afterok` for all else."""
    corresponding, others = set(), set()
    for job in batch.jobs:
        for slurm_id in (ids[name] for name in job.after if name in ids):
            number, _, task = slurm_id.partition("_")
            if job.task is not None and task == str(job.task):
                corresponding.add(number)
            else:
                others.add(slurm_id)
    # An array that is awaited as a whole is named once; not one that was submitted before, some of whose tasks may have failed.
    for whole in batches:
        tasks = {ids[job.name] for job in whole.jobs if job.name in ids}
        if whole.is_array and len(tasks) == len(whole.jobs) and tasks <= others:
            others = (others - tasks) | {min(tasks).partition("_")[0]}
    parts = [f"aftercorr:{':'.join(sorted(corresponding))}"] if corresponding else []
    return ",".join([*parts, f"afterok:{':'.join(sorted(others))}"] if others else parts)


def _compress(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
