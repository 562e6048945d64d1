"""What happens to jobs on a cluster, each as something that a test can do to a job that runs."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.slurm_cluster import URGENT, SlurmCluster


@dataclass(frozen=True)
class Victim:
    """A job of a pipeline that runs.

    number: SLURM's name of it, "12" or "12_3".
    directory: of its stage.
    rng: chooses between its processes.
    """

    slurm: SlurmCluster
    number: str
    directory: Path
    rng: random.Random

    @property
    def node(self) -> str:
        """One of its nodes."""
        return self.rng.choice(self.slurm.nodes_of(self.number))

    def signal_a_process(self, number: int) -> bool:
        """Sends a signal to one of its Python processes, where it has one yet."""
        found = self.slurm.find_processes(self.number)
        if found:
            os.kill(self.rng.choice(found), number)
        return bool(found)


@dataclass(frozen=True)
class Fault:
    """`inject` does it to a job; `is_gentle`: the job is asked to stop, and has time to save.

    needs_ranks: makes sense for jobs of several processes alone.
    """

    name: str
    inject: Callable[[Victim], object]
    is_gentle: bool = False
    needs_ranks: bool = False


def preempt(victim: Victim) -> None:
    """Partition priority: SIGTERM to the steps, and SIGKILL after the grace time."""
    urgent = victim.slurm.submit(f"--partition={URGENT}", "--nodes=2", "--exclusive", "--wrap=true")
    victim.slurm.wait_for_end(urgent)


def send(*names: str) -> Callable[[Victim], None]:
    """Signals to the steps, by `scancel`."""

    def inject(victim: Victim) -> None:
        for name in names:
            victim.slurm.run("scancel", f"--signal={name}", victim.number)

    return inject


def requeue(victim: Victim) -> None:
    victim.slurm.run("scontrol", "requeue", victim.number)


def drain_node(victim: Victim) -> None:
    """Nothing more starts on a node, and what runs there is moved away."""
    node = victim.node
    victim.slurm.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    requeue(victim)
    time.sleep(5)
    victim.slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def restart_slurmd(victim: Victim) -> None:
    """The daemon alone: jobs do not notice."""
    node = victim.node
    victim.slurm.kill(node)
    time.sleep(2)
    victim.slurm.start_node(node)


def restart_slurmctld(victim: Victim) -> None:
    victim.slurm.kill("slurmctld")
    time.sleep(2)
    victim.slurm.start_controller()


def lose_node(victim: Victim) -> None:
    """A machine loses power, SLURM notes it by itself, and the machine comes back."""
    node = victim.node
    victim.slurm.lose_node(node)
    try:
        victim.slurm.wait_until(lambda: "DOWN" in victim.slurm.node_state(node), f"{node} is down", 120)
    finally:
        victim.slurm.start_node(node)
    victim.slurm.wait_until(lambda: "DOWN" not in victim.slurm.node_state(node), f"{node} is back")


def kill_and_cut_checkpoint(victim: Victim) -> None:
    """As if the machine had lost what it had not yet written."""
    if victim.signal_a_process(signal.SIGKILL):
        time.sleep(1)
        for path in sorted((victim.directory / "checkpoints").glob("*.ckpt"))[-1:]:
            os.truncate(path, path.stat().st_size // 2)


def meet_time_limit(victim: Victim) -> None:
    """The job has a minute in all from now on, and is told so before; the next start has ten."""
    restarts = victim.slurm.describe(victim.number)["Restarts"]
    victim.slurm.run("scontrol", "update", f"JobId={victim.number}", "TimeLimit=1")
    victim.slurm.wait_until(lambda: victim.slurm.describe(victim.number)["Restarts"] != restarts, "a restart", 180)
    victim.slurm.run("scontrol", "update", f"JobId={victim.number}", "TimeLimit=10")


#: SLURM looks at limits once a minute at most: too slow for jobs that nothing holds up.
TIME_LIMIT = Fault("its time is up", meet_time_limit, is_gentle=True)
FAULTS = (
    Fault("makes room for an urgent job", preempt, is_gentle=True),
    Fault("SIGTERM", send("TERM"), is_gentle=True),
    Fault("SIGUSR1, as before a time limit", send("USR1"), is_gentle=True),
    Fault("SIGUSR1, then SIGTERM twice", send("USR1", "TERM", "TERM"), is_gentle=True),
    Fault("a process is killed, as for want of memory", lambda victim: victim.signal_a_process(signal.SIGKILL)),
    Fault("a process is killed, and the newest checkpoint cut in half", kill_and_cut_checkpoint),
    Fault("a process of two hangs", lambda victim: victim.signal_a_process(signal.SIGSTOP), needs_ranks=True),
    Fault("scontrol requeue", requeue),
    Fault("scancel", lambda victim: victim.slurm.run("scancel", victim.number)),
    Fault("its node is drained", drain_node),
    Fault("its node loses power", lose_node),
    Fault("slurmd is killed and started again", restart_slurmd),
    Fault("slurmctld is killed and started again", restart_slurmctld),
)
