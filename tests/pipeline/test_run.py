"""`concentrate run`: everything from drawn characters to the report, stopped, continued, changed and failing."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from real_runs import Finished, Running, load_json, run_command, write_shards

from concentration.networks.student import load_student
from concentration.pipeline import local
from concentration.pipeline.failures import JobFailed
from concentration.pipeline.jobs import LOG, Job
from concentration.pipeline.run import _print_result
from concentration.stages.evaluate import EvaluateConfig
from concentration.stages.run_directory import RunDirectory

PREPARE = ("data.verticals=[greek,arrows]", "data.num_classes=12", "data.num_drawings=20", "data.image_size=16",
           "samples_per_shard=100")  # fmt: skip
NETWORKS = ("base.channels=[4,8]", "top.top1=12", "top.top2=8", "teacher.top.top1=12", "teacher.top.top2=8",
            "trainer.max_epochs=3", "teacher.trainer.max_epochs=3", "trainer.batch_size=32",
            "teacher.trainer.batch_size=32", "trainer.num_workers=0", "teacher.trainer.num_workers=0",
            "num_processes=2")  # fmt: skip
COMMAND = ("run", *PREPARE, *NETWORKS)
#: The column of `concentrate status` that says what is wrong.
WHY = 5


def run(workdir: Path, *options: str, code: int = 0) -> Finished:
    finished = Running((*COMMAND, f"workdir={workdir}", *options), workdir.parent).wait(300)
    assert finished.code == code, f"{finished.code}:\n{finished.out}\n{finished.err}"
    assert "Traceback" not in finished.err
    return finished


def status(workdir: Path, column: int = 1) -> dict[str, str]:
    """The state of every stage, or what stands in another column, as `concentrate status` shows it."""
    shown = Running(("status", f"workdir={workdir}"), workdir.parent).wait().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    return {row[0]: row[column] for row in rows}


def signal_in_the_middle(workdir: Path, number: int) -> Finished:
    """Starts the whole run on prepared shards, signals it once a stage after `prepare` has begun, and waits for its end."""
    running = Running((*COMMAND, f"workdir={workdir}"), workdir.parent)
    running.wait_for(lambda: any(workdir.glob("*/*/status.json")), 180)
    running.send(number)
    return running.wait(60)


def assert_same_networks(workdir: Path, expected: Path) -> None:
    for name in ("students/student", "students/generalist", "teachers/greek"):
        found, undisturbed = ((root / name / "model.safetensors").read_bytes() for root in (workdir, expected))
        assert found == undisturbed, f"{name} is not what an undisturbed run makes"


def snapshot(workdir: Path) -> dict[str, int]:
    """When each file that holds a result was written."""
    results = ("*.tar", "*.index", "model.safetensors", "DONE.json", "config.json", "metrics.jsonl", "targets/*/*/*.safetensors",
               "evaluations/*.json")  # fmt: skip
    paths = {path for pattern in results for path in workdir.rglob(pattern)}
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Finished]:
    """A working directory in which the whole run has finished, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    return workdir, run(workdir)


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "work"))


def test_the_whole_run_goes_from_characters_to_a_report(finished):
    workdir, printed = finished
    for stage in ("shards", "students/generalist", "students/student", "teachers/greek", "teachers/arrows",
                  "targets/default/greek", "targets/default/arrows", "evaluations/student"):  # fmt: skip
        assert (workdir / stage / "DONE.json").exists(), stage
    page = (workdir / "report/index.html").read_text()
    assert "<html" in page
    assert set(load_json(workdir / "report/metrics.json")) == {"generalist", "student", "specialists"}
    for name in ("generalist", "student", "specialists"):
        mpvap = load_json(workdir / "evaluations" / f"{name}.json")["mpvap"]
        assert f"{100 * mpvap:.1f} %" in next(line for line in printed.out.splitlines() if f" {name} " in line)
    assert "report/index.html" in printed.out


def test_short_trainings_are_told_with_what_trains_longer(finished):
    """A newcomer's few hundred images make some twenty steps in the three passes that a set of the demo's size needs."""
    workdir, printed = finished
    steps = {path.parent.name: load_json(path)["step"] for path in workdir.glob("[st]*s/*/DONE.json")}
    teachers = sorted((steps["greek"], steps["arrows"]))
    text = (
        f"short trainings: generalist took {steps['generalist']} steps, student took {steps['student']} steps, 2 of 2 teachers "
        f"took {teachers[0]} to {teachers[1]} steps; `concentrate run` with trainer.min_steps=1000 "
        "teacher.trainer.min_steps=1000 overwrite=changed trains them longer"
    )
    assert text in printed.out
    as_html = text.replace("`concentrate run`", "<code>concentrate run</code>")
    assert as_html in (workdir / "report/index.html").read_text()


def test_the_last_table_says_how_many_images_were_measured_and_which_verticals_had_none(finished, tmp_path, capsys):
    workdir, printed = finished
    num_samples = load_json(workdir / "evaluations/student.json")["num_samples"]
    assert f"{num_samples:,} test images" in printed.out
    assert "leaves out" not in printed.out
    shutil.copytree(workdir / "evaluations", tmp_path / "evaluations")
    student = load_json(workdir / "evaluations/student.json")
    (tmp_path / "evaluations/student.json").write_text(
        json.dumps({**student, "pvap": {"greek": 1.0}, "num_verticals_without_sample": 1})
    )
    _print_result(types.SimpleNamespace(workdir=tmp_path, name="student", compare=None, export=False))
    assert "mpvap leaves out the verticals without a test image: arrows (1 of 2)" in capsys.readouterr().out


def test_another_student_has_its_teachers_in_the_loop(workdir):
    """It waits for the teachers, and the report compares what both ways took."""
    said = run(workdir, "name=online", "targets=online", "tail=spread", "outside=0.5").err
    assert "what the teachers say meanwhile" in said
    assert load_json(workdir / "students/online/config.json")["config"]["targets"] == {"kind": "online", "top_k": 100}
    page = (workdir / "report" / "index.html").read_text()
    assert "was faster:" in page
    assert "teachers in the loop" in page


def test_a_second_run_does_nothing_and_says_so(finished):
    workdir, _ = finished
    before = snapshot(workdir)
    again = run(workdir)
    assert snapshot(workdir) == before
    assert "nothing is to do" in again.err + again.out


def test_a_network_that_was_deleted_since_is_told(workdir):
    """What is made of it is there, so nothing is due and nothing fails."""
    (workdir / "teachers/greek/model.safetensors").unlink()
    again = run(workdir)
    [line] = [line for line in again.err.splitlines() if "model.safetensors" in line]
    assert "teacher greek" in line
    assert "bring it back, or make it anew with overwrite=true" in line


def test_a_run_takes_a_teacher_that_is_brought_along(finished, tmp_path):
    """Our own teacher, exported: what follows from it is as if it had been trained."""
    expected, _ = finished
    images = torch.rand(2, 3, 16, 16)
    network = load_student(expected / "teachers/greek/model.safetensors")
    program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "greek.pt2")
    shutil.copytree(expected / "shards", tmp_path / "work/shards")
    values = {"kind": "torch", "path": tmp_path / "greek.pt2", "classes": "identity", "output": "sigmoid_logits"}
    brought = [f"+teacher.external.greek.{key}={value}" for key, value in values.items()]
    run(tmp_path / "work", *brought)
    assert "files" in load_json(tmp_path / "work/teachers/greek/DONE.json")
    assert "files" not in load_json(tmp_path / "work/teachers/arrows/DONE.json")
    assert (tmp_path / "work/report/index.html").exists()
    for name in ("specialists", "student"):
        found, wanted = (load_json(root / "evaluations" / f"{name}.json") for root in (tmp_path / "work", expected))
        assert found["mpvap"] == pytest.approx(wanted["mpvap"], abs=0.02)
    assert status(tmp_path / "work")["teachers/greek"] == "done"
    # A function's parameters are not known: the table at the end goes without them.
    path = tmp_path / "work/evaluations/specialists.json"
    path.write_text(json.dumps({**load_json(path), "num_parameters": {"base": None, "top": None, "total": None}}))
    printed = run(tmp_path / "work", *brought)
    line = next(line for line in printed.out.splitlines() if " specialists " in line)
    assert [cell.strip() for cell in line.split("│")][4] == "-"


@pytest.mark.parametrize(
    ("missing", "options", "expected"),
    [
        ("test", (), r"no test images \(\d+ train, \d+ val, 0 test\), and all networks .* them; set data.split.test_"),
        ("val", ("trainer.keep_best=true",), r"no val images .* trainer.keep_best=true chooses with them; set data.split.val_"),
        ("val", ("experiment=compare",), r"no val images .* compare.groups finds its groups with them; set data.split.val_"),
        ("val", ("teacher.trainer.keep_best=true",), "no val images .* teacher.trainer.keep_best=true chooses with them; set"),
    ],
)  # fmt: skip
def test_images_that_a_later_job_asks_for_are_missed_before_anything_is_trained(missing, options, expected, tmp_path):
    given, workdir = write_shards(tmp_path / "given"), tmp_path / "work"
    for path in given.glob(f"{missing}-*"):
        path.unlink()
    data = ("data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}")
    refused = Running(("run", *data, *NETWORKS, *options), tmp_path).wait()
    assert refused.code == 2, refused.err
    assert re.search(expected, refused.err.splitlines()[-1]), refused.err
    assert not (workdir / "students").exists()
    assert not (workdir / "teachers").exists()


def test_too_few_classes_for_found_groups_are_missed_before_anything_is_trained(tmp_path):
    given, workdir = write_shards(tmp_path / "given"), tmp_path / "work"
    data = ("data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}")
    for options, told in (
        ((), "num_groups=8 of 10 classes"),
        (("compare.groups.num_groups=4",), "top_k=50 of 10 classes"),
    ):
        refused = Running(("run", *data, *NETWORKS, "experiment=compare", *options), tmp_path).wait()
        assert refused.code == 2, refused.err
        assert f"compare.groups.{told}" in refused.err.splitlines()[-1]
    assert not (workdir / "students").exists()


def test_a_teacher_for_an_unknown_vertical_is_one_clear_error(finished, tmp_path):
    shutil.copytree(finished[0] / "shards", tmp_path / "work/shards")
    brought = [f"+teacher.external.greeks.{option}" for option in ("kind=onnx", "path=x", "classes=identity")]
    refused = run(tmp_path / "work", *brought, "+teacher.external.greeks.output=softmax_logits", code=2)
    assert "teacher.external.greeks: no vertical of this name; did you mean 'greek'?" in refused.err
    refused = run(tmp_path / "work", *brought, code=2)
    assert "'teacher.external.greeks.output' is missing" in refused.err


@pytest.mark.long
def test_a_changed_key_is_refused_by_name_and_overwrite_replaces(workdir):
    before = snapshot(workdir)
    refused = run(workdir, "optimizer.lr=0.1", code=2)
    assert "optimizer.lr was 0.2, is 0.1" in refused.err
    assert snapshot(workdir) == before
    run(workdir, "optimizer.lr=0.1", "overwrite=true")
    changed = {path for path, when in snapshot(workdir).items() if before.get(path) != when}
    assert "students/student/model.safetensors" in changed
    assert not {path for path in changed if path.startswith(("shards/", "teachers/", "targets/"))}


@pytest.mark.long
def test_another_student_shares_teachers_and_targets(workdir):
    before = snapshot(workdir)
    run(workdir, "name=other", "top=fc_fc", "top.top1=12", "top.top2=8")
    changed = {path for path, when in snapshot(workdir).items() if before.get(path) != when}
    assert {path.split("/")[1].removesuffix(".json") for path in changed} == {"other"}
    assert "other" in load_json(workdir / "report/metrics.json")


def test_a_failing_teacher_stops_only_what_depends_on_it(workdir):
    for stage in ("teachers", "targets", "students", "evaluations", "report"):
        shutil.rmtree(workdir / stage)
    # The impossible rate is the teachers' alone.
    failed = run(workdir, "teacher.optimizer.lr=1e30", code=2)
    assert "teacher greek failed (exit code 2); the end of" in failed.err
    assert "the loss is not finite" in failed.err or "not finite" in failed.err, "the end of its log is shown"
    waiting = next(line for line in failed.err.splitlines() if "not run because of it" in line)
    assert all(job in waiting for job in ("targets greek", "student student", "evaluate specialists", "report student"))
    assert (workdir / "students/generalist/DONE.json").exists()
    assert (workdir / "evaluations/generalist.json").exists()
    states = status(workdir)
    assert states["students/generalist"] == "done"
    assert states["teachers/greek"] == "failed"
    run(workdir, "overwrite=true")


def test_what_failed_in_earlier_runs_is_not_told_as_the_reason(tmp_path, monkeypatch):
    """A log is continued; the errors of the last runs stood together as if all of them were this one's."""
    monkeypatch.setattr(
        local.preemption, "note_signals", lambda *numbers: None
    )  # the tests' own process keeps its handlers
    config = EvaluateConfig(workdir=tmp_path, name="student")
    job = Job("evaluate student", "evaluate", config, tmp_path / "evaluations" / "student", (), "")
    for _ in range(2):
        with pytest.raises(JobFailed) as caught:
            local.LocalLauncher(1).run([job])
    assert str(caught.value).count("concentrate: ") == 1
    assert job.file(LOG).read_text().count("concentrate: ") == 2


def test_a_finished_stage_is_shown_as_done_after_a_command_that_was_refused(workdir):
    failed = run(workdir, "trainer.max_epochs=4", code=2)
    assert "student generalist failed (exit code 2)" in failed.err
    assert set(status(workdir).values()) == {"done"}
    shown = Running(("status", f"workdir={workdir}"), workdir.parent).wait().out
    line = next(line for line in shown.splitlines() if "students/generalist" in line)
    assert "the latest command was refused: " in line
    assert "trainer.max_epochs was 3.0, is 4.0" in line
    run(workdir)
    assert "refused" not in Running(("status", f"workdir={workdir}"), workdir.parent).wait().out


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_stops_the_run_with_75_and_the_next_one_finishes(finished, tmp_path, number):
    expected, _ = finished
    workdir = tmp_path / "work"
    shutil.copytree(expected / "shards", workdir / "shards")
    stopped = signal_in_the_middle(workdir, number)
    assert stopped.code == 75, stopped.err
    assert "run the same command again" in stopped.err
    assert not (workdir / "report/index.html").exists()
    assert "running" not in status(workdir).values()
    run(workdir)
    assert_same_networks(workdir, expected)
    assert set(status(workdir).values()) == {"done"}


@pytest.mark.parametrize(
    ("number", "moment", "options"),
    [
        pytest.param(signal.SIGTERM, "jobs/prepare.json", (), id="SIGTERM-server-starts"),
        pytest.param(signal.SIGUSR1, "students/generalist/metrics.jsonl", (), id="SIGUSR1-training"),
        pytest.param(signal.SIGHUP, "students/generalist/metrics.jsonl", (), id="SIGHUP-training"),
        pytest.param(signal.SIGINT, "students/generalist/metrics.jsonl", (), id="SIGINT-training", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "students/generalist/metrics.jsonl", ("trainer.devices=2",), id="SIGTERM-torchrun",
                     marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, "students/generalist/metrics.jsonl", ("trainer.devices=2",), id="SIGUSR1-torchrun",
                     marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_signal_to_every_process_lets_all_jobs_save_before_the_run_ends(finished, tmp_path, number, moment, options):
    """As SLURM and a terminal send it: also to the server from which jobs are forked, and to torchrun."""
    workdir = tmp_path / "work"
    shutil.copytree(finished[0] / "shards", workdir / "shards")
    command = [sys.executable, "-m", "concentration.cli", *COMMAND, "trainer.max_epochs=300", *options]
    with open(tmp_path / "err", "w+") as err:
        # The tests themselves may run under nohup.
        process = subprocess.Popen([*command, f"workdir={workdir}"], stderr=err, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # fmt: skip
        deadline = time.monotonic() + 180
        while not any(workdir.glob(moment)):
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, number)
        code = process.wait(60)
    said = (tmp_path / "err").read_text()
    assert code == 75, said
    assert f"stopped by {number.name}" in said
    assert "FAILED" not in said
    assert "Traceback" not in said
    begun = {path.stem: load_json(path.with_suffix(".exit")) for path in workdir.glob("jobs/*-*.json")}
    assert set(begun.values()) <= {0, 75}
    if "students" in moment:
        assert begun["student-generalist"] == 75
        assert any(workdir.glob("students/generalist/checkpoints/*.ckpt"))


@pytest.mark.parametrize("options", [(), pytest.param(("trainer.devices=2",), id="torchrun", marks=pytest.mark.long)])
def test_runs_at_once_share_what_they_need(finished, tmp_path, options):
    """Each waits for the stages that another works on, instead of failing at them."""
    expected, _ = finished
    workdir = tmp_path / "work"
    command = (*COMMAND, f"workdir={workdir}", *options)
    runs = [Running((*command, f"name={name}"), tmp_path) for name in ("student", "student", "other")]
    ended = [process.wait(300) for process in runs]
    assert [one.code for one in ended] == [0, 0, 0], "\n".join(one.err for one in ended)
    said = "".join(one.err for one in ended)
    assert "another run works on it, and is waited for" in said
    assert "FAILED" not in said
    if not options:
        assert_same_networks(workdir, expected)
    weights = [(workdir / "students" / name / "model.safetensors").read_bytes() for name in ("other", "student")]
    assert weights[0] == weights[1]
    assert set(status(workdir).values()) == {"done"}


def test_a_stage_of_another_process_is_waited_for_without_asking_it_again(workdir):
    """A process of a second or two every five seconds, for as long as another run trains."""
    with RunDirectory(workdir / "students/generalist").lock(".lock"):
        running = Running((*COMMAND, f"workdir={workdir}"), workdir.parent)
        log = workdir / "jobs/student-generalist.log"
        running.wait_for(lambda: "another process works here" in log.read_text(), 120)
        time.sleep(12)
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert ended.err.count("student generalist: another run works on it, and is waited for") == 1
    assert log.read_text().count("another process works here") == 1


def test_a_run_whose_output_nobody_reads_goes_on(finished, tmp_path):
    """`concentrate run 2>&1 | head`, and a terminal that is closed under nohup."""
    workdir = tmp_path / "work"
    shutil.copytree(finished[0] / "shards", workdir / "shards")
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "concentration.cli", *COMMAND, f"workdir={workdir}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writing, close_fds=True)
    os.close(writing)
    assert os.read(reading, 20)
    os.close(reading)
    assert process.wait(200) == 0
    assert (workdir / "report/index.html").exists()


def test_an_error_of_the_run_itself_lets_its_jobs_save():
    class Job:
        num_polls, is_told = 0, False

        def tell_to_stop(self) -> None:
            self.is_told = True

        def poll(self) -> int | None:
            self.num_polls += 1
            return 75 if self.num_polls > 2 else None

    jobs = [Job(), Job()]
    with pytest.raises(OSError, match="planted"), local._ending(jobs):
        raise OSError("planted")
    assert all(job.is_told and job.num_polls > 2 for job in jobs)


def test_a_job_that_the_kernel_kills_is_no_bug_of_ours(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished[0] / "shards", workdir / "shards")
    running = Running((*COMMAND, f"workdir={workdir}", "trainer.max_epochs=40"), tmp_path)
    running.wait_for(lambda: (workdir / "students/generalist/metrics.jsonl").exists(), 180)
    os.kill(load_json(workdir / "students/generalist/status.json")["process"], signal.SIGKILL)
    ended = running.wait(200)
    assert ended.code == 2
    assert "student generalist was killed, perhaps for want of memory (run the same command again, and it" in ended.err
    assert (workdir / "evaluations/student.json").exists()
    shown = Running(("status", f"workdir={workdir}"), tmp_path).wait().out
    assert "ended without a word" in next(line for line in shown.splitlines() if "students/generalist" in line)


def test_a_killed_run_takes_its_jobs_with_it_and_the_next_one_finishes(finished, tmp_path):
    expected, _ = finished
    workdir = tmp_path / "work"
    shutil.copytree(expected / "shards", workdir / "shards")
    signal_in_the_middle(workdir, signal.SIGKILL)
    time.sleep(2)
    run(workdir)
    assert_same_networks(workdir, expected)


def test_a_terminal_shows_a_bar_for_every_running_job(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished[0] / "shards", workdir / "shards")
    command = [sys.executable, "-m", "concentration.cli", *COMMAND, f"workdir={workdir}"]
    shown = bytearray()

    def read(descriptor: int) -> bytes:
        shown.extend(data := os.read(descriptor, 4096))
        return data

    status = pty.spawn(command, read)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))
    assert os.waitstatus_to_exitcode(status) == 0, text[-2000:]
    assert "Traceback" not in text
    assert re.search(r"student student +[━╸╺ ]+ +\d+/\d+ steps", text)
    assert "report: " in text


def test_status_shows_every_stage(finished):
    states = status(finished[0])
    assert states.keys() >= {
        "shards",
        "teachers/greek",
        "students/student",
        "targets/default/arrows",
        "evaluations/student",
    }
    assert set(states.values()) == {"done"}


def test_status_says_which_results_are_of_an_earlier_network(workdir):
    """A calibration and an export record what they are of as an evaluation does, and targets by which teacher they were made."""
    of_student = [f"{kind}/student" for kind in ("evaluations", "calibrations", "exports")]
    for name in of_student[1:]:
        shutil.copytree(workdir / of_student[0], workdir / name)
    assert set(status(workdir, WHY).values()) == {""}
    trained = workdir / "students/student/DONE.json"
    trained.write_text(json.dumps({**load_json(trained), "checkpoint": "another"}))
    said = "of an earlier network, which was trained anew since; overwrite=changed makes it of the present one"
    assert {name: why for name, why in status(workdir, WHY).items() if why} == dict.fromkeys(of_student, said)
    trained.unlink()  # it is being trained: nobody knows what it will be
    assert not any(said in why for why in status(workdir, WHY).values())
    teacher = workdir / "teachers/greek/DONE.json"
    teacher.write_text(json.dumps({**load_json(teacher), "checkpoint": "another"}))
    of_teachers = ["targets/default/greek", "evaluations/specialists"]
    assert {name for name, why in status(workdir, WHY).items() if said in why} == set(of_teachers)
    teacher.unlink()  # as where the teachers were removed once the targets were made
    assert not any(said in why for why in status(workdir, WHY).values())


@pytest.mark.long
def test_the_run_works_by_its_installed_name_in_another_directory(tmp_path):
    import sys

    command = Path(sys.executable).with_name("concentrate")
    if not command.exists():
        pytest.skip(f"NOT TESTED: no {command}: the package is not installed in this environment")
    run_command(command, *COMMAND, "workdir=here", directory=tmp_path)
    assert (tmp_path / "here/report/index.html").exists()
