"""The worker processes of a loader: how they start, how they end, and how they report a batch that they cannot hand over."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import signal

import torch

from concentration.errors import ConfigError

_SHARED_MEMORY = "/dev/shm"


def start_worker(_: int) -> None:
    """Prepares a new worker process."""
    torch.set_num_threads(1)
    # NOTE: Python's default handler prints a traceback and drops the batch, and training would wait for that batch for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error


def kill(workers: set[multiprocessing.Process]) -> None:
    """Ends the workers at once, whatever they do."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the end of a worker as a failure
    for worker in workers:
        worker.kill()


def _hand_over_error(queue: multiprocessing.queues.Queue, error: Exception, handed: tuple[int, object]) -> None:
    """Hands over an error in place of a batch. The usual cause is shared memory, through which the tensors of a batch travel: a
    Docker container has 64 MiB of it by default."""
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
    with contextlib.suppress(ValueError):  # a closed queue: another worker has reported it, and nobody waits any more
        queue.put((number, told))
