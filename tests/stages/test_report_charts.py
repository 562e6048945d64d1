"""Axes, labels and thinned curves of the report's charts."""

import re

import numpy as np
import pytest

from concentration.stages.report_charts import Axis, LineChart, Series, draw_line_chart, spread_labels
from concentration.stages.report_curves import build_pace_part
from concentration.stages.report_values import format_points, format_short, read_curves, thin_curve


def test_a_name_that_is_cut_keeps_its_beginning_in_either_direction(browser, tmp_path):
    names = ["a name of many words that is longer than its place", "שם ארוך מאוד של קבוצה שאין לה מקום בשוליים"]
    series = [Series(name, np.array([[0.0, n], [1.0, n]]), "--c:red") for n, name in enumerate(names)]
    style = (
        ".plot {position: relative} .end {position: absolute; max-width: 90px; overflow: hidden; white-space: nowrap}"
    )
    page = f"<meta charset=utf-8><style>{style}</style>{draw_line_chart(LineChart('t', series, names='line_end'))}"
    (tmp_path / "chart.html").write_text(page, encoding="utf-8")
    browser.get((tmp_path / "chart.html").as_uri())
    script = """return [...document.querySelectorAll('.end')].map(end => {
        const range = document.createRange(), text = document.createTreeWalker(end, NodeFilter.SHOW_TEXT).nextNode();
        range.setStart(text, 0); range.setEnd(text, 1);
        const first = range.getBoundingClientRect(), place = end.getBoundingClientRect();
        return first.left >= place.left - 1 && first.right <= place.right + 1; })"""
    assert browser.execute_script(script) == [True, True]


def test_the_charts_of_gamma_of_200_verticals_fit_a_screen_and_name_those_that_have_room_for_it():
    verticals = [f"vertical {number}." for number in range(200)]
    curves = {f"train/{v}/gamma": np.array([[0.0, 1.0], [9.0, 2.0 + n]]) for n, v in enumerate(verticals)}
    charts = build_pace_part({"students/student": curves}, verticals, "student").charts
    heights = [int(height) for height in re.findall(r'class="plot"[^>]*height:(\d+)px', charts)]
    assert len(heights) == 2
    assert max(heights) <= 640
    named = re.findall(r'class="end"[^>]*>([^<]*)<', charts)
    assert len(named) <= 2 * 640 / 15
    assert {verticals[0], verticals[-1]} <= set(named), "the outermost are named"
    assert charts.count('class="line"') == 400, "every line is drawn, and says its name when pointed at"
    assert f"{len(named) // 2} of 200 are named" in charts
    assert not {"dot", "touch", "hole"} & set(re.findall(r'<path class="(\w+)"', charts)), (
        "marks would cover each other"
    )
    few = {f"train/{v}/gamma": curves[f"train/{v}/gamma"] for v in verticals[:10]}
    assert 'class="dot"' in build_pace_part({"students/student": few}, verticals, "student").charts


@pytest.mark.parametrize("num_ticks", [3, 5])
@pytest.mark.parametrize(
    "axis",
    [
        Axis(0.0, 1.0),
        Axis(0.0, 5996.0),
        Axis(-3.2, 7.9),
        Axis(9.99, 10.01),
        Axis(2.0, 900.0, "log"),
        Axis(1.1, 1.9, "log"),
        Axis(1e-9, 1e9, "log"),
        Axis(0.0, 3e-7),
    ],
)
def test_ticks_are_few_ordered_and_on_the_axis(axis, num_ticks):
    ticks = axis.ticks(num_ticks)
    assert 2 <= len(ticks) <= 2 * num_ticks
    assert ticks == sorted(set(ticks))
    assert all(axis.low * 0.999 - 1e-12 <= tick <= axis.high * 1.001 for tick in ticks)


def test_labels_that_fit_stay_and_crowded_ones_part_around_their_middle():
    assert spread_labels([200.0, 10.0], 15, 280) == [200.0, 10.0]
    assert spread_labels([100.0, 100.0, 100.0], 15, 280) == pytest.approx([85.0, 100.0, 115.0])


@pytest.mark.parametrize("seed", range(20))
def test_labels_keep_order_distance_and_bounds(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(0, 280, size=rng.integers(1, 30)).tolist()
    placed = spread_labels(wanted, 15, 280)
    gap = min(15, 280 / max(len(wanted) - 1, 1))
    assert np.all(np.diff(np.array(placed)[np.argsort(wanted, kind="stable")]) >= gap - 1e-9)
    assert min(placed) >= -1e-9
    assert max(placed) <= 280 + 1e-9


def test_buckets_hold_the_mean_and_the_range_of_their_points():
    points = np.stack([np.arange(1000.0), np.arange(1000.0) % 10], axis=1)
    curve = thin_curve(points, 100)
    assert curve.x.tolist() == pytest.approx([4.5 + 10 * n for n in range(100)])
    assert set(curve.y) == {4.5}
    assert set(curve.low) == {0.0}
    assert set(curve.high) == {9.0}


def test_short_curves_are_not_thinned():
    points = np.array([[0.0, 3.0], [5.0, 1.0]])
    curve = thin_curve(points, 100)
    assert curve.y.tolist() == curve.low.tolist() == curve.high.tolist() == [3.0, 1.0]


def test_a_step_that_was_logged_again_after_a_resume_counts_once_and_last():
    lines = [{"step": s, "train/loss": v} for s, v in ((0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0), (2, 5.0))]
    assert read_curves(lines)["train/loss"].tolist() == [[0.0, 9.0], [1.0, 6.0], [2.0, 5.0]]


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.1, 0.1 + 1e-17], [-1.0, 1.0], [1e-300, 1e99], [0.0, 1e-320]])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_any_finite_curve_can_be_drawn(values, scale):
    points = np.stack([np.arange(len(values), dtype=float), np.array(values)], axis=1)
    chart = LineChart("t", [Series("s", points, "red")], names="line_end", y_scale=scale)
    drawn = draw_line_chart(chart)
    assert "nan" not in drawn
    assert "inf" not in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (999.7, "1,000"),
        (9_999, "9,999"),
        (12_345, "12.3k"),
        (999_900, "1M"),
        (4.93e6, "4.93M"),
        (2.1e9, "2.1G"),
        (-5.0, "−5"),
        (-2e6, "−2M"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_short(value) == text


def test_points_have_a_sign_but_zero_has_none():
    assert [format_points(x) for x in (0.0912, -0.0912, -0.0001, None)] == ["+9.1", "−9.1", "0.0", "–"]
