"""A lock on a directory, or on a part of the work in it, that a killed process lets go of."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from concentration.errors import Busy, ConfigError


@contextlib.contextmanager
def locking(directory: Path, name: str, wait_seconds: float = 0) -> Iterator[None]:
    """Holds a directory, which is made where it is not there, against other processes.

    Raises:
        Busy: another process holds it, after having waited for so long.
        ConfigError: it cannot be made, written to or locked.
    """
    deadline = time.monotonic() + wait_seconds
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be made ({error.strerror}); give another workdir, or correct its permissions"
        ) from None
    try:
        file = open(directory / name, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be written to ({error.strerror}); give another workdir, or correct its permissions"
        ) from None
    with file:
        while True:
            try:
                # NOTE: not flock: a killed run's reading processes would go on holding it, for the seconds until they notice.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Busy(f"{directory}: another process works here; wait for it or end it") from None
                time.sleep(0.05)
            except OSError as error:
                raise ConfigError(
                    f"{directory}: cannot be locked ({error.strerror}); give a workdir on a file system with file locks"
                ) from None
        yield  # released when the file is closed, also by kill -9


def is_locked(directory: Path, name: str) -> bool:
    """Whether another process holds this lock. Not to be asked by one that holds it itself: it would lose it."""
    try:
        with locking(directory, name):
            return False
    except Busy:
        return True
