"""Whether an evaluation, a calibration or an export is of the network that has its name now, or of an earlier one."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from concentration.errors import ConcentrationError, ConfigError
from concentration.serving.export_folder import EXPORTS
from concentration.stages.calibrate import CALIBRATIONS
from concentration.stages.evaluate import EVALUATIONS, find_checkpoint
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory
from concentration.taxonomy import Taxonomy


def find_earlier(workdir: Path, directories: Iterable[Path]) -> set[Path]:
    """Those of these directories that are finished evaluations, calibrations or exports of earlier networks.

    Raises:
        DataError: the record of a stage is damaged.
    """
    folders = [workdir / name for name in (EVALUATIONS, CALIBRATIONS, EXPORTS)]
    finished = [path for path in directories if path.parent in folders and RunDirectory(path).is_finished]
    if not finished:
        return set()
    try:
        _, taxonomy, _ = load_prepared(workdir, DataOverrides())
    except ConcentrationError:  # without data there is no network; what is wrong with them, the stages tell
        return set()
    checkpoints = {path: RunDirectory(path).load_upstream().get("checkpoint") for path in finished}
    return {path for path, checkpoint in checkpoints.items() if is_earlier(workdir, path, checkpoint, taxonomy)}


def is_earlier(workdir: Path, directory: Path, checkpoint: str | None, taxonomy: Taxonomy) -> bool:
    """Whether the network that the stage in `directory` was begun for has another hash now than `checkpoint`.

    False where there is none, or none that is finished: nobody knows what it will be.
    """
    if not (directory / "config.json").exists():
        return False  # made by hand
    with contextlib.suppress(ConfigError):
        return find_checkpoint(workdir, RunDirectory(directory).load_config()["name"], taxonomy) != checkpoint
    return False
