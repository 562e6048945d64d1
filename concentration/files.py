"""Files that are written whole or not at all: after a crash there is the old file or the new one, never half of one.

And whether a file is still the one that was written.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from concentration.errors import DataError
from concentration.temporaries import name_temporary


def write_atomically(path: Path, content: bytes | memoryview | str | Mapping) -> None:
    """Writes bytes, text, or a mapping as JSON."""
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on leaving, that file is synced to disk and renamed to `path`.

    Raises:
        DataError: it cannot be written; the old file is left as it was.
    """
    temporary = name_temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_be_written(path, error) from None
        raise


def append_text(path: Path, text: str) -> None:
    """Appends text to a file; unlike the others, this is not atomic.

    Raises:
        DataError: it cannot be written; part of the text may have been.
    """
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def hash_file(path: Path) -> str:
    """A hash of a file's content; 16 hex digits of SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_unchanged(path: Path, expected: str | None, since: str) -> None:
    """Raises: DataError where a file is not there, or does not have this hash; `since` says what made it, and what to do."""
    if not path.exists() or hash_file(path) != expected:
        raise DataError(f"{path}: missing or changed since {since}")


def _cannot_be_written(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(f"{path}: cannot be written ({reason}); free space or correct the permissions")
