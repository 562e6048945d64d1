"""The comparison of quality and cost: who is on the front, and what the page shows of it."""

import re

import numpy as np
import pytest

from concentration.stages.report_page import ReportInputs, build_report_page
from concentration.stages.report_tradeoff import QUALITIES, System, build_tradeoff_part, find_front

#: name: (mpvap, multiply-adds)
SYSTEMS = {"a": (0.5, 10.0), "b": (0.7, 20.0), "c": (0.6, 20.0), "d": (0.65, 30.0), "e": (0.9, 400.0), "f": (0.7, 25.0)}


def describe(values) -> list[System]:
    return [
        System(name, "--c:red", dict.fromkeys(QUALITIES, quality), {"multiply_adds": cost, "active": cost}, cost)
        for name, (quality, cost) in values.items()
    ]


def evaluation(quality: float, cost: float, active: float | None = None) -> dict:
    found = {"mpvap": quality, "top1": quality / 2, "map_at_50": quality / 3, "multiply_adds": cost}
    found["num_parameters"] = {"base": 1, "top": 2, "total": 3 * cost}
    return found if active is None else found | {"num_active_parameters": active}


def test_the_front_holds_whom_none_beats_at_the_same_cost():
    front = find_front(describe(SYSTEMS), "mpvap", "multiply_adds")
    assert front == ["a", "b", "e"]
    for name, (quality, cost) in SYSTEMS.items():
        is_beaten = any(q >= quality and c <= cost and (q, c) != (quality, cost) for q, c in SYSTEMS.values())
        assert (name in front) != is_beaten


def test_a_system_without_a_number_is_on_no_front():
    systems = describe({**SYSTEMS, "g": (None, 1.0), "h": (0.99, None)})
    assert find_front(systems, "mpvap", "multiply_adds") == ["a", "b", "e"]


def test_the_part_is_drawn_for_four_systems_and_more():
    evaluations = {name: evaluation(*values) for name, values in SYSTEMS.items()}
    looks = dict.fromkeys(SYSTEMS, "--c:blue")
    assert build_tradeoff_part(dict(list(evaluations.items())[:3]), looks) == {}
    part = build_tradeoff_part(evaluations, looks)
    assert [row["name"] for row in part["rows"]] == ["a", "b", "c", "f", "d", "e"]
    assert [row["name"] for row in part["rows"] if row["qualities"][0]["is_on_front"]] == ["a", "b", "e"]
    assert part["plots"].count("<figure") == 6
    for figure in re.findall(r"<figure.*?</figure>", part["plots"], re.DOTALL):
        assert figure.count('class="dot"') == 2 * 6, "in the plot, and beside the name"
        assert figure.count('class="end"') == 6
        places = re.findall(r'class="dot"[^>]*d="M(\d+) (\d+)h0"', figure)
        assert all(0 <= int(x) <= 1000 and 0 <= int(y) <= 1000 for x, y in places)


def test_each_of_many_systems_has_a_line_for_its_name():
    names = [f"system {n}" for n in range(30)]
    part = build_tradeoff_part({name: evaluation(0.5, 20.0) for name in names}, dict.fromkeys(names, "--c:blue"))
    for figure in re.findall(r"<figure.*?</figure>", part["plots"], re.DOTALL):
        heights = sorted(float(top) for top in re.findall(r'class="end" dir="auto" style="top:([\d.]+)px', figure))
        assert np.diff(heights).min() >= 14


def test_parameters_in_use_are_all_where_nothing_else_is_said():
    part = build_tradeoff_part(
        {name: evaluation(0.5, 20.0, active=7 if name == "mixture" else None) for name in ("x", "y", "z", "mixture")},
        dict.fromkeys(("x", "y", "z", "mixture"), "--c:blue"),
    )
    assert {row["name"]: row["costs"][1] for row in part["rows"]} == {"x": "60", "y": "60", "z": "60", "mixture": "7"}


@pytest.mark.parametrize("name", ["<b>", "mixture"])
def test_the_page_shows_it_and_escapes_names(name):
    evaluations = {f"{name}{n}": evaluation(0.4 + n / 10, 10.0**n) for n in range(5)}
    page = build_report_page(ReportInputs(title="t", workdir="w", evaluations=evaluations))
    assert '<section id="tradeoff">' in page
    assert "<b>0" not in page
    assert '<section id="tradeoff">' not in build_report_page(
        ReportInputs(title="t", workdir="w", evaluations=dict(list(evaluations.items())[:2]))
    )
