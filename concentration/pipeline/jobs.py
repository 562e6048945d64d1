"""One job of a pipeline: a verb with its config, frozen in a file, run in a process of its own."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from concentration import preemption
from concentration.errors import Busy, ConcentrationError, Preempted, naming_refusals
from concentration.files import write_atomically
from concentration.processes import end_with_parent
from concentration.schema import parse_config
from concentration.stages.run_directory import RunDirectory, StageConfig
from concentration.stages.verbs import STAGE_VERBS

#: In the working directory: the frozen configs, logs and exit codes of a run's jobs. They are not in the stages' directories,
#: because `overwrite` clears these, and then a job could not be started again.
JOBS = "jobs"
#: Suffixes of a job's files; the exit code is missing while the job runs, and where it was killed.
FROZEN, LOG, EXIT_CODE = ".json", ".log", ".exit"
#: This exit code, with which no verb ends, means that the job was ended by `scancel`, as the job script has noticed.
CANCELLED = 128 + signal.SIGTERM
#: The exit code of a job in whose directory another run's job works.
BUSY = 76
#: The environment variable that names a file for the ranks' exit code, which no other run of the same job writes or deletes.
OWN_EXIT_CODE = "CONCENTRATION_EXIT_CODE"
#: The proof of every stage that keeps a `RunDirectory`.
DONE_FILE = "DONE.json"


@dataclass(frozen=True)
class Resources:
    """What a job runs on; `processes_per_node` above 1 are started by torchrun or srun."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    num_nodes: int = 1
    processes_per_node: int = 1

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.processes_per_node


@dataclass(frozen=True)
class Job:
    """A node of the graph.

    Attributes:
        name: unique, such as "teacher latin".
        verb: the verb that it runs.
        config: the verb's config.
        directory: where its status and results are.
        after: the names of the jobs that must finish before it.
        summary: what it does, for the reader.
        resources: what it runs on.
        task: its number in an array of jobs of one verb; a vertical's targets have the number of its teacher. None without array.
        proof: the file in `directory` that is written last.
    """

    name: str
    verb: str
    config: StageConfig
    directory: Path
    after: tuple[str, ...]
    summary: str
    resources: Resources = Resources()
    task: int | None = None
    proof: str = DONE_FILE

    @property
    def file_name(self) -> str:
        """The name of its files in `jobs/`, without suffix."""
        return self.name.replace(" ", "-", 1)

    def file(self, suffix: str) -> Path:
        return self.config.workdir / JOBS / f"{self.file_name}{suffix}"

    def finished_at(self) -> int | None:
        """When the job's result was written, in nanoseconds since 1970; None where there is none."""
        proof = self.directory / self.proof
        if not proof.exists():
            return None
        return RunDirectory(self.directory).finished_at() if self.proof == DONE_FILE else proof.stat().st_mtime_ns

    def exit_code(self) -> int | None:
        """The exit code of the job's last run; None while it runs, and where it was killed."""
        path = self.file(EXIT_CODE)
        return int(path.read_text()) if path.exists() else None

    def command(self) -> list[str]:
        """The command that runs the frozen job on this machine."""
        module = ["-m", "concentration.pipeline", str(self.file(FROZEN))]
        if self.resources.num_processes == 1:
            return [sys.executable, *module]
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        return [sys.executable, *torchrun, f"--nproc-per-node={self.resources.num_processes}", *module]

    def freeze(self) -> Path:
        """Writes what `run_frozen` needs, and deletes the exit code of an earlier run of the job."""
        self.file(EXIT_CODE).unlink(missing_ok=True)
        write_atomically(self.file(FROZEN), {"verb": self.verb, "config": self.config.model_dump(mode="json")})
        return self.file(FROZEN)


def load_frozen(path: Path) -> StageConfig:
    """The config of a frozen job. Raises: ConfigError where it is none."""
    return _parse(json.loads(path.read_text()))[1]


def run_frozen(path: Path) -> int:
    """Runs a frozen job in this process, prints what goes wrong, and returns the exit code.

    The exit code is also written beside the frozen config, because srun and torchrun end with codes of their own.
    """
    preemption.note_signals()
    code = _run(json.loads(path.read_text()))
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        try:
            write_atomically(path.with_suffix(EXIT_CODE), f"{code}\n")
            if OWN_EXIT_CODE in os.environ:
                write_atomically(Path(os.environ[OWN_EXIT_CODE]), f"{code}\n")
        except ConcentrationError as error:
            print(f"concentrate: {error}", file=sys.stderr)
            return code or error.exit_code
    return code


def run_forked(path: Path) -> None:
    """The body of a forked process: output goes to the job's log, and the process ends with the job's exit code."""
    log = os.open(path.with_suffix(LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    end_with_parent()
    import torch

    torch.set_num_threads(1)  # two threads on a small shared machine were seen 20 to 100 times slower than one
    code = run_frozen(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # NOTE: not sys.exit: what libraries leave running (loggers, pools) must not hold up the pipeline


def _parse(frozen: Mapping) -> tuple[Callable[[StageConfig], None], StageConfig]:
    function, config_class = STAGE_VERBS[frozen["verb"]].load()
    return function, parse_config(config_class, frozen["config"])


def _run(frozen: Mapping) -> int:
    try:
        function, config = _parse(frozen)
        with naming_refusals():
            function(config)
    except ConcentrationError as error:
        print(f"concentrate: {error}", file=sys.stderr)
        return BUSY if isinstance(error, Busy) else error.exit_code
    except KeyboardInterrupt:
        print("concentrate: stopped by a signal; run the same command again", file=sys.stderr)
        return Preempted.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0
