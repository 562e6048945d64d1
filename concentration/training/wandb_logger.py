"""Curves in Weights & Biases: online with a key and a network, offline otherwise, and never a reason for a run to end or wait.

Each working directory is a group, each verb a job type, and each run directory has an id, kept in its `wandb.json`: a resumed
stage continues its curves, and one that was begun anew (`overwrite=true`) has new ones.
"""

import contextlib
import json
import netrc
import os
import secrets
import shlex
import sys
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import Logger

from concentration.files import write_atomically

ID_FILE = "wandb.json"
STEP = "trainer/global_step"
#: Quantities that are drawn for all verticals in one chart: `train/gamma` from all `train/VERTICAL/gamma`.
CHARTS = ("train/gamma", "train/loss", "train/routed", "val/ap")
MAX_POINTS = 200

#: How long wandb may keep a run waiting at its start and at its end. Its defaults are 90 seconds and for ever.
START_SECONDS, FINISH_SECONDS = 20, 60


class WandbLogger(Logger):
    """Sends what it is given. If wandb fails, that is said once, and training goes on without it."""

    def __init__(self, project: str, run_path: Path):
        super().__init__()
        self._run = _start_run(project, run_path)

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str | None:
        return self._run.id if self._run else None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self._try(lambda run: run.log({**numbers, STEP: step}))

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Does nothing: wandb gets the config when the run begins."""

    def finish(self, lines: list[dict]) -> None:
        """Draws the charts of a whole run's metrics and ends the run, into which a multirun's next job would otherwise write.

        NOTE: wandb would do this in an exit hook, but a job's process ends without Python's exit hooks.
        """
        self._try(lambda run: run.log({f"charts/{name}": chart for name, chart in _draw_charts(lines).items()}))
        self._try(lambda run: run.finish())
        if self._run is None:
            with contextlib.suppress(Exception):
                wandb.teardown()  # or its exit hook would meet the same error and print a traceback

    def _try(self, do) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except Exception as error:  # whatever goes wrong in wandb, it is not worth a training run
            print(
                f"wandb: {type(error).__name__}: {error}; going on without it, curves are in metrics.jsonl",
                file=sys.stderr,
            )
            self._run = None


def has_key() -> bool:
    """Whether wandb would find a key without asking for one."""
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or bool(netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def _start_run(project: str, run_path: Path):
    path = run_path.resolve()
    report = path.parents[1] / "report" / "index.html"
    options = {
        "project": project,
        "group": path.parents[1].name,
        "job_type": path.parent.name.removesuffix("s"),
        "name": path.name,
        "id": _keep_id(path / ID_FILE),
        "resume": "allow",
        "dir": str(path),
        "config": _load_config(path),
    }
    settings = wandb.Settings(init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS, silent=True)
    # NOTE: in online mode without a key, wandb would wait at a terminal for somebody to type one.
    asked = os.environ.get("WANDB_MODE", "online")
    mode = asked if has_key() or asked == "disabled" else "offline"
    how_to_send = f"`wandb sync {shlex.quote(f'{path}/wandb')}/offline-run-*` sends it later"
    try:
        run = wandb.init(mode=mode, settings=settings, **options)
        if mode == "offline":
            print(f"wandb: offline; {how_to_send}", file=sys.stderr)
    except Exception as error:  # no network, a refused key, a full disk: wandb raises many kinds
        reason = " ".join(str(error).split())
        print(f"wandb: {reason}; continuing offline: {how_to_send}", file=sys.stderr)
        try:
            wandb.teardown()  # or the run that has not started keeps its id
            run = wandb.init(mode="offline", settings=settings, **options)
        except Exception as again:
            reason = " ".join(str(again).split())
            print(f"wandb: {reason}; going on without it, curves are in metrics.jsonl", file=sys.stderr)
            return None
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    run.summary["report"] = report.as_uri()
    return run


def _keep_id(path: Path) -> str:
    try:
        return json.loads(path.read_text())["id"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        found = secrets.token_hex(4)
        write_atomically(path, {"id": found})
        return found


def _load_config(path: Path) -> dict:
    """The config that the stage was begun with; empty where another program calls `fit`."""
    try:
        return json.loads((path / "config.json").read_text())["config"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return {}


def _draw_charts(lines: list[dict]) -> dict:
    charts = {}
    for name in CHARTS:
        split, quantity = name.split("/")
        drawn = [line for line in lines if any(_is_of_vertical(key, split, quantity) for key in line)]
        drawn = drawn[:: -(-len(drawn) // MAX_POINTS) or 1]
        keys = [key for key in (drawn[0] if drawn else ()) if _is_of_vertical(key, split, quantity)]
        drawn = [line for line in drawn if all(key in line for key in keys)]
        if keys:
            verticals = [key.split("/", 1)[1].rsplit("/", 1)[0] for key in keys]
            values = [[line[key] for line in drawn] for key in keys]
            charts[name] = wandb.plot.line_series([line["step"] for line in drawn], values, verticals, name, "step")
    return charts


def _is_of_vertical(key: str, split: str, quantity: str) -> bool:
    return key.startswith(f"{split}/") and key.endswith(f"/{quantity}") and key.count("/") >= 2
