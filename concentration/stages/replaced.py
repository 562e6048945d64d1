"""What `overwrite` replaces. It waits in a folder of its own until the stage has begun to write its new results.

A kill at any moment leaves one of three states, which `settle_replaced` tells apart: some files are still in their place (the
folder has no config.json, so all of them belong where they were), all are set aside and nothing is in their place (they come
back), or new results have been begun (they are deleted).
"""

from collections.abc import Iterable
from pathlib import Path

from concentration.stages.nfs_folders import discard, list_folder

REPLACED_FOLDER = ".replaced"


def set_aside(directory: Path) -> None:
    """Puts everything that a stage has written out of the way."""
    (directory / REPLACED_FOLDER).mkdir(exist_ok=True)
    for path in _config_last(list_content(directory)):
        path.rename(directory / REPLACED_FOLDER / path.name)


def settle_replaced(directory: Path) -> None:
    """Brings back what was set aside, if nothing has been written in its place; otherwise deletes it."""
    replaced = directory / REPLACED_FOLDER
    if not replaced.is_dir():
        return
    if not list_folder(replaced):
        discard(replaced)
        return
    if (replaced / "config.json").exists():
        if any(path.name != "config.json" for path in list_content(directory)):
            forget_replaced(directory)
            return
        (replaced / "config.json").replace(directory / "config.json")
    for path in reversed(_config_last(list_folder(replaced))):
        path.rename(directory / path.name)
    discard(replaced)


def forget_replaced(directory: Path) -> None:
    """Deletes what was set aside: at the end of a stage, or earlier to make room for what it writes."""
    replaced = directory / REPLACED_FOLDER
    if replaced.is_dir():
        for path in _config_last(list_folder(replaced)):
            discard(path)
        discard(replaced)


def list_content(directory: Path) -> list[Path]:
    """What a stage has written, without locks and what was set aside."""
    return [p for p in list_folder(directory) if not p.name.startswith(".lock") and p.name != REPLACED_FOLDER]


def _config_last(paths: Iterable[Path]) -> list[Path]:
    """Sorted so that a kill in between never leaves a stage that looks finished: DONE.json first, config.json last."""
    return sorted(paths, key=lambda path: (path.name == "config.json", path.name != "DONE.json"))
