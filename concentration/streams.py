"""Standard streams as shells leave them: closed from the start, with nobody left who reads them, or on a disk that is full."""

import contextlib
import errno
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TextIO

from concentration.errors import FULL_DISK, ConfigError

#: Of a write to a pipe whose reader is gone, and to a terminal that was closed.
_NOBODY_READS = (errno.EPIPE, errno.EIO)


def open_streams() -> None:
    """Opens what is closed (`>&-`) on nothing, and lets what a command does outlive those who read of it.

    Work of days must not end because nobody looks at it any more (`| head`, `2>&1 | head`). Progress and errors go to standard
    error, and outlive its disk, too; results go to standard output, and one that cannot be written is a mistake to tell.

    Called again in the same process, it changes nothing.
    """
    if isinstance(sys.stdout, _Standard):
        return
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = _Standard(sys.stdout or os.fdopen(1, "w"), outlives=_NOBODY_READS)
    sys.stderr = _Standard(sys.stderr or os.fdopen(2, "w"), outlives=(*_NOBODY_READS, *FULL_DISK))


@contextlib.contextmanager
def ending_with_reader() -> Iterator[TextIO]:
    """Standard output for what is done for its reader alone, and ends, without a word, when nobody reads it any more."""
    stream = _Standard(sys.stdout.stream if isinstance(sys.stdout, _Standard) else sys.stdout, outlives=())
    with contextlib.suppress(_Unread):
        yield stream
        stream.flush()


class _Unread(Exception):
    """Nobody reads. NOTE: no BrokenPipeError, of which rich makes a `sys.exit(1)`."""


class _Standard:
    """A standard stream that is written nowhere from the first of the errors that it `outlives` on; others end the command."""

    def __init__(self, stream: TextIO, outlives: Collection[int]):
        self.stream = stream
        self._outlives = outlives

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._answer(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._answer(error)

    def _answer(self, error: OSError) -> None:
        if error.errno not in (*_NOBODY_READS, *FULL_DISK):
            raise error
        self._turn_away()
        if error.errno in self._outlives:
            return
        if error.errno in _NOBODY_READS:
            raise _Unread from None
        raise ConfigError(
            f"standard output: {error.strerror}; free some, or send it elsewhere, and run again"
        ) from None

    def _turn_away(self) -> None:
        """From now on nothing is written, nor what waits to be: it would fail again when Python ends."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())
        os.close(nothing)
