"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all of whose state lies in one directory.

There is no accounting (`sacct` needs a database daemon). The CPUs are made up, so that jobs start on any machine; no
cgroups are used, so none are needed. Debian: `apt-get install slurm-wlm munge`.
"""

import contextlib
import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

NODES = ("node1", "node2")
#: Jobs of `preemptible` make room for those of `urgent`: SIGTERM to their steps, and SIGKILL after the grace time.
PREEMPTIBLE, URGENT = "preemptible", "urgent"
GRACE_SECONDS = 30

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
REPOSITORY = Path(__file__).parents[2]

#: What a job can end with; `scontrol` shows others while it waits, runs or is on its way from one to another.
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}
)

# Daemons lie in sbin, which not every user has on the path.
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))


def missing_programs() -> list[str]:
    """The programs of SLURM and munge that this machine lacks; empty where a cluster can be started."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class SlurmCluster:
    """A cluster that runs; `environment` is what its commands need, and what its jobs inherit."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._configuration = directory / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen] = {}
        self._hastened: set[tuple[str, str]] = set()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # The jobs' `concentrate` and `python` are those that run the tests, on this checkout.
        self.environment: Mapping[str, str] = {
            **kept,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), _PATH)),
            "PYTHONPATH": str(REPOSITORY),
            "SLURM_CONF": str(self._configuration),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str | Path, timeout_seconds: float = 60) -> str:
        """The output of one of SLURM's commands, or of any other in the cluster's environment."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=timeout_seconds,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """The id of the job of `sbatch ARGUMENTS`; its log lies beside the daemons' where none is asked for."""
        return (
            self.run("sbatch", "--parsable", f"--output={self.directory}/job-%A_%a.log", *arguments)
            .strip()
            .partition(";")[0]
        )

    def describe(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, NodeList, Reason and the rest."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.describe(job)["JobState"]

    def wait_until(self, condition: Callable[[], object], what: str, timeout_seconds: float = 60) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout_seconds} s\n{self._show()}"
            time.sleep(0.1)

    def wait_for_state(self, job: str, *states: str, timeout_seconds: float = 60) -> str:
        """Waits until the job is in one of the states, and gives it."""
        self.wait_until(lambda: self.state(job) in states, f"job {job} {'|'.join(states)}", timeout_seconds)
        return self.state(job)

    def wait_for_end(self, job: str, timeout_seconds: float = 300) -> dict[str, str]:
        """Waits until the job has ended; a job that was requeued starts again soon."""

        self.wait_until(lambda: self.start_soon(job)["JobState"] in ENDED, f"the end of job {job}", timeout_seconds)
        return self.describe(job)

    def start_soon(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, which, where it was requeued, now waits for two seconds instead of two minutes.

        NOTE: not for none: a node refuses a job's credential in the second in which it was revoked.
        """
        described = self.describe(job)
        start = (job, described["Restarts"])
        if described["JobState"] == "PENDING" and described["Reason"] == "BeginTime" and start not in self._hastened:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            self._hastened.add(start)
        return described

    def start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for name in ("state", *NODES):
            (self.directory / name).mkdir()
        self._configuration.write_text(self._configure(self.directory / "munge.socket", *_free_ports(1 + len(NODES))))
        self._start_daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.directory}/munge.socket",
            f"--pid-file={self.directory}/munged.pid", f"--seed-file={self.directory}/munge.seed",
            f"--log-file={self.directory}/munged.log",
        )  # fmt: skip
        self.wait_until((self.directory / "munge.socket").exists, "munged's socket", 10)
        self._start_daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_until(self._are_nodes_idle, "two idle nodes", 30)

    def start_node(self, node: str) -> None:
        self._start_daemon("slurmd", "-D", "-N", node, name=node)

    def start_controller(self) -> None:
        self._start_daemon("slurmctld", "-D")

    def kill(self, daemon: str) -> None:
        """`slurmctld`, or a node's daemon, is gone without a word; the processes of jobs are not."""
        self._daemons[daemon].kill()
        self._daemons[daemon].wait()

    def lose_node(self, node: str) -> None:
        """A node is gone with all that runs on it, in one moment: none sees another die and tells SLURM."""
        self.kill(node)
        lost = [
            process.number
            for process in _list_processes()
            if process.environment.get("SLURMD_NODENAME") == node or str(self.directory / node) in process.directory
        ]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in lost:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    def node_state(self, node: str) -> set[str]:
        """What `scontrol` says of a node: IDLE, MIXED, ALLOCATED or DOWN, and DRAIN, COMPLETING, NOT_RESPONDING beside it.

        NOTE: `sinfo` shows one of them alone, and of a node that is down and had jobs not that it is down.
        """
        [state] = re.findall(r"State=(\S+)", self.run("scontrol", "--oneliner", "show", "node", node))
        return set(state.split("+"))

    def nodes_of(self, job: str) -> list[str]:
        described = self.describe(job)["NodeList"]
        return [node for node in NODES if node in described or "[1-2]" in described]

    def find_processes(self, job: str) -> list[int]:
        """The Python processes of a job's steps, on all nodes."""
        number = self.describe(job)["JobId"]
        return [
            process.number
            for process in _list_processes()
            if process.program.startswith("python")
            and process.environment.get("SLURM_JOB_ID") == number
            and "SLURM_PROCID" in process.environment
        ]

    def stop(self) -> None:
        """Ends all jobs, then the daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            for options in (["--signal=KILL", "--full"], []):
                self.run("scancel", *options, f"--user={getpass.getuser()}", timeout_seconds=10)
            self.wait_until(lambda: not self.run("squeue", "--noheader").strip(), "an empty queue", 20)
        for name in reversed(self._daemons):
            self._daemons[name].send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _are_nodes_idle(self) -> bool:
        states = subprocess.run(
            ["sinfo", "--noheader", "--Node", f"--partition={URGENT}", "--format=%T"],
            env=self.environment, text=True, capture_output=True,
        ).stdout.split()  # fmt: skip
        return states == ["idle"] * len(NODES)

    def _start_daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        name = name or program
        with open(self.directory / f"{name}.output", "a") as output:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(program, path=_PATH), *arguments],
                env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at the tests is not for the daemons
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _configure(self, munge_socket: Path, controller_port: int, *node_ports: int) -> str:
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=64000"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        return f"""\
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={self.directory}/state
SlurmdSpoolDir={self.directory}/%n
SlurmctldPidFile={self.directory}/slurmctld.pid
SlurmdPidFile={self.directory}/%n.pid
SlurmctldLogFile={self.directory}/slurmctld.log
SlurmdLogFile={self.directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# The nodes have as many CPUs as is said here, not as the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# Between SIGTERM and SIGKILL at a time limit.
KillWait=30
OverTimeLimit=0
SlurmdTimeout=20
ReturnToService=2
{nodes}
PartitionName={PREEMPTIBLE} Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS} State=UP
PartitionName={URGENT} Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""

    def _show(self) -> str:
        """What there is to see when something did not happen."""
        logs = [*self.directory.glob("*.log"), *self.directory.glob("*.output")]
        tails = [f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs]
        queue = subprocess.run(["squeue", "--long"], env=self.environment, text=True, capture_output=True).stdout
        return "\n".join((queue, *tails))


@contextlib.contextmanager
def running_cluster(directory: Path) -> Iterator[SlurmCluster]:
    """A cluster that has started, and that is stopped at the end whatever happened."""
    cluster = SlurmCluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class _Process(NamedTuple):
    number: int
    program: str
    directory: str
    environment: dict[str, str]


def _list_processes() -> Iterator[_Process]:
    """All of this machine that may be looked at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (pair.partition("=") for pair in (folder / "environ").read_text(errors="replace").split("\0"))
            program, directory = (os.readlink(folder / name) for name in ("exe", "cwd"))
            yield _Process(int(folder.name), Path(program).name, directory, {k: v for k, _, v in pairs})
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def _end_with_parent() -> None:
    """Tests that are killed leave no daemons behind; only Linux has SLURM, and this."""
    set_signal_at_death_of_parent = 1
    ctypes.CDLL(None).prctl(set_signal_at_death_of_parent, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
