"""Processes that belong to others: how many there may be, and how they end."""

import atexit
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
from typing import NoReturn

from concentration.errors import ConfigError

#: Bytes of the folder for temporary files under which processes can still name sockets, of which Linux takes 108 in all.
_LONGEST_TEMPORARY = 70

#: What macOS gives at most.
_MOST_FILES = 10_240

#: With fewer, processes that read ahead lose batches.
_FEWEST_FILES = 256


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went: none must write beside the next run's.

    Also when the server is gone from which it was forked: its parent then takes it for dead.
    """
    server = os.getppid()

    def wait() -> None:
        parent = multiprocessing.parent_process()
        while parent.is_alive() and os.getppid() == server:
            parent.join(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end(code: int) -> NoReturn:
    """Ends this process; one of several ranks without taking the interpreter apart.

    Gloo's threads may let go of their last tensors only then, which aborts a rank that has finished (-6 in place of 0): one in
    thirty, and `destroy_process_group` does not end those threads once there was a DDP.
    """
    # Most verbs end without torch, whose import takes seconds.
    if "concentration.distributed" in sys.modules and sys.modules["concentration.distributed"].is_distributed():
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_surroundings() -> None:
    """Raises: ConfigError where this process was started in a folder that is gone, or temporary files have too long a name."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted; change to another one, and run the command again") from None
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_TEMPORARY:
        raise ConfigError(
            f"TMPDIR={folder}: {len(os.fsencode(folder))} bytes, and sockets there may have at most {_LONGEST_TEMPORARY}; "
            "set TMPDIR to a shorter path"
        )


def raise_file_limit() -> None:
    """Lets this process, and those that it starts, open as many files as it may.

    Those that read images hand over every tensor as a file of shared memory; where none can be opened the batch is lost, and
    training waits for it. 256 files (macOS) or 1,024 (most of Linux) are what a process has if it does not ask for more.

    Raises: ConfigError where too few may be opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if wanted < _FEWEST_FILES:
        raise ConfigError(
            f"a process may open {hard} files here (ulimit -Hn), expected at least {_FEWEST_FILES}: with fewer, training would "
            "wait for batches that cannot be handed over; start it from a shell without that limit"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_semaphores() -> None:
    """Raises: ConfigError where processes cannot be given a lock, each of which is a file of shared memory."""
    try:
        multiprocessing.get_context("fork").Lock()  # of which nobody else keeps track
    except OSError as error:
        raise ConfigError(
            f"/dev/shm: processes that read images need semaphores there, and none can be made ({error.strerror}); give more "
            "shared memory (docker run --shm-size=8g), or read in one process: trainer.num_workers=0, num_processes=1"
        ) from None


def count_cores() -> int:
    """Those that this process may use: a scheduler may have given it few of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
