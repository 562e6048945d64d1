"""What targets cost: sums over verticals, the two ways of having teachers beside each other, and missing numbers."""

import pytest

from concentration.stages.report_page import ReportInputs, build_report_page
from concentration.stages.report_targets import build_targets_part

VERTICAL = {"codec": "packed", "top_k": 100, "views": 2, "num_records": 1000, "bytes_per_record": 187.5}
SETS = {"default": [{**VERTICAL, "images_per_second": 100.0}, {**VERTICAL, "images_per_second": 50.0}]}
STUDENTS = {
    "stored": {"targets": {"kind": "soft", "name": "default"}, "num_images": 4000, "images_per_second": 200.0},
    "loop": {"targets": {"kind": "online"}, "num_images": 4000, "images_per_second": 40.0},
    "generalist": {"targets": {"kind": "labels"}, "num_images": 4000, "images_per_second": 200.0},
}


def test_a_set_is_the_sum_of_its_verticals():
    (row,) = build_targets_part(SETS, STUDENTS)["sets"]
    assert row == {"name": "default", "codec": "packed", "top_k": "100", "views": "2", "num_records": "2,000",
                   "bytes": "375kB", "seconds": "30 s"}  # fmt: skip


def test_making_the_targets_counts_and_the_faster_way_is_named():
    part = build_targets_part(SETS, STUDENTS)
    rows = {row["student"]: row for row in part["students"]}
    assert rows.keys() == {"stored", "loop"}, "labels need no teachers"
    assert [rows["stored"][key] for key in ("before", "training", "total")] == ["30 s", "20 s", "50 s"]
    assert [rows["loop"][key] for key in ("before", "training", "total")] == ["0 s", "100 s", "100 s"]
    assert "Storing the targets first was faster: 50 s for stored" in part["sentence"]
    assert "against 100 s for loop" in part["sentence"]
    quick = {**STUDENTS, "loop": {**STUDENTS["loop"], "images_per_second": 400.0}}
    assert build_targets_part(SETS, quick)["sentence"].startswith("Asking the teachers in every step was faster: 10 s")


@pytest.mark.parametrize("missing", ["num_records", "bytes_per_record", "images_per_second"])
def test_what_was_not_measured_is_a_dash_and_not_compared(missing):
    sets = {"default": [SETS["default"][0], {k: v for k, v in SETS["default"][1].items() if k != missing}]}
    part = build_targets_part(sets, STUDENTS)
    assert "–" in part["sets"][0].values()
    assert (part["sentence"] is None) == (missing != "bytes_per_record")


def test_without_soft_targets_there_is_no_part():
    assert build_targets_part(SETS, {"generalist": STUDENTS["generalist"]}) is None
    assert build_targets_part({}, {}) is None


def test_the_page_shows_it():
    page = build_report_page(ReportInputs(title="t", workdir="w", evaluations={}, target_sets=SETS, students=STUDENTS))
    assert "Storing the targets first was faster" in page
    assert "teachers in the loop" in page
