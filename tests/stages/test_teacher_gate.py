"""Teachers are measured before their targets are made, and the student beside them afterwards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from real_runs import TINY, concentrate_here, load_json, prepare_shards_here

from concentration.errors import ConfigError
from concentration.stages import teacher_gate

VERTICALS = ("fruit", "tools")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist, a good teacher of fruit, and one of tools that was trained for a step; evaluated on val."""
    directory = tmp_path_factory.mktemp("gate")
    workdir = prepare_shards_here(directory)
    common = (f"workdir={workdir}", *TINY)
    concentrate_here("student", "name=generalist", "targets=labels", *common)
    concentrate_here("teacher", "vertical=fruit", *common, "trainer.max_epochs=6")
    concentrate_here("teacher", "vertical=tools", *common, "trainer.max_steps=1")
    for vertical in VERTICALS:
        concentrate_here("evaluate", f"name={vertical}", "split=val", f"workdir={workdir}")
    concentrate_here("evaluate", "name=generalist", "split=val", f"workdir={workdir}")
    return workdir


def evaluation(workdir: Path, name: str) -> dict:
    return load_json(workdir / "evaluations" / f"{name}.json")


def test_a_teacher_that_is_not_fit_stops_the_targets_in_one_line(workdir):
    arguments = ("targets", "vertical=tools", "gate.action=stop", "gate.min_images=20", f"workdir={workdir}")
    with pytest.raises(ConfigError) as error:
        concentrate_here(*arguments)
    message = str(error.value)
    assert message.startswith("teacher of tools: ")
    assert "it is worse than generalist: AP " in message
    assert message.endswith("train it longer or on more images, or go on with gate.action=report")
    assert not list((workdir / "targets/default/tools").glob("*.safetensors"))
    with pytest.raises(ConfigError) as error:
        concentrate_here(*arguments[:3], "gate.min_images=5000", arguments[-1])
    message = str(error.value)
    assert "training images at the median, expected 5000 (gate.min_images)" in message


def test_what_it_measures_is_what_evaluate_measures(workdir):
    out = concentrate_here("targets", f"workdir={workdir}")
    assert "NOTE: teacher of tools: " in out
    assert "NOTE: teacher of fruit" not in out
    for vertical in VERTICALS:
        gate = load_json(workdir / "gates" / f"{vertical}.json")
        assert gate["ap"] == pytest.approx(evaluation(workdir, f"{vertical}.val")["pvap"][vertical], abs=1e-5)
        assert gate["generalist_ap"] == pytest.approx(evaluation(workdir, "generalist.val")["pvap"][vertical], abs=1e-5)
        assert 0 < gate["constant_ap"] < gate["generalist_ap"]
        assert gate["num_val"] == evaluation(workdir, f"{vertical}.val")["num_samples"]
    with pytest.raises(ConfigError, match=r"teacher of tools: .*it is worse than generalist"):
        concentrate_here("targets", "gate.action=stop", f"workdir={workdir}")  # which are finished
    assert "finished already" in concentrate_here("targets", "vertical=fruit", "gate.action=stop", f"workdir={workdir}")


def test_what_all_teachers_are_held_against_is_read_once(workdir, tmp_path, monkeypatch):
    copy = tmp_path / "work"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "targets", ignore_errors=True)
    shutil.rmtree(copy / "gates", ignore_errors=True)
    read = []
    for name in ("load_network", "load_prepared_split"):
        load = getattr(teacher_gate, name)
        monkeypatch.setattr(teacher_gate, name, lambda *a, name=name, load=load: [read.append(name), load(*a)][1])
    concentrate_here("targets", f"workdir={copy}")
    assert all(load_json(copy / f"gates/{vertical}.json")["generalist_ap"] for vertical in VERTICALS)
    assert sorted(read) == ["load_network", "load_prepared_split"]


def test_a_loss_that_rose_answers_that_are_constant_and_no_validation_are_told(workdir, tmp_path):
    copy = tmp_path / "work"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "targets", ignore_errors=True)
    shutil.rmtree(copy / "students/generalist")
    for vertical, losses in (("fruit", (2.0, 1.0, 3.0, 6.0, 9.0)), ("tools", (2.0, 9.0))):
        lines = [json.dumps({"step": step, "seconds": 1, "train/loss": loss}) for step, loss in enumerate(losses)]
        (copy / "teachers" / vertical / "metrics.jsonl").write_text("\n".join(lines))
    out = concentrate_here("targets", f"workdir={copy}")
    assert "NOTE: teacher of fruit: it diverged: its loss rose from 1.5 to 7.5" in out
    assert out.count("diverged") == 1, "two batches' losses say nothing"
    assert "worse than" not in out, "there is nothing to compare it with"
    assert load_json(copy / "gates/tools.json")["generalist_ap"] is None
    shutil.rmtree(copy / "targets")
    shutil.rmtree(copy / "gates")
    out = concentrate_here("targets", f"workdir={copy}", "gate.action=off")
    assert "NOTE" not in out
    assert not (copy / "gates").exists()


def test_the_report_has_gates_agreement_and_two_students_class_by_class(workdir):
    common = (f"workdir={workdir}", *TINY)
    concentrate_here("targets", f"workdir={workdir}")
    concentrate_here("student", *common)
    for name in ("generalist", "specialists", "student"):
        concentrate_here("evaluate", f"name={name}", f"workdir={workdir}")
    concentrate_here("report", f"workdir={workdir}", "compare=[generalist,student]")
    page = (workdir / "report/index.html").read_text()
    assert '<section id="teachers">' in page
    assert '<section id="comparison">' in page
    assert "it is worse than generalist" in page
    agreement = load_json(workdir / "report/metrics.json")["student"]["agreement"]
    student, specialists = (evaluation(workdir, name) for name in ("student", "specialists"))
    assert agreement["by_vertical"].keys() == set(VERTICALS)
    overall = agreement["overall"]
    assert overall["num_samples"] == student["num_samples"] - student["num_samples_without_leaf"]
    gained = (overall["only_second_right"] - overall["only_first_right"]) / overall["num_samples"]
    assert gained == pytest.approx(student["top1"] - specialists["top1"])
    total = np.sum([[v["num_samples"], v["only_second_right"] - v["only_first_right"]]
                    for v in agreement["by_vertical"].values()], axis=0)  # fmt: skip
    assert total[1] / total[0] == pytest.approx(student["top1_in_vertical"] - specialists["top1_in_vertical"])
    with pytest.raises(ConfigError) as error:
        concentrate_here("report", f"workdir={workdir}", "compare=[old,student]")
    message = str(error.value)
    assert "no evaluation of old on test (there: generalist, specialists, student)" in message
