"""Standard streams as shells leave them: closed from the start, with nobody left who reads them, or on a disk that is full."""

import errno
import os
import sys
from typing import Any, TextIO

from concentration.errors import FULL_DISK, ConfigError

#: Of a write to a pipe whose reader is gone, and to a terminal that was closed.
_NOBODY_READS = (errno.EPIPE, errno.EIO)


def open_streams() -> None:
    """Opens what is closed (`>&-`) on nothing, and lets what is said on standard error outlive its reader and its disk.

    Progress and errors go there, and work of days must not end because nobody looks at them any more (`2>&1 | head`). Results
    go to standard output, and one that cannot be written is a mistake to tell.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = Telling(sys.stdout or os.fdopen(1, "w"))
    sys.stderr = Lasting(sys.stderr or os.fdopen(2, "w"))


class _Stream:
    """A stream that does something of its own where it cannot be written to."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._answer(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._answer(error)

    def _answer(self, error: OSError) -> None:
        raise NotImplementedError


class Lasting(_Stream):
    """A stream that is written nowhere from the moment on at which nobody reads it any more, or its disk is full."""

    def _answer(self, error: OSError) -> None:
        if error.errno not in (*_NOBODY_READS, *FULL_DISK):
            raise error
        turn_away(self._stream)


class Telling(_Stream):
    """A stream whose full disk ends the command with one line."""

    def _answer(self, error: OSError) -> None:
        if error.errno not in FULL_DISK:
            raise error
        turn_away(self._stream)
        raise ConfigError(
            f"standard output: {error.strerror}; free some, or send it elsewhere, and run again"
        ) from None


def turn_away(stream: TextIO) -> None:
    """From now on nothing is written, nor what waits to be: it would fail again when Python ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
