"""Where curves go: always `metrics.jsonl` in the run directory, and wandb or TensorBoard beside it."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from concentration.schema import Config
from concentration.targets import append_text, write_atomically

METRICS_FILE = "metrics.jsonl"


class LoggerConfig(Config):
    """`csv` writes `metrics.jsonl` alone; `wandb` and `tensorboard` write it too."""

    kind: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "concentration"


class JsonlLogger(Logger):
    """One JSON object a line and a step: nothing to lose when a run is killed, and easy to read with any tool.

    Args:
        path: of the file.
        first_step: lines of later steps are dropped: they come from a run that was killed after its last checkpoint.
    """

    def __init__(self, path: Path, first_step: int):
        super().__init__()
        self._path = path
        self._started = time.time()
        if path.exists() and rank_zero_only.rank == 0:
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._started -= json.loads(kept[-1])["seconds"] if kept else 0.0  # time goes on where it stopped

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: round(float(value), 6) for name, value in metrics.items() if name != "epoch"}
        seconds = round(time.time() - self._started, 2)
        append_text(self._path, json.dumps({"step": step, "seconds": seconds, **values}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Configs are in config.json."""


def load_metrics(run_path: Path) -> list[dict]:
    """The lines of a run's metrics, those that were cut off by a kill left out."""
    path = run_path / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float("inf")]


@contextlib.contextmanager
def open_loggers(config: LoggerConfig, run_path: Path, first_step: int, values: dict) -> Iterator[list[Logger]]:
    """The loggers of a run, for as long as it lasts; what cannot be reached never ends or delays it."""
    loggers = _build_loggers(config, run_path, first_step, values)
    try:
        yield loggers
    finally:
        if config.kind == "wandb" and rank_zero_only.rank == 0:
            # NOTE: a job's process ends without Python's exit hooks, and a multirun's next job would write into this run.
            import wandb

            wandb.finish()


def _build_loggers(config: LoggerConfig, run_path: Path, first_step: int, values: dict) -> list[Logger]:
    loggers: list[Logger] = [JsonlLogger(run_path / METRICS_FILE, first_step)]
    if config.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(save_dir=run_path, name="tensorboard", version=""))
    if config.kind == "wandb" and rank_zero_only.rank == 0:
        loggers.append(_build_wandb_logger(config, run_path, values))
    return loggers


def _build_wandb_logger(config: LoggerConfig, run_path: Path, values: dict) -> Logger:
    """Online with a key and a network, offline otherwise; `wandb sync` sends an offline run later."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_key()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    options = {
        "project": config.project,
        "group": run_path.parent.parent.name,
        "job_type": run_path.parent.name,
        "name": run_path.name,
        # The same directory is the same run: a resumed stage continues its curves.
        "id": "-".join(run_path.parts[-3:]).replace("/", "-"),
        "resume": "allow",
        "dir": str(run_path),
        "config": values,
    }
    # NOTE: with a key but no network, wandb.init waits two minutes and then raises; 20 seconds, then offline.
    settings = wandb.Settings(init_timeout=20, silent=True)
    try:
        run = wandb.init(mode=mode, settings=settings, **options)
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        print(f"wandb: {error}; continuing offline: `wandb sync {run_path}/wandb/offline-*` sends the run later")
        wandb.teardown()  # else the run that was not begun holds its id
        run = wandb.init(mode="offline", settings=settings, **options)
    return WandbLogger(experiment=run)


def _netrc_has_key() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the line that a kill cut off
        return float("inf")
