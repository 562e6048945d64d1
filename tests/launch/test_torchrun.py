"""`launch/torchrun/` on CPUs: signals reach the processes, and their exit codes come back; two starts play two machines."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.pipelines import assert_each_sample_once, recording
from real_runs import TINY, Running, load_json, load_taken, prepare_shards

LAUNCH = Path(__file__).parents[2] / "launch/torchrun"
#: Long enough for a machine to join and leave.
NUM_EPOCHS = 40


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("torchrun"))


def start_student(workdir: Path, name: str, *options: str, **environment: str) -> subprocess.Popen:
    arguments = [f"workdir={workdir}", f"name={name}", "targets=labels", "trainer=cpu", *TINY, *options]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [LAUNCH / "student.sh", *arguments],
        cwd=workdir.parent, env={**os.environ, "PATH": path, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Where these tests were started by nohup, SIGHUP is ignored, also by what they start.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(condition, *processes: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)


def has_trained(run_path: Path) -> bool:
    metrics = run_path / "metrics.jsonl"
    return metrics.exists() and "train/loss" in metrics.read_text()


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_without_nvidia_smi_the_number_of_gpus_is_asked_for(workdir, tmp_path):
    running = start_student(workdir, "uncounted", PATH="/usr/bin:/bin")
    message = running.communicate(timeout=300)[1]
    assert running.returncode == 2
    assert "give their number, GPUS=8" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("wrong", [{"GPUS": "0"}, {"GPUS": "all"}, {"NODES": "two"}, {"NODES": "1:"}])
def test_wrong_numbers_of_gpus_or_machines_are_one_line(workdir, wrong):
    running = start_student(workdir, "wrong", **{"GPUS": "1", **wrong})
    message = running.communicate(timeout=300)[1]
    assert running.returncode == 2
    assert " ".join(f"{key}={value}" for key, value in wrong.items()) in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("host", ["localhost", "no-such-host"])
def test_machines_that_do_not_meet_are_told_where_and_another_try_may_meet_them(workdir, host):
    head, waiting = f"{host}:{find_free_port()}", "join_timeout=2,read_timeout=2"
    running = start_student(workdir, "alone", GPUS="1", NODES="2", HEAD=head, PET_RDZV_CONF=waiting)
    message = running.communicate(timeout=300)[1]
    assert running.returncode == 1
    assert f"at {head}" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_saves_and_ends_it_with_75(workdir, number):
    """torchrun alone would end with 1, and of a closed terminal with a traceback."""
    head = f"localhost:{find_free_port()}"
    run_path = workdir / f"students/stopped-{number}"
    running = start_student(workdir, run_path.name, "trainer.max_epochs=500", GPUS="1", HEAD=head)
    wait_for(lambda: has_trained(run_path), running)
    running.send_signal(number)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 75, err
    assert "which is saved" in err
    assert "Traceback" not in err
    assert list((run_path / "checkpoints").glob("*.ckpt"))


def test_a_mistake_ends_it_with_2(workdir):
    running = start_student(workdir, "wrong", "trainer.batch_sise=3", GPUS="1", HEAD=f"localhost:{find_free_port()}")
    _, err = running.communicate(timeout=300)
    assert running.returncode == 2, err
    assert "batch_size" in err


@pytest.mark.long
def test_two_machines_of_which_one_is_stopped_save_and_both_end_with_75_and_go_on(workdir):
    run_path = workdir / "students/two"
    for turn in ("stopped", "finished"):
        head = f"localhost:{find_free_port()}"
        options = ("trainer.num_nodes=2", "trainer.max_epochs=40")
        machines = [start_student(workdir, "two", *options, GPUS="1", NODES="2", HEAD=head) for _ in range(2)]
        if turn == "stopped":
            wait_for(lambda: has_trained(run_path), *machines)
            machines[1].send_signal(signal.SIGTERM)
        ends = [machine.communicate(timeout=200) for machine in machines]
        assert [machine.returncode for machine in machines] == [75 if turn == "stopped" else 0] * 2, ends
    assert load_json(run_path / "DONE.json")["step"] == 520


@pytest.mark.long
def test_a_machine_joins_a_student_that_runs_and_leaves_it_again_and_every_step_has_its_samples(workdir):
    """`NODES=1:2`: the first trains alone, then both, then the first alone; no sample is lost and none comes twice."""
    options = ("trainer.devices=auto", "trainer.num_nodes=auto", f"trainer.max_epochs={NUM_EPOCHS}")
    records, expected = workdir / "records", workdir / "expected"
    settings = {
        "GPUS": "1", "NODES": "1:2", "HEAD": f"localhost:{find_free_port()}", "PET_RDZV_CONF": "last_call_timeout=2",
        **recording(records, "students-elastic:30"),
    }  # fmt: skip
    first = start_student(workdir, "elastic", *options, **settings)
    try:
        wait_for((records / "held-students-elastic-0").exists, first, seconds=300)
        assert count_starts(records) == 1
        second = start_student(workdir, "elastic", *options, **settings)  # for which the first leaves its step 30
        wait_for(lambda: count_starts(records) == 3, first, second, seconds=300)
        second.send_signal(signal.SIGTERM)
        _, err = second.communicate(timeout=120)
        assert second.returncode == 75, err
        assert not (workdir / "students/elastic/DONE.json").exists()
        _, err = first.communicate(timeout=400)
        assert first.returncode == 0, err
    finally:
        first.terminate()
    assert count_starts(records) == 4
    command = ("student", f"workdir={workdir}", "name=alone", "targets=labels", *TINY, options[-1])
    assert Running(command, workdir, recording(expected)).wait(400).code == 0
    taken, wanted = load_taken(records, "students-elastic"), load_taken(expected, "students-alone")
    assert len(taken[29]) == 1
    assert max(map(len, taken.values())) == 2, "steps of two machines"
    assert len(taken[len(taken) - 1]) == 1
    assert_each_sample_once(taken, wanted, NUM_EPOCHS, may_repeat=False)


def count_starts(records: Path) -> int:
    """Of processes that came to a step."""
    return len([path for path in records.glob("students-elastic-*") if path.read_text()])


@pytest.mark.parametrize("when", ["torch is imported", "another machine is waited for"])
def test_a_signal_while(workdir, when):
    port = find_free_port()
    running = start_student(workdir, "alone", GPUS="1", NODES="2", HEAD=f"localhost:{port}")
    if when == "torch is imported":
        wait_for(lambda: catches(running.pid, signal.SIGTERM), running)
    else:
        wait_for(lambda: is_open(port), running)
        time.sleep(1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=300)
    assert running.returncode == 75


def catches(process: int, number: int) -> bool:
    [mask] = [line.split()[1] for line in Path(f"/proc/{process}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0
