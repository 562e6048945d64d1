"""What the command `concentrate` calls: the command line, with Ctrl-C one line while it is imported, too."""

import contextlib
import os
import signal
from typing import NoReturn


def main() -> None:
    """Exits as `cli.main`."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:  # not where it is ignored: in the background, say
        signal.signal(signal.SIGINT, _end)
    from concentration import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


def _end(number: int, frame) -> NoReturn:
    """NOTE: no exception, of which compiled libraries make another one while they are imported."""
    with contextlib.suppress(OSError):
        os.write(2, b"concentrate: stopped from the keyboard\n")
    os._exit(128 + number)
