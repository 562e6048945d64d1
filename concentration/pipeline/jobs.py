"""One job of a pipeline: a verb with its config, frozen in a file, run in a process of its own."""

import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from concentration.errors import ConcentrationError, Preempted
from concentration.processes import end_with_parent
from concentration.schema import parse_config
from concentration.stages.run_directory import StageConfig
from concentration.stages.verbs import STAGE_VERBS
from concentration.targets import write_atomically

JOB_FILE, LOG_FILE = "job.json", "log.txt"


@dataclass(frozen=True)
class Job:
    """A node of the graph.

    Attributes:
        name: unique, "teacher latin" say.
        verb: what is run.
        config: checked.
        directory: where its status, log and DONE.json are.
        after: names of the jobs that must have finished.
        summary: a sentence for the reader.
        processes: how many torchrun starts; 1 needs none.
    """

    name: str
    verb: str
    config: StageConfig
    directory: Path
    after: tuple[str, ...]
    summary: str
    processes: int = 1

    def finished_at(self) -> int | None:
        """When the job's result was finished, in nanoseconds; None where there is none."""
        done = self.directory / "DONE.json"
        return done.stat().st_mtime_ns if done.exists() else None

    def freeze(self) -> Path:
        """Writes what `run_frozen` needs."""
        path = self.directory / JOB_FILE
        write_atomically(path, {"verb": self.verb, "config": self.config.model_dump(mode="json")})
        return path


def run_frozen(path: Path) -> int:
    """Runs a frozen job in this process; returns its exit code after printing what went wrong."""
    frozen: Mapping = json.loads(path.read_text())
    function, config_class = STAGE_VERBS[frozen["verb"]].load()
    try:
        function(parse_config(config_class, frozen["config"]))
    except ConcentrationError as error:
        print(f"concentrate: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("concentrate: stopped by a signal; run the same command again", file=sys.stderr)
        return Preempted.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_forked(path: Path) -> None:
    """The body of a forked process: output goes to the job's log, and the process ends with the job's exit code."""
    log = os.open(path.with_name(LOG_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
    os._exit(code)  # NOTE: not sys.exit: what libraries leave running (loggers, pools) must not hold the pipeline


if __name__ == "__main__":
    sys.exit(run_frozen(Path(sys.argv[1])))
