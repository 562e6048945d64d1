"""`concentrate calibrate`: fitted on val, measured on test; its numbers are those of the saved scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from real_runs import (
    IMAGE_SIZE,
    TINY,
    concentrate_here,
    draw_image,
    load_json,
    prepare_shards_here,
    taxonomy_of_fruit_and_tools,
    write_tar,
)

from concentration.errors import ConfigError, DataError
from concentration.metrics.calibration import expected_calibration_error, load_scaling, sigmoid
from concentration.taxonomy import Taxonomy

OTHERS = ("moon", "star", "taxi", "tram")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist, two teachers, their calibrations, and a working directory of other classes and one of ours."""
    directory = tmp_path_factory.mktemp("calibrate")
    workdir = prepare_shards_here(directory)
    classes = [{"id": c, "vertical": "sky" if c in OTHERS[:2] else "cars"} for c in OTHERS]
    given = directory / "elsewhere"
    given.mkdir()
    (given / "taxonomy.json").write_text(json.dumps({"classes": [*classes, {"id": "saw", "vertical": "cars"}]}))
    for split in ("train", "test"):
        samples = [(f"{split}{n}", [c], draw_image(c, 900 + n)) for n, c in enumerate((*OTHERS, "saw") * 4)]
        write_tar(given / f"{split}-000000.tar", samples)
    concentrate_here("prepare", "data=shards", f"data.path={given}", f"data.image_size={IMAGE_SIZE}", "num_processes=1",
                f"workdir={directory / 'other'}")  # fmt: skip
    common = (f"workdir={workdir}", *TINY)
    concentrate_here("student", "name=generalist", "targets=labels", *common)
    for vertical in ("fruit", "tools"):
        concentrate_here("teacher", f"vertical={vertical}", *common)
    concentrate_here("evaluate", "name=generalist", "save_scores=true", f"workdir={workdir}")
    concentrate_here("calibrate", "name=generalist", f"outside={directory / 'other'}", "batch_size=25", f"workdir={workdir}",
                "thresholds.precision=0.6", "thresholds.min_answers=3")  # fmt: skip
    return workdir


@pytest.fixture(scope="module")
def content(workdir) -> dict:
    return load_json(workdir / "calibrations/generalist.json")


def test_its_numbers_are_those_of_the_saved_scores(workdir, content):
    taxonomy = Taxonomy.from_json(taxonomy_of_fruit_and_tools())
    arrays = safetensors.numpy.load_file(workdir / "evaluations/generalist.safetensors")
    has_leaf_N = (arrays["labels"].astype(bool) & taxonomy.is_leaf).any(1)
    scores_NC, label_NC = (arrays[name][has_leaf_N] for name in ("scores", "labels"))
    scaling = load_scaling(content, taxonomy)
    for key, logit_NC in (
        ("before", scores_NC.astype(np.float64)),
        ("after", scaling.scale(scores_NC, taxonomy.vertical_of_output)),
    ):
        best_N = np.where(taxonomy.is_leaf, logit_NC, -np.inf).argmax(1)
        right_N = label_NC[np.arange(len(best_N)), best_N] > 0
        probability_N = sigmoid(logit_NC[np.arange(len(best_N)), best_N])
        assert content[key]["top1"] == pytest.approx(right_N.mean())
        assert content[key]["ece"] == pytest.approx(expected_calibration_error(probability_N, right_N), abs=1e-4)
        assert sum(b["num_answers"] for b in content[key]["reliability"]) == len(best_N) == content["num_test"]
    assert content["before"]["top1"] == pytest.approx(load_json(workdir / "evaluations/generalist.json")["top1"])
    assert content["methods"]["vertical platt"]["test"]["top1"] == content["after"]["top1"]
    assert content["methods"]["none"]["test"]["ece"] == content["before"]["ece"]


def test_what_the_page_shows_of_using_it_runs(workdir):
    page = (Path(__file__).parents[2] / "docs/calibration.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = example.replace('Path("runs/mine")', "workdir").replace(
        "calibrations/student.json", "calibrations/generalist.json"
    )
    variables = {"workdir": workdir, "images": torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    exec(compile(example.replace("students/student", "students/generalist"), "calibration.md", "exec"), variables)
    assert variables["probability_BC"].shape == (2, variables["taxonomy"].num_classes)


def test_thresholds_and_none_of_these_say_what_they_do(content):
    thresholds, none = content["thresholds"], content["none_of_these"]
    assert thresholds["by_vertical"].keys() == {"fruit", "tools"}
    assert set(thresholds["by_class"]) <= {c["id"] for c in taxonomy_of_fruit_and_tools()["classes"]}
    assert thresholds["wanted"] == {"precision": 0.6, "min_answers": 3}
    assert none["false_rejection_rate"]["val"] <= none["false_rejection_rate"]["wanted"] == 0.05
    assert none["left_out"].keys() == {"fruit", "tools"}
    assert none["outside"]["num_images"] == 16, "four images of `saw`, which is known here, are left out"
    for each in (*none["left_out"].values(), none["outside"]):
        assert 0 <= each["rejected"] <= 1
        assert 0 <= each["auroc"] <= 1


def test_a_teacher_and_the_ensemble_are_calibrated_as_well(workdir):
    for name, num_verticals, *options in (("tools", 1, f"outside={workdir}"), ("specialists", 2)):
        out = concentrate_here("calibrate", f"name={name}", f"workdir={workdir}", *options)
        assert "top-1 over all classes on test" in out
        assert len(load_json(workdir / f"calibrations/{name}.json")["scaling"]) == num_verticals
    fruit = load_json(workdir / "calibrations/tools.json")["none_of_these"]["outside"]
    assert 0 < fruit["num_images"] < 60, "images of other verticals alone are outside of a teacher's"


def test_a_calibration_that_was_deleted_is_made_again(workdir):
    path = workdir / "calibrations/tools.json"
    concentrate_here("calibrate", "name=tools", f"outside={workdir}", f"workdir={workdir}")
    content = path.read_bytes()
    path.unlink()
    concentrate_here("calibrate", "name=tools", f"outside={workdir}", f"workdir={workdir}")
    assert path.read_bytes() == content


def test_it_is_done_once_shown_in_the_report_and_refuses_what_does_not_fit(workdir, content):
    directory, same = workdir.parent, ("name=generalist", f"workdir={workdir}")
    outside = (f"outside={directory / 'other'}", "thresholds.precision=0.6", "thresholds.min_answers=3")
    assert "finished already" in concentrate_here("calibrate", *same, *outside)
    with pytest.raises(ConfigError) as error:
        concentrate_here("calibrate", *same, *outside, "form=temperature")
    message = str(error.value)
    assert "form was 'platt', is 'temperature'" in message
    itself = (f"outside={workdir}", "overwrite=true")
    with pytest.raises(ConfigError) as error:
        concentrate_here("calibrate", *same, *itself)
    message = str(error.value)
    assert "all test images there have a class that generalist knows" in message
    with pytest.raises(DataError, match="for the verticals fruit, tools, here fruit"):
        load_scaling(content, Taxonomy.from_json(taxonomy_of_fruit_and_tools()).restrict("fruit"))
    concentrate_here("report", *same)
    page = (workdir / "report/index.html").read_text()
    assert '<section id="calibration">' in page
    assert "images of elsewhere" in page
