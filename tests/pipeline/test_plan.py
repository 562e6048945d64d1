"""`concentrate run plan=true`: what a run would take, said before it is begun, and nothing is written for it."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from real_runs import Finished, concentrate, one_line, prepare_shards

from concentration.pipeline.jobs import Job
from concentration.pipeline.plan import StagePlan, schedule
from concentration.stages.run_directory import StageConfig

DATA = ("data.verticals=[greek,arrows]", "data.num_classes=12", "data.num_drawings=20", "data.image_size=16")
NETWORKS = ("base.channels=[4,8]", "top.top1=12", "top.top2=8", "teacher.top.top1=12", "teacher.top.top2=8",
            "trainer.max_epochs=3", "teacher.trainer.max_epochs=3", "num_processes=2")  # fmt: skip


def plan(workdir: Path, *options: str, code: int = 0) -> Finished:
    before = sorted(workdir.rglob("*"))
    command = ("run", *NETWORKS, "plan=true", f"workdir={workdir}", *options)
    finished = concentrate(*command, directory=workdir.parent, code=code)
    assert sorted(workdir.rglob("*")) == before, "a plan writes nothing"
    return finished


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of every stage: images, MiB kept, MiB passing, time, note."""
    found = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in printed.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in found}


def test_a_run_is_planned_before_and_after_its_data_are_prepared(tmp_path):
    workdir = tmp_path / "work"
    printed = plan(workdir, *DATA).out
    assert not workdir.exists()
    before = rows(printed)
    assert before["student student"][0] == str(3 * 256)  # three passes over 240 images, in steps of 64
    assert int(before["targets greek"][0]) + int(before["targets arrows"][0]) == 240
    for stage in ("student generalist", "teacher greek", "targets arrows", "evaluate specialists"):
        assert re.fullmatch(r"\d+:\d\d:\d\d", before[stage][3]), before[stage]
    assert "measured on this machine" in printed
    assert re.search(r"\d+ decoded a second", printed)

    concentrate("prepare", *DATA, f"workdir={workdir}", directory=tmp_path)
    after = rows(plan(workdir, *DATA).out)
    assert after["prepare"][-1] == "done"
    written = sum(path.stat().st_size for path in (workdir / "shards").glob("*.tar"))
    assert float(before["prepare"][1]) == pytest.approx(written / 2**20, rel=0.1, abs=0.1)
    assert [cells[0] for cells in after.values()] == [cells[0] for cells in before.values()]

    refused = one_line(plan(workdir, *DATA, "data.seed=1", code=2))
    assert "begun with another configuration: data.seed was 0, is 1" in refused
    assert rows(plan(workdir, *DATA, "data.seed=1", "overwrite=true").out)["student student"][0] == "768"


def test_numbers_are_whole_beside_long_names_of_verticals_where_there_is_no_terminal(tmp_path):
    for name in ("one", "another"):
        for number in range(8):
            path = (
                tmp_path
                / f"images/{name} vertical of a long name, as catalogues have them/class {number % 2}/{number}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(path)
    data = ("data=image_folder", f"data.path={tmp_path / 'images'}", "data.image_size=16")
    told = rows(plan(tmp_path / "work", *data).out)
    teachers = [cells for name, cells in told.items() if name.startswith("teacher ")]
    assert len(teachers) == 2
    for cells in teachers:
        assert re.fullmatch(r"\d+:\d\d:\d\d", cells[3]), cells


def test_given_shards_are_indexed_before_they_are_planned(tmp_path):
    refused = one_line(plan(tmp_path / "work", "data=shards", "data.path=given", code=2))
    assert "run `concentrate prepare data=shards data.path=given" in refused
    workdir = prepare_shards(tmp_path)
    given = ("data=shards", f"data.path={tmp_path / 'given'}", "data.image_size=16")
    found = rows(plan(workdir, *given).out)
    assert found["prepare"][:2] == ["300", "0.0"], "they are used where they lie"
    assert found["evaluate student"][0] == "60"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT TESTED: a GPU is here")
def test_what_cannot_be_measured_here_is_said_and_not_guessed(tmp_path):
    printed = plan(tmp_path / "work", *DATA, "trainer=gpu").out
    found = rows(printed)
    assert found["student student"][3:] == ["-", "no GPU here"]
    assert found["evaluate student"][3:] == ["-", "not measured"]
    assert "at least " in printed


def test_the_stages_that_a_plan_leaves_out_say_so(tmp_path):
    """Of `compare`, and of an export: the time is without them."""
    printed = plan(tmp_path / "work", *DATA, "experiment=compare", "compare.groups.top_k=5", "export=true").out
    found = rows(printed)
    for stage in ("augment augmented", "group features", "mixture mixture", "export student"):
        assert found[stage][3:] == ["-", "not planned"]
    assert found["report student"][3:] == ["-"]
    assert "at least " in printed
    assert ", without the stages that have a reason in the last column" in printed


def test_jobs_side_by_side_wait_for_those_that_they_need(tmp_path):
    def job(name, seconds, *after):
        return StagePlan(Job(name, "student", StageConfig(workdir=tmp_path), tmp_path, after, ""), seconds=seconds)

    plans = [job("generalist", 5), job("teacher", 3), job("targets", 1, "teacher"), job("student", 4, "targets")]
    assert schedule(plans, 1) == 13
    assert schedule(plans, 2) == 8
    assert schedule(plans[2:], 2) == 5, "what is done already is not waited for"
    assert schedule([], 2) == 0


def test_what_another_config_makes_anew_is_not_done(tmp_path):
    """All that was there stood as done, and nothing was left to take any time."""
    workdir = tmp_path / "work"
    concentrate("run", *DATA, *NETWORKS, f"workdir={workdir}", directory=tmp_path)
    total = "all; time of what is left"
    found = rows(plan(workdir, *DATA).out)
    assert {cells[-1] for name, cells in found.items() if name != total} == {"done"}
    changed = ("teacher.optimizer.lr=0.1", "overwrite=changed")
    last = {name: cells[-1] for name, cells in rows(plan(workdir, *DATA, *changed).out).items() if name != total}
    anew = {name for name, note in last.items() if note != "done"}
    assert {"teacher greek", "targets arrows", "student student", "evaluate specialists", "report student"} <= anew
    assert {"prepare", "student generalist", "evaluate generalist"} <= last.keys() - anew
    refused = one_line(plan(workdir, *DATA, "teacher.optimizer.lr=0.1", code=2))
    assert "begun with another configuration: optimizer.lr was 0.2, is 0.1" in refused
