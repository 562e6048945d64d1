"""Whether targets, an evaluation, a calibration or an export are of the network that has its name now, or of an earlier one."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from concentration.errors import ConfigError
from concentration.serving.export_folder import EXPORTS
from concentration.stages.folders import CALIBRATIONS, EVALUATIONS, SHARDS, TARGETS
from concentration.stages.identities import find_checkpoint, identify_teacher
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory
from concentration.stages.verbs import write_command


def find_earlier(workdir: Path, directories: Iterable[Path]) -> set[Path]:
    """Those of these directories that are finished, and of a network which was trained anew since.

    Raises:
        DataError: the record of a stage is damaged.
    """
    finished = [path for path in directories if RunDirectory(path).is_finished]
    verticals = list_verticals(workdir)
    results = [workdir / name for name in (EVALUATIONS, CALIBRATIONS, EXPORTS)]
    return {
        path
        for path in finished
        if (
            path.parent in results
            and is_earlier(workdir, path, RunDirectory(path).load_upstream().get("checkpoint"), verticals)
        )
        or (path.parent.parent == workdir / TARGETS and _are_earlier(workdir, path))
    }


def list_verticals(workdir: Path) -> list[str]:
    """The names that `prepare` has recorded: to load 100,000 classes for them would take a second.

    Empty where nothing is prepared, or by a version that did not record them.
    """
    directory = RunDirectory(workdir / SHARDS)
    if not directory.is_finished:
        return []
    done = directory.load_done("concentrate prepare", splits=dict)
    return list(as_mapping(as_mapping(done["splits"].get("train")).get("by_vertical")))


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
