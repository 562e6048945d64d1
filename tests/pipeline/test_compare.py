"""`run experiment=compare`: which systems it trains, each after what it needs, with equal budgets; and a small real one."""

import json

import pytest
from hydra import compose, initialize_config_dir
from real_runs import Running

from concentration.config import check_config, find_config_directory
from concentration.data.sources import build_source
from concentration.errors import ConfigError
from concentration.pipeline.compare import COMPARED
from concentration.pipeline.graph import build_graph

NAMES = {"generalist", "student", "specialists", *COMPARED}


def compose_run(*overrides: str):
    with initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        return check_config("run", compose("run", ["experiment=compare", "workdir=w", *overrides]))


@pytest.fixture(scope="module")
def config():
    return compose_run()


@pytest.fixture(scope="module")
def jobs(config):
    return {job.name: job for job in build_graph(config, build_source(config.data).build_taxonomy())}


def test_every_job_comes_after_those_that_it_waits_for(jobs):
    seen = set()
    for name, job in jobs.items():
        assert set(job.after) <= seen, name
        seen.add(name)


def test_every_system_is_trained_and_evaluated_before_the_report(jobs):
    assert {name.removeprefix("evaluate ") for name in jobs if name.startswith("evaluate ")} == NAMES
    assert set(jobs["report student"].after) == {f"evaluate {name}" for name in NAMES}
    assert jobs["group features"].after == jobs["group confusion"].after == ("student generalist",)
    assert set(jobs["mixture mixture"].after) == {f"teacher features-{number}" for number in range(4)}
    assert jobs["augment augmented_random"].after == ("group random",)
    assert len({job.directory for job in jobs.values()}) == len(jobs)


def test_all_systems_see_the_images_four_times_over_all_their_parts(jobs):
    def passes(name: str) -> float:
        return jobs[name].config.trainer.max_epochs

    assert passes("student generalist_long") == passes("student generalist_wide") == 4
    assert passes("student generalist") + passes("teacher features-0") == 4
    assert passes("student generalist") + passes("augment augmented") == 4
    assert passes("student generalist") + passes("augment augmented_random") == 4
    assert passes("teacher latin") + passes("student student") == 4


def test_what_is_to_differ_differs_and_nothing_else(jobs):
    short, long = (jobs[f"student {name}"].config for name in ("generalist", "generalist_long"))
    assert long.model_copy(update={"trainer": short.trainer, "name": "generalist"}) == short
    assert {**long.trainer.model_dump(), "max_epochs": 2, "validate_every_epochs": 1} == short.trainer.model_dump()
    wide = jobs["student generalist_wide"].config
    assert wide.model_copy(update={"top": long.top, "name": "generalist_long"}) == long
    assert wide.top.top2 > long.top.top2
    expert = jobs["teacher features-2"].config
    assert (expert.base.checkpoint, expert.top) == ("generalist", short.top)
    assert expert.trainer.batch_size == short.trainer.batch_size
    grown, control = (jobs[f"augment {name}"].config for name in ("augmented", "augmented_random"))
    assert (grown.heads.grouping, control.heads.grouping) == ("confusion", "random")
    assert grown.heads.model_copy(update={"grouping": "random"}) == control.heads


def test_a_student_may_not_have_the_name_of_another_system():
    with pytest.raises(ConfigError, match="name=mixture is taken"):
        compose_run("name=mixture")


def test_more_groups_than_the_classes_allow_are_refused_before_anything_is_trained(tmp_path):
    """Eight groups of ten classes failed when all generalists, teachers and students were trained."""
    small = (
        "data.verticals=[greek,arrows]",
        "data.num_classes=8",
        "data.num_drawings=20",
        "data.image_size=16",
        "num_processes=1",
    )
    options = ("compare.groups.top_k=2", "compare.groups.num_groups=80")
    finished = Running(("run", "experiment=compare", f"workdir={tmp_path}/w", *small, *options), tmp_path).wait(200)
    assert finished.code == 2
    assert "compare.groups.num_groups=80 of " in finished.err
    assert not (tmp_path / "w/students").exists()


@pytest.mark.long
def test_a_small_comparison_ends_with_all_systems_on_one_page(tmp_path):
    small = ("data.verticals=[greek,arrows]", "data.num_classes=24", "data.num_drawings=20", "data.image_size=16",
             "base.channels=[4,8]", "top.top1=12", "top.top2=8", "generalist.top.top1=12", "generalist.top.top2=8",
             "teacher.top.top1=12", "teacher.top.top2=8", "compare.expert.top.top1=12", "compare.expert.top.top2=8",
             "compare.wide_top.top1=12", "compare.wide_top.top2=16",
             "compare.features.num_groups=2", "compare.features.num_start=200", "compare.groups.top_k=5",
             "compare.groups.num_groups=3", "compare.augment.hidden=[8]", "trainer.num_workers=0",
             "compare.long_trainer.num_workers=0", "compare.augment.trainer.num_workers=0", "num_processes=2")  # fmt: skip
    arguments = ("run", "experiment=compare", f"workdir={tmp_path}/w", *small)
    finished = Running(arguments, tmp_path).wait(600)
    assert finished.code == 0, finished.err
    measured = json.loads((tmp_path / "w/report/metrics.json").read_text())
    assert set(measured) == NAMES
    assert all(f" {name} " in finished.out for name in NAMES)
    cost = {name: measured[name]["multiply_adds"] for name in NAMES}
    assert (
        cost["generalist"] == cost["generalist_long"] < cost["generalist_wide"] < cost["mixture"] < cost["mixture_top2"]
    )
    assert cost["augmented"] == cost["augmented_random"] > cost["generalist"]
    assert '<section id="tradeoff">' in (tmp_path / "w/report/index.html").read_text()
    again = Running(arguments, tmp_path).wait(600)
    assert "nothing is to do" in again.out + again.err
