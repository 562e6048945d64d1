"""Where curves go: always `metrics.jsonl` in the run directory, and wandb or TensorBoard beside it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from concentration.files import append_text, write_atomically
from concentration.training.configs import LoggerConfig
from concentration.training.metrics_file import METRICS_FILE, load_metrics, step_of_line


class JsonlLogger(Logger):
    """One JSON object per line and step: a killed run loses nothing, and any tool can read it.

    Args:
        path: of the file.
        first_step: the step of the checkpoint that training continues from. Lines of later steps are dropped: they are from a run
            that was killed after that checkpoint. With 0, as the run begins anew, all are dropped.
    """

    def __init__(self, path: Path, first_step: int):
        super().__init__()
        self._path = path
        self._started = time.monotonic()
        if path.exists() and rank_zero_only.rank == 0:
            lines = path.read_text().splitlines() if first_step else ()
            kept = [line for line in lines if step_of_line(line) <= first_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._started -= json.loads(kept[-1])["seconds"] if kept else 0.0  # seconds continue where they stopped

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: round(float(value), 6) for name, value in metrics.items() if name != "epoch"}
        seconds = round(time.monotonic() - self._started, 2)
        append_text(self._path, json.dumps({"step": step, "seconds": seconds, **values}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Does nothing: configs are in config.json."""


@contextlib.contextmanager
def open_loggers(config: LoggerConfig, run_path: Path, first_step: int) -> Iterator[list[Logger]]:
    """The loggers of a run, for as long as it lasts. A service that cannot be reached never ends or delays the run."""
    loggers: list[Logger] = [JsonlLogger(run_path / METRICS_FILE, first_step)]
    if config.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        # As JsonlLogger drops them: without this the steps behind the checkpoint would be drawn twice.
        redone = first_step + 1 if first_step else 0
        loggers.append(TensorBoardLogger(save_dir=run_path, name="tensorboard", version="", purge_step=redone))
    if config.kind != "wandb" or rank_zero_only.rank != 0:
        yield loggers
        return
    from concentration.training.wandb_logger import WandbLogger

    logger = WandbLogger(config.project, run_path)
    try:
        yield [*loggers, logger]
    finally:
        logger.finish(load_metrics(run_path))
