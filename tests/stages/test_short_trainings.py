"""Which trainings took few steps, by what their directories say."""

import json
from pathlib import Path

import pytest

from concentration.stages.short_trainings import describe_short_trainings


@pytest.fixture
def write(tmp_path):
    def write_steps(steps: dict[str, int | None]) -> Path:
        for name, step in steps.items():
            (tmp_path / name).mkdir(parents=True)
            facts = {} if step is None else {"step": step}
            (tmp_path / name / "DONE.json").write_text(json.dumps({"config": "0", **facts}))
        return tmp_path

    return write_steps


def test_enough_steps_are_not_told(write):
    workdir = write({"students/student": 300, "teachers/birds": 4000, "teachers/external": None})
    assert describe_short_trainings(workdir, ["generalist", "student"]) == ""


def test_only_the_teachers_are_proposed_to_train_longer_where_only_they_took_few_steps(write):
    workdir = write({"students/student": 900, "teachers/birds": 299, "teachers/cars": 63, "teachers/fish": 300})
    text = describe_short_trainings(workdir, ["student"])
    assert text.startswith("short trainings: 2 of 3 teachers took 63 to 299 steps; ")
    assert "with teacher.trainer.min_steps=1000 overwrite=changed" in text


def test_experts_are_no_teachers_and_what_is_compared_is_to_be_trained_as_much_longer(write):
    workdir = write(
        {"students/student": 24, "teachers/birds": 299, "teachers/features-0": 8, "teachers/features-1": 16}
    )
    for number in range(2):
        values = {"identity": {}, "config": {"group": f"features/{number}"}}
        (workdir / f"teachers/features-{number}/config.json").write_text(json.dumps(values))
    text = describe_short_trainings(workdir, ["student"])
    assert text.startswith(
        "short trainings: student took 24 steps, 1 of 1 teachers took 299 steps, 2 of 2 experts took 8 to 16 steps; "
    )
    assert text.endswith(
        "; where systems are compared, compare.long_trainer, compare.expert.trainer and compare.augment.trainer need as much "
        "more, or the comparison is of unequal trainings"
    )


def test_of_the_students_those_that_are_asked_for_are_looked_at(write):
    workdir = write({"students/student": 24, "students/other": 12, "students/unfinished": 1})
    (workdir / "students/unfinished/DONE.json").unlink()
    text = describe_short_trainings(workdir, ["student", "unfinished"])
    assert text.startswith(
        "short trainings: student took 24 steps; `concentrate run` with trainer.min_steps=1000 overwrite"
    )
