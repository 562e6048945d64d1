"""In which state a stage is, from every combination of what its files and SLURM's queue say."""

import os
import socket
import time
from pathlib import Path

import pytest

from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.pipeline.records import JobRecord, JobRecords, load_records
from concentration.pipeline.slurm_queue import QueuedJob
from concentration.pipeline.states import find_states
from concentration.pipeline.status import StatusConfig, status
from concentration.progress import load_status

NOT_A_PROCESS = 2**22 + 1


def write_status(
    directory: Path, state: str, process: int | None = None, host: str | None = None, updated=None
) -> None:
    now = time.time()
    status = {"title": "x", "state": state, "done": 20, "total": 100, "unit": "steps", "per_second": 4.0, "text": "",
              "process": os.getpid() if process is None else process, "host": host or socket.gethostname(),
              "started": now, "updated": updated or now}  # fmt: skip
    write_atomically(directory / "status.json", status)


def state_of(workdir: Path, queue: dict | None = None, slurm_id: str | None = None, submitted: float = 0.0):
    record = JobRecord(directory=Path("students/x"), file_name="student-x", proof="DONE.json", after=(),
                       slurm_id=slurm_id, submitted=submitted)  # fmt: skip
    return find_states(workdir, JobRecords(user="me", jobs={"student x": record}), queue or {})["student x"]


def test_a_running_stage_has_a_rate_and_the_time_left(tmp_path):
    write_status(tmp_path / "students/x", "running")
    state = state_of(tmp_path)
    assert (state.state, state.amount, state.rate, state.left) == ("running", "20/100 steps", "4.0 steps/s", "00:00:20")


@pytest.mark.parametrize(("code", "is_refused"), [(2, True), (1, False)])
def test_what_is_done_is_done_unless_a_later_run_of_it_failed(tmp_path, code, is_refused):
    """And where that was refused, a run that waits for it hears of it, but what was done is untouched."""
    write_atomically(tmp_path / "students/x/DONE.json", {"config": "0"})
    assert state_of(tmp_path).state == "done"
    write_atomically(tmp_path / "jobs/student-x.exit", f"{code}\n")
    os.utime(tmp_path / "students/x/DONE.json", (1, 1))
    assert (state_of(tmp_path).state, state_of(tmp_path).is_refused) == ("failed", is_refused)
    (tmp_path / "students/x/DONE.json").unlink()
    assert (state_of(tmp_path).state, state_of(tmp_path).is_refused) == ("failed", False)


def test_a_failed_job_says_why_in_its_own_words(tmp_path):
    write_atomically(tmp_path / "jobs/student-x.exit", "2\n")
    write_atomically(
        tmp_path / "jobs/student-x.log", "concentrate: the loss is not finite\nsrun: error: task 0: Exited\n"
    )
    assert state_of(tmp_path) == state_of(tmp_path, {}, "7", 1.0)
    assert (state_of(tmp_path).state, state_of(tmp_path).why) == ("failed", "the loss is not finite")


def test_a_saved_job_is_preempted_here_and_in_the_queue(tmp_path):
    write_status(tmp_path / "students/x", "stopped")
    write_atomically(tmp_path / "jobs/student-x.exit", "75\n")
    assert state_of(tmp_path).state == "preempted"
    waiting = {"7": QueuedJob("PENDING", "BeginTime")}
    assert (state_of(tmp_path, waiting, "7", 1.0).state, state_of(tmp_path, waiting, "7", 1.0).why) == (
        "preempted",
        "BeginTime",
    )
    # Submitted after that, it has not begun anew.
    assert state_of(tmp_path, waiting, "7", time.time() + 60).state == "waiting"


def test_a_process_that_is_gone_without_a_word_has_failed(tmp_path):
    write_status(tmp_path / "students/x", "running", NOT_A_PROCESS)
    assert state_of(tmp_path).state == "failed"
    assert "without a word" in state_of(tmp_path).why


def test_a_process_of_another_machine_counts_by_its_last_sign_of_life(tmp_path):
    write_status(tmp_path / "students/x", "running", NOT_A_PROCESS, "elsewhere")
    assert state_of(tmp_path).state == "running"
    write_status(tmp_path / "students/x", "running", NOT_A_PROCESS, "elsewhere", updated=time.time() - 3600)
    assert state_of(tmp_path).state == "failed"


def test_a_job_that_slurm_killed_says_how_it_ended(tmp_path):
    write_atomically(tmp_path / "jobs/student-x.log", "student: 20/100\nsrun: error: task 0: Out Of Memory\n")
    state = state_of(tmp_path, {"7": QueuedJob("OUT_OF_MEMORY", "OutOfMemory")}, "7", 1.0)
    assert (state.state, state.why) == ("failed", "out_of_memory: srun: error: task 0: Out Of Memory")


def test_a_job_that_scancel_has_ended_is_cancelled_not_failed(tmp_path):
    write_status(tmp_path / "students/x", "stopped")
    write_atomically(tmp_path / "jobs/student-x.log", "student: 20/100\n")
    state = state_of(tmp_path, {"7": QueuedJob("CANCELLED", "None")}, "7", 1.0)
    assert (state.state, state.amount) == ("cancelled", "20/100 steps")
    write_atomically(tmp_path / "jobs/student-x.exit", "143\n")  # the queue forgets, the job script writes it down
    assert state_of(tmp_path, {}, "7", 1.0) == state
    assert "by scancel" in state.why


def test_a_job_that_left_the_queue_before_it_began_was_cancelled(tmp_path):
    for queue in ({"7": QueuedJob("CANCELLED", "None")}, {}):
        state = state_of(tmp_path, queue, "7", 1.0)
        assert (state.state, state.why) == ("cancelled", "before it began; `concentrate run` submits it again")
    assert state_of(tmp_path, {}, "7", time.time()).state == "waiting"


@pytest.mark.parametrize(("code", "why"), [("2", "failed"), ("143", "was cancelled")])
def test_what_slurm_has_cancelled_after_another_waits_in_vain(tmp_path, code, why):
    after = {"a": (), "b": ("a",), "c": ("b",)}
    records = {
        name: JobRecord(
            directory=Path(name), file_name=name, proof="DONE.json", after=names, slurm_id=f"{number}", submitted=1.0
        )
        for number, (name, names) in enumerate(after.items())
    }
    write_atomically(tmp_path / "jobs/a.exit", f"{code}\n")
    for queue in ({"1": QueuedJob("CANCELLED", "None"), "2": QueuedJob("PENDING", "DependencyNeverSatisfied")}, {}):
        states = find_states(tmp_path, JobRecords(user="me", jobs=records), queue)
        assert [s.state for s in states.values()][1:] == ["waiting", "waiting"]
        assert [s.why for s in states.values()][1:] == [f"for a, which {why}", "for b, which waits in vain"]


def test_what_waits_says_for_what(tmp_path):
    after = {"a": (), "b": ("a",), "c": ("b",)}
    records = {
        name: JobRecord(directory=Path(name), file_name=name, proof="DONE.json", after=names)
        for name, names in after.items()
    }
    write_status(tmp_path / "a", "running")
    states = find_states(tmp_path, JobRecords(user="me", jobs=records), {})
    assert [(s.state, s.why) for s in states.values()] == [("running", ""), ("waiting", "for a"), ("waiting", "for b")]
    write_atomically(tmp_path / "jobs/a.exit", "2\n")
    states = find_states(tmp_path, JobRecords(user="me", jobs=records), {})
    assert [s.why for s in states.values()][1:] == ["for a, which failed", "for b, which waits in vain"]


@pytest.mark.parametrize("content", ["", "[]", '{"user": "me", "jobs": {"a": 3}}', '{"jobs": {}}'])
def test_a_damaged_list_of_jobs_is_one_clear_error(tmp_path, content):
    write_atomically(tmp_path / "jobs/jobs.json", content)
    with pytest.raises(DataError, match=r"jobs\.json"):
        load_records(tmp_path)


def test_a_finished_network_that_is_gone_is_told(tmp_path):
    done = tmp_path / "students/x/DONE.json"
    for facts, name in (({"step": 3}, "model.safetensors"), ({"files": {"external.json": "0"}}, "external.json")):
        write_atomically(done, {"config": "0", **facts})
        assert f"finished, but {name} is gone: bring it back, or make it anew" in state_of(tmp_path).why
        (done.parent / name).touch()
        assert (state_of(tmp_path).state, state_of(tmp_path).why) == ("done", "")


@pytest.mark.parametrize("content", ["", "[]", "\udcff", '{"state": "running"}', '{"title": "x", "state": 3}'])
def test_a_damaged_file_of_progress_or_record_hides_no_other_stage(tmp_path, content, capsys):
    """The first is only shown, so it counts as none; nothing can go on from the second."""
    write_status(tmp_path / "students/whole", "stopped")
    damaged, record = tmp_path / "students/x/status.json", tmp_path / "students/x/DONE.json"
    write_atomically(damaged, content.encode(errors="surrogateescape"))
    assert load_status(damaged.parent) is None
    for facts, told in ((None, "status.json is damaged; the same command continues"), ({"config": "0"}, "done"),
                        (content.encode(errors="surrogateescape"), f"{record}: ")):  # fmt: skip
        if facts is not None:
            write_atomically(record, facts)
        status(StatusConfig(workdir=tmp_path))
        rows = capsys.readouterr().out.splitlines()
        assert any("students/whole" in row and "preempted" in row for row in rows)
        assert told in next(row for row in rows if "students/x" in row)
