"""What is being written lies beside its place until it is whole, as `.NAME.PROCESS.tmp`; a killed process leaves it there."""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

#: Nobody is at one file for so long.
ABANDONED_SECONDS = 3600.0

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp", re.DOTALL)


def name_temporary(path: Path) -> Path:
    """Where this process writes what is to take the place of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clear_temporaries(folder: Path, name: str | None = None, least_age_seconds: float = ABANDONED_SECONDS) -> None:
    """Deletes what killed processes have left in a folder of files, or folders, of this name; of all where none is given.

    Who alone writes them, by holding a lock, gives a `least_age_seconds` of 0; others leave what may be being written.
    """
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process clears, too
            if time.time() - path.stat().st_mtime >= least_age_seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
