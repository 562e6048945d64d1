"""torchrun for shared machines: hands SIGTERM to its processes, and ends with their exit code.

    python launch/torchrun/run.py [options of torchrun] -m concentration.cli student workdir=runs/eft

torchrun itself kills its processes 30 seconds after a signal unless told otherwise, and exits with 1 whatever they ended with:
a run that was preempted and is saved (75) could not be told from a bug.
"""

import os
import signal
import sys
from pathlib import Path

PREEMPTED, MISTAKE = 75, 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def forward(number: int, frame) -> None:
    """The processes agree at the end of a step, save, and exit with 75; how long that may take is the cluster's to say."""
    children = [int(child) for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]
    if not children:  # still waiting for the other machines: nothing has begun
        sys.exit(PREEMPTED)
    for child in children:
        os.kill(child, number)


def leave(number, frame) -> None:
    """While torch is imported, where an exception may be swallowed."""
    os._exit(PREEMPTED)


if __name__ == "__main__":
    for handled in SIGNALS:
        signal.signal(handled, leave)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    for handled in SIGNALS:
        signal.signal(handled, forward)
    try:
        # Without these three, whose handlers torchrun would replace.
        main(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        worst = max(codes, key=lambda code: {PREEMPTED: 0, MISTAKE: 1}.get(code, 2))
        if worst not in (PREEMPTED, MISTAKE):
            print(error, file=sys.stderr)
        sys.exit(worst if worst > 0 else 128 - worst)  # as a shell names the signal that killed it
