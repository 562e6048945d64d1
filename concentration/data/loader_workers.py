"""The processes that read ahead: how they start, how they end, and what becomes of a batch that they cannot hand over."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import signal

import torch

from concentration.errors import ConfigError

_SHARED_MEMORY = "/dev/shm"


def start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # NOTE: Python's own prints a traceback and drops the batch, for which training would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error


def kill(workers: set[multiprocessing.Process]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take the end of a worker for an accident
    for worker in workers:
        worker.kill()


def _hand_over_error(queue: multiprocessing.queues.Queue, error: Exception, handed: tuple[int, object]) -> None:
    """Puts an error in the place of a batch, whose tensors go by shared memory: 64 MiB are all that a Docker container has."""
    number, _ = handed
    reason = str(error).partition("\n")[0] or type(error).__name__
    room = ""
    if os.path.isdir(_SHARED_MEMORY):
        found = os.statvfs(_SHARED_MEMORY)
        room = f" {_SHARED_MEMORY} has {found.f_frsize * found.f_blocks / 2**20:,.3g} MiB, and"
    told = ConfigError(
        f"a batch cannot be handed over by the processes that read ahead ({reason});{room} each of them "
        "takes up to four batches of shared memory: give more (docker run --shm-size=8g), or lower trainer.num_workers (0 needs "
        "none) or the batch"
    )
    with contextlib.suppress(ValueError):  # the queue is closed: another process has told it, and nobody waits any more
        queue.put((number, told))
