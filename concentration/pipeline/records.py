"""`jobs/jobs.json`: which jobs the runs of a working directory have, and which of them were given to SLURM."""

import getpass
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic

from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.pipeline.jobs import JOBS, Job
from concentration.schema import Config, parse_config, parse_json
from concentration.temporaries import clear_temporaries

JOBS_FILE = "jobs.json"


class JobRecord(Config):
    """A job as `status` needs it, in the words of `Job`; directory and files are relative to the working directory.

    slurm_id: "12", or "12_3" in an array; None where this machine runs the job.
    submitted: when SLURM took it, in seconds since 1970.
    """

    directory: Path
    file_name: str
    proof: str
    after: tuple[str, ...]
    slurm_id: str | None = None
    submitted: float = 0.0


class JobRecords(Config):
    """The jobs by name, in the order of the graph; `user` is whose they are in SLURM's queue."""

    user: str
    jobs: dict[str, JobRecord] = pydantic.Field(default_factory=dict)


def load_records(workdir: Path) -> JobRecords:
    """What was recorded; no jobs where `concentrate run` was never given.

    Raises:
        DataError: the file is damaged.
    """
    path = workdir / JOBS / JOBS_FILE
    if not path.exists():
        return JobRecords(user=_find_user())
    values = parse_json(path.read_bytes(), str(path))
    try:
        return parse_config(JobRecords, values if isinstance(values, dict) else {})
    except ConfigError as error:
        raise DataError(f"{path}: {error}; delete it: `concentrate run` writes it again") from None


def record_jobs(workdir: Path, jobs: Sequence[Job], slurm_ids: Mapping[str, tuple[str, float]] | None = None) -> None:
    """Adds these jobs, or replaces their records; those of other runs, such as of another student, stay.

    Args:
        slurm_ids: by the job's name, its id and when it was submitted.
    """
    known, ids = load_records(workdir), slurm_ids or {}
    records = dict(known.jobs)
    for job in jobs:
        slurm_id, submitted = ids.get(job.name, (None, 0.0))
        records[job.name] = JobRecord(
            directory=job.directory.relative_to(workdir),
            file_name=job.file_name,
            proof=job.proof,
            after=job.after,
            slurm_id=slurm_id,
            submitted=submitted,
        )
    clear_temporaries(workdir / JOBS)
    content = JobRecords(user=_find_user(), jobs=records)
    write_atomically(workdir / JOBS / JOBS_FILE, content.model_dump(mode="json"))


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container whose user has no name
        return str(os.getuid())
