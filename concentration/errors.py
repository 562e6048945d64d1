"""What can go wrong that is not a bug here: each error is one clear line and an exit code."""

import contextlib
import errno
from collections.abc import Iterator

#: The numbers of a system's errors: of a disk that is full, or of a user's share of one.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class ConcentrationError(Exception):
    """Base of the errors that a user can act on: the message says what was found, what was expected, where, and what to do."""

    exit_code = 2


class ConfigError(ConcentrationError):
    """The configuration is wrong, or does not fit what is already on disk."""


class Busy(ConfigError):
    """Another process works in the same directory."""


class DataError(ConcentrationError):
    """A file (shard, index, taxonomy, target, checkpoint) is not what it should be."""


def unreadable(path: object, error: OSError) -> DataError:
    """The error for a file or folder that exists but cannot be read."""
    advice = "bring it back"
    if isinstance(error, PermissionError):
        advice = "correct its permissions"
    elif isinstance(error, IsADirectoryError):
        advice = "give a file"
    return DataError(f"{path}: cannot be read ({error.strerror}); {advice}")


def unloadable(library: str, error: ImportError, packages: str) -> ConfigError:
    """The error for a library that is not installed, or was built for another processor or Python, as in a copied environment."""
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(f"{library} is not installed; pip install {packages}")
    return ConfigError(
        f"{library} cannot be loaded ({one_line(error)}); here, pip install --force-reinstall {packages}"
    )


def one_line(error: BaseException) -> str:
    """The text of an error on one line, at most 300 characters of it, to be quoted in a message."""
    return " ".join(str(error).split())[:300]


class DivergedError(ConcentrationError):
    """Training reached a loss that is not finite; the last good checkpoint is kept."""


class Preempted(ConcentrationError):
    """The process was asked to stop, has saved its state, and should be started again."""

    exit_code = 75


@contextlib.contextmanager
def naming_refusals() -> Iterator[None]:
    """Names a full disk and a file that may not be used, where who asks does not, and a machine or a GPU without memory left.

    Raises: DataError, ConfigError in place of what Python or torch raises.
    """
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or "a file"
        if isinstance(error, PermissionError) and error.filename is not None:
            raise DataError(f"{place}: cannot be used ({error.strerror}); correct its permissions") from None
        if error.errno not in FULL_DISK:
            raise
        raise DataError(
            f"{place}: cannot be written ({error.strerror}); free space, and run the same command again"
        ) from None
    except Exception as error:
        # NOTE: torch's error is known by its name, as importing torch takes seconds; on a CPU it is a plain RuntimeError.
        said = str(error).partition("\n")[0]
        is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (is_full or "can't allocate memory" in said):
            raise
        raise ConfigError(
            f"memory is full ({said[:200] or type(error).__name__}); lower trainer.batch_size or batch_size, raise "
            "trainer.accumulate, or take a smaller network or data.image_size; `concentrate student plan=true` says what a "
            "step takes"
        ) from None
