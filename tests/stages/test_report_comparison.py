"""What one network gained and lost against another."""

import pytest

from concentration.stages.report_comparison import (
    build_comparison_part,
    build_teachers_part,
    compare_classes,
    count_by_vertical,
)


def evaluation(**aps) -> dict:
    classes = [{"id": c, "name": c.upper(), "vertical": c[0], "ap": ap, "num_test": 3} for c, ap in aps.items()]
    return {"mpvap": 0.5, "top1": 0.25, "pvap": {"a": 0.5}, "classes": classes}


OLD = evaluation(a1=0.5, a2=0.9, a3=0.4, b1=None, b2=0.1)
NEW = evaluation(a1=0.8, a2=0.2, a3=0.403, b1=0.7, b3=0.6)


def test_classes_are_joined_by_their_ids_and_sorted_by_what_they_lost():
    rows = compare_classes(OLD, NEW)
    assert [row["id"] for row in rows[:3]] == ["a2", "a3", "a1"]
    assert rows[0]["gain"] == pytest.approx(-0.7)
    assert {row["id"] for row in rows[3:]} == {"b1", "b2", "b3"}, "without a gain: no AP, gone, new"
    assert count_by_vertical(rows) == {"a": {"gained": 1, "lost": 1, "level": 1}}


def test_the_sentence_counts_classes_and_images():
    flips = {"num_samples": 9, "same": 3, "only_first_right": 2, "only_second_right": 4}
    part = build_comparison_part(
        ("old", "new"), {"old": OLD, "new": NEW}, {"overall": flips, "by_vertical": {"a": flips}}
    )
    assert (
        "1 classes gained AP, 1 lost some, 1 are level. 4 test images are newly right, 2 newly wrong."
        in part["sentence"]
    )
    assert part["verticals"][0]["cells"][-2:] == ["4", "2"]
    assert [title for title, _ in part["tables"]] == ["Lost most", "Gained most", "New or gone"]
    assert build_comparison_part((), {}, None) is None
    assert build_comparison_part(("old", "new"), {"old": {}, "new": {}}, None)["all"] == []


def test_gates_are_shown_without_evaluations_and_the_other_way_round():
    gates = {"a": {"ap": 0.5, "problems": ["it knows nothing"]}, "b": {"ap": 0.9, "problems": []}}
    part = build_teachers_part(gates, ("specialists", "student"), {}, None)
    assert part["problems"] == [("a", "it knows nothing")]
    assert [row["is_fit"] for row in part["rows"]] == [False, True]
    part = build_teachers_part({}, ("specialists", "student"), {"specialists": OLD, "student": NEW}, None)
    assert part["rows"][0]["cells"][-2:] == ["1", "1"]
    assert build_teachers_part({}, ("specialists", "student"), {"student": NEW}, None) is None
