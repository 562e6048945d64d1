"""`concentrate run launcher=slurm` on a real SLURM: dependencies, failures, and what is submitted again."""

import re
import shutil
import time

import pytest
from cluster.pipelines import (
    ON_SLURM,
    Pipeline,
    assert_same_results,
    copy_stages,
    recording,
    submitted,
    terminating_at_first,
    wait_for_queue,
)
from real_runs import wait_for_hold

pytestmark = pytest.mark.cluster

ALL_JOBS = {"prepare", "teacher fruit, teacher tools", "targets fruit, targets tools", "student generalist",
            "student student", "evaluate generalist", "evaluate specialists", "evaluate student", "report student"}  # fmt: skip
#: What runs anew once the teacher of fruit can be trained.
NEED_FRUIT = {
    "teacher fruit",
    "targets fruit",
    "student student",
    "evaluate specialists",
    "evaluate student",
    "report student",
}


def test_a_chain_on_slurm_makes_what_this_machine_makes(slurm, shards, undisturbed, tmp_path):
    """What is there is not made again: the shards, and the generalist with its evaluation."""
    workdir = copy_stages(undisturbed, tmp_path / "work", "shards", "students/generalist", "evaluations/generalist")
    pipeline = Pipeline(workdir, shards, slurm.environment)
    finished = pipeline.run(*ON_SLURM, "launcher.wait=true")
    assert submitted(finished).keys() == ALL_JOBS - {"prepare", "student generalist", "evaluate generalist"}
    assert "report/index.html" in finished.out
    assert set(pipeline.status().values()) == {"done"}
    assert "nothing is to do" in pipeline.run(*ON_SLURM).out
    assert_same_results(workdir, undisturbed)
    copied = tmp_path / "copied"
    for name in ("report", "evaluations", "students", "targets", "teachers", "jobs", "shards"):  # the newest first
        shutil.copytree(workdir / name, copied / name, copy_function=shutil.copyfile)
        time.sleep(0.05)
    assert "nothing is to do" in Pipeline(copied, shards, slurm.environment).run(*ON_SLURM).out


@pytest.mark.long
def test_a_whole_run_on_slurm_makes_what_this_machine_makes(slurm, shards, undisturbed, tmp_path):
    """From images: SLURM is told of all verticals before anything is prepared."""
    pipeline = Pipeline(tmp_path / "work", shards, slurm.environment)
    assert submitted(pipeline.run(*ON_SLURM, "launcher.wait=true")).keys() == ALL_JOBS
    assert_same_results(pipeline.workdir, undisturbed)


def test_images_that_a_later_job_asks_for_are_missed_when_they_are_prepared(slurm, shards, tmp_path):
    """As on this machine, and not by the evaluation after all training."""
    given = shutil.copytree(shards, tmp_path / "given")
    for path in given.glob("test-*"):
        path.unlink()
    pipeline = Pipeline(tmp_path / "work", given, slurm.environment)
    failed = pipeline.run(*ON_SLURM, "launcher.wait=true", code=2)
    assert "prepare failed (exit code 2)" in failed.err
    assert re.search("no test images .* and all networks are measured with them; set data", failed.err)
    assert "student generalist" in next(line for line in failed.err.splitlines() if "not run because of it" in line)
    assert "no test images" in pipeline.run(*ON_SLURM, code=2).err.splitlines()[-1]


def test_runs_at_once_share_what_they_submit(slurm, shards, tmp_path):
    pipelines = [Pipeline(tmp_path / "work", shards, slurm.environment, (f"name={n}",)) for n in ("student", "other")]
    held = (*ON_SLURM, "launcher.options=[--hold]")
    ended = [one.wait(200) for one in [pipeline.start(*held) for pipeline in pipelines]]
    slurm.run("scancel", *pipelines[0].ids().values())
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    first, second = (submitted(one).keys() for one in ended)
    assert first | second == ALL_JOBS | {"student other", "evaluate other", "report other"}
    assert not first & second


@pytest.mark.long
def test_a_teacher_that_fails_stops_only_what_depends_on_it(slurm, shards, tmp_path):
    pipeline = Pipeline(tmp_path / "work", shards, slurm.environment)
    broken = [f"+teacher.external.fruit.{key}" for key in ("kind=torch", "path=missing.pt2", "classes=identity")]
    broken.append("+teacher.external.fruit.output=sigmoid_logits")
    failed = pipeline.run(*ON_SLURM, "launcher.wait=true", *broken, code=2)
    assert re.search(r"teacher fruit failed \(exit code 2\); the end of .*\n.*missing\.pt2", failed.err)
    waiting = next(line for line in failed.err.splitlines() if "not run because of it" in line)
    assert all(job in waiting for job in ("targets fruit", "student student", "evaluate specialists", "report student"))
    assert "targets tools" not in waiting
    states = pipeline.status()
    assert states["teachers/fruit"].startswith("failed")
    assert "missing.pt2" in states["teachers/fruit"]
    assert states["targets/default/fruit"].startswith("waiting for teacher fruit, which failed")
    for done in ("teachers/tools", "targets/default/tools", "students/generalist", "evaluations/generalist"):
        assert states[done] == "done", done

    again = pipeline.run(*ON_SLURM, "launcher.wait=true")
    assert submitted(again).keys() == NEED_FRUIT
    assert set(pipeline.status().values()) == {"done"}


@pytest.mark.long
def test_a_teacher_that_is_cancelled_is_not_requeued_and_the_command_given_again_submits_what_is_missing(
    slurm, shards, undisturbed, tmp_path
):
    done = ("shards", "students/generalist", "evaluations/generalist")
    workdir = copy_stages(undisturbed, tmp_path / "work", *done)
    environment = {**slurm.environment, **recording(tmp_path / "records", "teachers-fruit:8")}
    pipeline = Pipeline(workdir, shards, environment)
    pipeline.run(*ON_SLURM)
    wait_for_hold(tmp_path / "records", "teachers-fruit")
    teacher = pipeline.ids()["teacher fruit"]
    slurm.run("scancel", teacher)
    wait_for_queue(slurm)  # nothing waits for ever
    described = slurm.describe(teacher)
    assert (described["JobState"], described["Restarts"]) == ("CANCELLED", "0"), pipeline.log()
    states = pipeline.status()
    assert states["teachers/fruit"].startswith("cancelled by scancel")
    assert states["targets/default/fruit"].startswith("waiting for teacher fruit, which was cancelled")
    assert states["report"].startswith("waiting for")
    assert all(states[stage] == "done" for stage in ("teachers/tools", "targets/default/tools"))

    again = pipeline.run(*ON_SLURM, "launcher.wait=true")
    assert submitted(again).keys() == NEED_FRUIT
    assert set(pipeline.status().values()) == {"done"}
    assert_same_results(workdir, undisturbed)


def test_this_machine_does_not_run_beside_jobs_in_the_queue(slurm, shards, undisturbed, tmp_path):
    """It forgot their numbers, so that `status` knew them no more, and given again all were submitted a second time."""
    trained = ("shards", "teachers", "targets", "students", "evaluations")
    pipeline = Pipeline(copy_stages(undisturbed, tmp_path / "work", *trained), shards, slurm.environment)
    pipeline.run(*ON_SLURM, "launcher.options=[--hold]")
    number = pipeline.ids()["report student"]
    refused = pipeline.run(code=2).err.splitlines()[-1]
    assert f"report student as {number}); go on with launcher=slurm, or end them first: scancel {number}" in refused
    assert pipeline.status()["report"].startswith("waiting")
    assert not submitted(pipeline.run(*ON_SLURM)), "it waits there already"
    slurm.run("scancel", number)
    pipeline.run()
    assert pipeline.is_finished()


@pytest.mark.long
def test_a_job_that_waits_and_is_cancelled_is_shown_and_submitted_again(slurm, shards, undisturbed, tmp_path):
    trained = ("shards", "teachers", "targets", "students", "evaluations")
    pipeline = Pipeline(copy_stages(undisturbed, tmp_path / "work", *trained), shards, slurm.environment)
    pipeline.run(*ON_SLURM, "launcher.options=[--hold]")
    slurm.run("scancel", pipeline.ids()["report student"])
    assert pipeline.status()["report"].startswith("cancelled before it began")
    stopped = pipeline.run(*ON_SLURM, "launcher.options=[--hold]")
    assert submitted(stopped).keys() == {"report student"}
    slurm.run("scancel", pipeline.ids()["report student"])
    assert submitted(pipeline.run(*ON_SLURM, "launcher.wait=true")).keys() == {"report student"}


@pytest.mark.long
def test_a_job_that_a_signal_kills_in_its_first_moments_is_requeued(slurm, shards, undisturbed, tmp_path):
    trained = ("shards", "teachers", "targets", "students", "evaluations")
    workdir = copy_stages(undisturbed, tmp_path / "work", *trained)
    pipeline = Pipeline(workdir, shards, {**slurm.environment, **terminating_at_first(tmp_path / "site")})
    pipeline.run(*ON_SLURM)
    report = pipeline.ids()["report student"]
    described = slurm.wait_for_end(report)
    assert (described["JobState"], described["Restarts"]) == ("COMPLETED", "1"), pipeline.log()
    assert pipeline.is_finished()
