"""torchrun for shared machines: hands SIGTERM to its processes, ends with their exit code, and lets machines come and go.

    python launch/torchrun/run.py [options of torchrun] -m concentration.cli student workdir=runs/eft

torchrun itself kills its processes 30 seconds after a signal unless told otherwise, and exits with 1 whatever they ended with:
a run that was preempted and is saved (75) could not be told from a bug. With `--nnodes=1:4`, a machine that starts later joins
the others, and of machines that are stopped the others go on without them.
"""

import os
import signal
import sys
import time
from pathlib import Path

PREEMPTED, MISTAKE = 75, 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

#: The signal that asked this machine to stop, and the exit codes with which its processes ended last.
told = 0
codes: list[int] = []


def forward(number: int, frame) -> None:
    """The processes agree at the end of a step, save, and exit with 75; how long that may take is the cluster's to say."""
    global told
    told = number
    children = [int(child) for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]
    if not children:  # still waiting for the other machines: nothing has begun
        sys.exit(PREEMPTED)
    for child in children:
        os.kill(child, number)


def handle_signals(handler) -> None:
    for number in SIGNALS:
        # `nohup` has SIGHUP ignored, and means it.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number, frame) -> None:
    """While torch is imported, where an exception may be swallowed."""
    os._exit(PREEMPTED)


def worst() -> int:
    """The exit code that says most; that of a signal as a shell names it."""
    code = max(codes, key=lambda code: {PREEMPTED: 0, MISTAKE: 1}.get(code, 2))
    return code if code > 0 else 128 - code


def let_machines_come_and_go() -> None:
    """When all processes have stopped and saved, the machine that was asked to leaves, and the others start anew without it."""
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # NOTE: else torch 2.14's agents keep one store, and a machine that joins later asks it in vain for an address:
    # `next_rendezvous` publishes it in the first round alone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    monitor = LocalElasticAgent._monitor_workers

    def monitor_and_decide(agent, group):
        result = monitor(agent, group)
        while told and result.state == WorkerState.HEALTHY:  # else it would go along with those that start anew
            time.sleep(0.1)
            result = monitor(agent, group)
        if result.is_failed():
            codes[:] = [failure.exitcode for failure in result.failures.values()]
            if told:  # NOTE: any other exception would close the rendezvous for the machines that stay
                raise SignalException("this machine leaves", signal.Signals(told))
            agent._remaining_restarts = int(worst() == PREEMPTED)
        return result

    LocalElasticAgent._monitor_workers = monitor_and_decide


def run(arguments: list[str]) -> int:
    """The exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.run import main, parse_args, parse_min_max_nnodes

    handle_signals(forward)
    options = parse_args(arguments)
    fewest, most = parse_min_max_nnodes(options.nnodes)
    if fewest < most:
        let_machines_come_and_go()
    try:
        main(arguments)
    except ChildFailedError as error:
        codes[:] = [failure.exitcode for failure in error.failures.values()]
        if worst() not in (PREEMPTED, MISTAKE):
            print(error, file=sys.stderr)
        return worst()
    except SignalException:
        if not told:
            raise
        return worst()
    # The two below are no mistakes (2): the other machines may still be on their way, and another try may meet them.
    except RendezvousTimeoutError:
        print(
            f"fewer than {fewest} machines met at {options.rdzv_endpoint}: start the same line on each of them; "
            "PET_RDZV_CONF=join_timeout=SECONDS waits longer than 600",
            file=sys.stderr,
        )
        return worst() if codes else 1  # of processes that had stopped, for a machine that left or that joined
    except RendezvousConnectionError:
        if not codes:
            print(
                f"nobody answers at {options.rdzv_endpoint}, where the machines are to meet: HOST:PORT of the first of them, on "
                "which the same line must run",
                file=sys.stderr,
            )
            return 1
        if worst() != PREEMPTED:
            raise
        print("the machine at which all meet has gone; what is done is saved: start it again", file=sys.stderr)
        return PREEMPTED
    return 0


if __name__ == "__main__":
    handle_signals(leave)
    # Without those above, whose handlers torchrun would replace.
    sys.exit(run(["--signals-to-handle=SIGQUIT", *sys.argv[1:]]))
