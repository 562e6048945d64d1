"""`plan=true`: what a training would need, said before anything is trained, and nothing is written for it."""

import re
import shutil

import pytest
from real_runs import TINY, concentrate, one_line, prepare_shards


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return prepare_shards(tmp_path_factory.mktemp("plan"))


def plan(workdir, *arguments, code=0):
    before = sorted(workdir.rglob("*"))
    finished = concentrate(
        arguments[0], *TINY, *arguments[1:], "plan=true", f"workdir={workdir}", directory=workdir.parent, code=code
    )
    assert sorted(workdir.rglob("*")) == before, "a plan writes nothing"
    return finished


def rows_of(printed: str, name: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [[cell.strip() for cell in line.strip("│").split("│")][1:] for line in lines]


def row_of(printed: str, name: str) -> list[str]:
    [row] = rows_of(printed, name)
    return row


@pytest.mark.parametrize(
    "verb", [("student", "targets=labels"), ("student", "tail=spread"), ("teacher", "vertical=tools")]
)
def test_a_plan_shows_layers_and_memory_before_there_is_any(workdir, verb):
    printed = plan(workdir, *verb).out
    assert row_of(printed, "base.blocks.0.0") == ["108", "27,648"]  # 3 x 4 x 3 x 3 weights at 16 x 16 places
    assert row_of(printed, "top.classifiers.tools") == ["36", "32"]  # 4 classes of 8 features, and biases
    assert f"{verb[0]} {'tools' if verb[0] == 'teacher' else 'student'}: " in printed
    assert "16 images of 16 pixels at a time, 32-true, adagrad" in printed
    [peak] = re.findall(r"expected peak: ([\d.]+) MiB of tensors", printed)
    assert float(peak) == max(float(cell) for cell in rows_of(printed, "all")[-1])


def test_a_plan_for_a_cluster_is_made_on_any_machine(workdir):
    sizes = (
        "trainer.batch_size=1600",
        "trainer.devices=8",
        "trainer.num_nodes=2",
    )  # auto would be what was started here
    printed = plan(workdir, "student", "targets=labels", "trainer=multi_node", *sizes).out
    assert "memory of one process on a gpu, in MiB: 100 images" in printed
    assert row_of(printed, "DDP's buckets")[0] == row_of(printed, "parameters")[0]


def test_a_plan_with_teachers_in_the_loop_needs_the_teachers(workdir, tmp_path):
    refused = one_line(plan(workdir, "student", "targets=online", code=2))
    assert "run `concentrate teacher vertical=fruit` first" in refused
    copy = shutil.copytree(workdir, tmp_path / "work")
    for vertical in ("fruit", "tools"):
        concentrate(
            "teacher", f"vertical={vertical}", *TINY, "trainer.max_steps=1", f"workdir={copy}", directory=tmp_path
        )
    assert "teachers in the loop: 0.0 MiB" in plan(copy, "student", "targets=online").out


def test_a_plan_of_what_cannot_be_had_is_one_clear_error(workdir, tmp_path):
    assert "run `concentrate prepare` first" in one_line(plan(tmp_path / "none", "student", code=2))
    assert "no vertical 'tool'" in one_line(plan(workdir, "teacher", "vertical=tool", code=2))
    assert "must be a multiple of 8" in one_line(
        plan(workdir, "student", "base.channels=[2,2,2]", "data.image_size=12", code=2)
    )
    external = ("external.path=x", "external.classes=identity", "external.output=sigmoid_logits")
    command = ("teacher", "vertical=tools", "external=onnx", *external, "plan=true", f"workdir={workdir}")
    assert "plan: no effect with external" in one_line(concentrate(*command, directory=tmp_path, code=2))


def test_a_plan_leaves_a_begun_training_as_it_is(workdir, tmp_path):
    """`plan` is no part of a run's identity: the same command trains before and after it."""
    copy = shutil.copytree(workdir, tmp_path / "work")
    command = ("student", "targets=labels", *TINY, "trainer.max_steps=2", f"workdir={copy}")
    concentrate(*command, directory=tmp_path)
    plan(copy, "student", "targets=labels", "trainer.max_steps=2")
    assert "finished already" in concentrate(*command, directory=tmp_path).out
