"""Whether targets, an evaluation, a calibration or an export are of the network that has its name now, or of an earlier one."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from concentration.errors import ConfigError
from concentration.serving.export_folder import EXPORTS
from concentration.stages.folders import CALIBRATIONS, EVALUATIONS, SHARDS, TARGETS
from concentration.stages.identities import find_checkpoint, identify_teacher
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory
from concentration.stages.verbs import write_command


def is_of_earlier(workdir: Path, directory: Path, verticals: Sequence[str]) -> bool:
    """Whether this directory is of a finished stage, and of a network which was trained anew since.

    Raises:
        DataError: its record, or that of the network, is damaged.
    """
    if directory.parent in [workdir / name for name in (EVALUATIONS, CALIBRATIONS, EXPORTS)]:
        return RunDirectory(directory).is_finished and is_earlier(
            workdir, directory, RunDirectory(directory).load_upstream().get("checkpoint"), verticals
        )
    return directory.parent.parent == workdir / TARGETS and _are_earlier(workdir, directory)


def list_verticals(workdir: Path) -> list[str]:
    """The names that `prepare` has recorded: to load 100,000 classes for them would take a second.

    Empty where nothing is prepared, or by a version that did not record them.

    Raises:
        DataError: the record is damaged.
    """
    directory = RunDirectory(workdir / SHARDS)
    if not directory.is_finished:
        return []
    train = as_mapping(directory.load_done("concentrate prepare").get("splits")).get("train")
    return list(as_mapping(as_mapping(train).get("by_vertical")))


def is_earlier(workdir: Path, directory: Path, checkpoint: str | None, verticals: Sequence[str]) -> bool:
    """Whether the network that the stage in `directory` was begun for has another hash now than `checkpoint`.

    False where there is none, or none that is finished: nobody knows what it will be.
    """
    if not verticals or not (directory / "config.json").exists():
        return False  # nothing is prepared, or the directory was made by hand
    with contextlib.suppress(ConfigError):
        return find_checkpoint(workdir, RunDirectory(directory).load_config()["name"], verticals) != checkpoint
    return False


def _are_earlier(workdir: Path, directory: Path) -> bool:
    """Whether one vertical's targets are of another teacher than there is now; a teacher may be removed once they are made."""
    vertical = directory.name
    with contextlib.suppress(ConfigError):
        made_by = RunDirectory(directory).load_done(write_command("targets", vertical)).get("teacher")
        return identify_teacher(workdir, vertical) != made_by
    return False
