"""Which network has a name now: a hash of its files, by which later stages know what they were made from."""

from collections.abc import Sequence
from pathlib import Path

from concentration.errors import ConfigError
from concentration.schema import hash_values, write_override
from concentration.stages.folders import STUDENTS, TEACHERS
from concentration.stages.run_directory import RunDirectory
from concentration.stages.verbs import write_command

#: The name of all teachers as one ensemble.
SPECIALISTS = "specialists"


def find_checkpoint(workdir: Path, name: str | Sequence[str], verticals: Sequence[str]) -> str:
    """A hash of the files of the network, or networks, with this name or these.

    Raises:
        ConfigError: one is not finished, or nothing has this name.
    """
    if not isinstance(name, str):
        checkpoints = {each: find_checkpoint(workdir, each, verticals) for each in name}
        return checkpoints[name[0]] if len(name) == 1 else hash_values(checkpoints)
    if name == SPECIALISTS:
        return identify_teachers(workdir, verticals)
    for kind, command in (
        (STUDENTS, f"concentrate student {write_override('name', name)}"),
        (TEACHERS, write_command("teacher", name)),
    ):
        if (workdir / kind / name).is_dir():
            return RunDirectory(workdir / kind / name).load_done(command, checkpoint=str)["checkpoint"]
    have = sorted(path.name for kind in (STUDENTS, TEACHERS) for path in (workdir / kind).glob("*"))
    raise ConfigError(f"name={name}: no such run in {workdir}; valid: {', '.join([SPECIALISTS, *have])}")


def identify_teachers(workdir: Path, verticals: Sequence[str]) -> str:
    """A hash of the files of these verticals' teachers.

    Raises:
        ConfigError: one has not finished.
    """
    return hash_values({vertical: identify_teacher(workdir, vertical) for vertical in verticals})


def identify_teacher(workdir: Path, vertical: str) -> str:
    """A hash of the files of one vertical's teacher. Raises: as `identify_teachers`."""
    directory = RunDirectory(workdir / TEACHERS / vertical)
    return directory.load_done(write_command("teacher", vertical), checkpoint=str)["checkpoint"]
