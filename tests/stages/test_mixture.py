"""`teacher group=ID` and `mixture`: experts of groups of samples, put behind a gater, evaluated as any student."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from real_runs import TINY, concentrate, load_json, load_weights, one_line, prepare_shards

from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import load_split
from concentration.networks.mixture import load_mixture
from concentration.networks.student import load_student
from concentration.stages.groupings import load_sample_groups
from concentration.taxonomy import Taxonomy

NUM_EXPERTS = 3
SHARED = ("decoder=shared", "decoder.top.top1=12", "decoder.top.top2=8", "decoder.top.norm=layer",
          "decoder.trainer.num_workers=0", "decoder.trainer.batch_size=16", "decoder.trainer.max_epochs=1")  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist, three groups by its features, and their experts; mixtures with both decoders."""
    directory = tmp_path_factory.mktemp("mixture")
    workdir = prepare_shards(directory)

    def run(*arguments: str) -> str:
        return concentrate(*arguments, f"workdir={workdir}", directory=directory).out

    run("student", "name=generalist", "targets=labels", *TINY)
    run("group", "method=features", f"method.num_groups={NUM_EXPERTS}", "method.num_start=64")
    for number in range(NUM_EXPERTS):
        run("teacher", f"group={number}", "base.checkpoint=generalist", *TINY)
    assert "of 3 experts" in run("mixture")
    run("mixture", "name=shared", "gater=router", *SHARED)
    for name in ("mixture", "shared"):
        run("evaluate", f"name={name}", "save_scores=true", "gallery=2")
    return workdir


def load(workdir: Path, split: str):
    return load_split(workdir / "shards", split, Taxonomy.load(workdir / "shards/taxonomy.json"))


def test_an_expert_learns_from_its_group_alone(workdir):
    split = load(workdir, "train")
    group_N = load_sample_groups(workdir, "features", split)
    for number in range(NUM_EXPERTS):
        done = load_json(workdir / f"teachers/features-{number}/DONE.json")
        assert done["step"] == 2 * -(-int((group_N == number).sum()) // 16)


def test_labels_are_counted_in_the_groups_samples_alone(workdir):
    split = load(workdir, "train")
    ordinals = np.flatnonzero(load_sample_groups(workdir, "features", split) == 1)
    expected_C = np.zeros(split.taxonomy.num_classes, dtype=int)
    for ordinal in ordinals:
        expected_C[list(split.taxonomy.smear(split.labels(int(ordinal))))] += 1
    np.testing.assert_array_equal(split.count_in(ordinals, smear=True), expected_C)
    everything = split.count_in(np.arange(len(split)), smear=False)
    np.testing.assert_array_equal(everything, split.count_labels())


def test_the_mixture_holds_the_generalists_base_and_the_experts_as_they_were_trained(workdir):
    mixture = load_weights(workdir / "students/mixture")
    generalist = load_weights(workdir / "students/generalist")
    for name, values in generalist.items():
        if name.startswith("base."):
            np.testing.assert_array_equal(mixture[f"gater.trunk.{name}"], values)
    for number in range(NUM_EXPERTS):
        for name, values in load_weights(workdir / f"teachers/features-{number}").items():
            np.testing.assert_array_equal(mixture[f"experts.{number}.{name}"], values)
    shared = load_weights(workdir / "students/shared")
    for name, values in load_weights(workdir / "teachers/features-2").items():
        if name.startswith("base."):
            np.testing.assert_array_equal(shared[f"base.experts.2.{name}"], values)


def test_each_test_image_was_answered_by_the_expert_of_its_group(workdir):
    split = load(workdir, "test")
    group_N = load_sample_groups(workdir, "features", split)
    scores_NC = safetensors.numpy.load_file(workdir / "evaluations/mixture.safetensors")["scores"]
    mixture = load_mixture(workdir / "students/mixture/model.safetensors")
    reader = SampleReader(split, LabelTargets(split, smear=False), mixture.image_size, None, seed=0)
    images = reader.read(np.arange(len(split)), 0).images
    for number in range(NUM_EXPERTS):
        expert = load_student(workdir / f"teachers/features-{number}/model.safetensors")
        mine = group_N == number
        with torch.inference_mode():
            np.testing.assert_allclose(scores_NC[mine], expert(images[mine]).numpy(), atol=1e-4)
    assert len(set(group_N.tolist())) > 1


@pytest.mark.parametrize("name", ["mixture", "shared"])
def test_a_mixture_is_evaluated_as_any_student_with_the_cost_of_one_expert(workdir, name):
    found = load_json(workdir / f"evaluations/{name}.json")
    assert found["num_samples"] == 60
    assert found["num_networks"] == 1
    assert found["mpvap"] > 0.2
    assert set(found["precision_at_k"]) == set(found["recall_at_k"]) == {"1", "3", "5", "10"}
    assert found["labels_per_sample"] > 1
    assert found["num_active_parameters"] < found["num_parameters"]["total"]
    gater = load_json(workdir / f"students/{name}/gater.json")
    assert sum(gater["load"]) == pytest.approx(1)
    assert gater["num_samples"] == 40
    assert gater["loss_best"] <= gater["loss_chosen"]


def test_the_nearest_centroid_agrees_with_the_groups_and_the_router_mostly(workdir):
    group_N = load_sample_groups(workdir, "features", load(workdir, "val"))
    gater = load_json(workdir / "students/mixture/gater.json")
    assert gater["agreement"] == 1
    assert gater["load"] == pytest.approx((np.bincount(group_N, minlength=NUM_EXPERTS) / len(group_N)).tolist())
    assert load_json(workdir / "students/shared/gater.json")["agreement"] > 0.5


def test_again_it_does_nothing_and_another_config_is_refused(workdir):
    again = concentrate("mixture", f"workdir={workdir}", directory=workdir.parent)
    assert "finished already" in again.out
    other = concentrate("mixture", "top_experts=2", f"workdir={workdir}", directory=workdir.parent, code=2)
    assert "top_experts was 1, is 2" in one_line(other)


def test_the_report_shows_mixtures(workdir):
    concentrate("report", "name=mixture", f"workdir={workdir}", directory=workdir.parent)
    assert set(load_json(workdir / "report/metrics.json")) == {"mixture", "shared"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teacher", "group=3"), "the grouping has the groups 0 to 2"),
        (("teacher", "group=x"), "group='x': expected the number of a group, or GROUPING/NUMBER"),
        (("teacher", "group=1", "vertical=fruit"), "vertical=fruit with group=1"),
        (("teacher", "group=others/0"), "no grouping 'others'"),
        (("teacher",), "'vertical' is missing: give vertical=VALUE, or group=ID"),
        (("mixture", "name=m", "grouping=others"), "no grouping 'others'"),
        (("mixture", "name=specialists"), "give the mixture another name"),
        (("mixture", "name=m", "top_experts=3"), "top_experts=3"),
        (("mixture", "name=m", "gater.hidden=3"), "gater.hidden"),
    ],
)
def test_a_mistake_is_one_line(workdir, arguments, message):
    finished = concentrate(*arguments, f"workdir={workdir}", directory=workdir.parent, code=2)
    assert message in one_line(finished)


def test_an_expert_that_is_missing_is_named(workdir):
    path = workdir / "teachers/features-1"
    path.rename(path.with_name("away"))
    try:
        finished = concentrate("mixture", "name=m", f"workdir={workdir}", directory=workdir.parent, code=2)
    finally:
        path.with_name("away").rename(path)
    assert "run `concentrate teacher group=features/1` first" in one_line(finished)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [("features/centroids.safetensors", ("mixture",)), ("features.json", ("augment", "heads.grouping=features"))],
)
def test_a_file_of_another_grouping_is_refused(workdir, file, arguments):
    path = workdir / "groupings" / file
    if not (workdir / "groupings/other").exists():
        concentrate("group", "name=other", "method=features", f"method.num_groups={NUM_EXPERTS}", "seed=7", "method.layer=top1",
                    "method.num_start=64", f"workdir={workdir}", directory=workdir.parent)  # fmt: skip
    was = path.read_bytes()
    path.write_bytes((workdir / "groupings" / file.replace("features", "other")).read_bytes())
    try:
        finished = concentrate(*arguments, "name=m", f"workdir={workdir}", directory=workdir.parent, code=2)
    finally:
        path.write_bytes(was)
    assert f"{file}: missing or changed since `concentrate group` made it; bring it back, or group again" in one_line(
        finished
    )
