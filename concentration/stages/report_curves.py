"""The report's parts on training: losses, validation and gamma over steps, and the same for each vertical."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from concentration.stages.report_charts import LineChart, Series, choose_named, draw_legend, draw_line_chart
from concentration.stages.report_looks import plain
from concentration.stages.report_values import DASH, format_count, format_percent, format_short

#: The curves of one run by key, each (N, 2) step and value, N >= 1.
Curves = Mapping[str, np.ndarray]
#: The options of small charts, many of which stand side by side.
SMALL = {"height_px": 96, "max_points": 90, "num_ticks": 3, "names": "hidden"}
#: The greatest height of a chart with names at the ends of its lines, about that of a screen.
_MOST_HIGH_PX = 640


@dataclass(frozen=True)
class PacePart:
    """The gamma of every vertical of one run, as charts and as table rows."""

    run: str
    charts: Markup
    rows: list[list[str]]


def draw_student_charts(runs: Mapping[str, Curves], looks: Mapping[str, str]) -> Markup:
    """Charts of the students' training loss and of their mpvap on val, with a line for each run."""
    students = _runs_below("students/", runs)
    loss = _series_of(students, "train/loss", looks)
    mpvap = _series_of(students, "val/mpvap", looks)
    return Markup("").join(
        [
            draw_line_chart(LineChart("Training loss", loss, y_scale=_scale_for(loss))),
            draw_line_chart(LineChart("mpvap on val", mpvap, y_format=format_percent)),
        ]
    )


def draw_teacher_charts(runs: Mapping[str, Curves], looks: Mapping[str, str]) -> Markup:
    """A small chart of the training loss of each teacher. Each has its own axis, since a loss grows with its vertical's size."""
    charts = []
    for vertical, curves in _runs_below("teachers/", runs).items():
        loss = curves.get("train/loss")
        if loss is not None:
            series = [Series(vertical, loss, looks["specialists"])]
            note = f"{format_short(float(loss[0, 1]))} → {format_short(float(loss[-1, 1]))}"
            charts.append(draw_line_chart(LineChart(vertical, series, note, y_scale=_scale_for(series), **SMALL)))
    return Markup("").join(charts)


def summarise_runs(runs: Mapping[str, Curves]) -> list[list[str]]:
    """A row for each run, students first.

    The columns are: name, steps, final loss, best AP on val and its step, and the medians of the samples per second, of the share
    of time spent waiting for data, and of the norm of the gradient.
    """
    rows = []
    for run, curves in sorted(runs.items(), key=lambda item: not item[0].startswith("students/")):
        steps = max((float(points[-1, 0]) for points in curves.values()), default=None)
        loss = curves.get("train/loss")
        rows.append(
            [
                run,
                format_count(steps),
                DASH if loss is None else format_short(float(loss[-1, 1])),
                _describe_best(curves.get("val/mpvap", curves.get(f"val/{run.rpartition('/')[2]}/ap"))),
                format_short(_median(curves.get("train/samples_per_second"))),
                format_percent(_median(curves.get("train/data_wait_share"))),
                format_short(_median(curves.get("train/gradient_norm"))),
            ]
        )
    return rows


def build_pace_part(runs: Mapping[str, Curves], order: Sequence[str], subject: str) -> PacePart | None:
    """The gamma of the subject, or if it has none, of the first student that has; None if no student has a gamma."""
    students = _runs_below("students/", runs)
    for run in sorted(students, key=lambda name: name != subject):
        gammas = _by_vertical(students[run], "train/", "/gamma", order)
        if gammas:
            break
    else:
        return None
    hues = {vertical: _hue(number) for number, vertical in enumerate(order)}
    absolute = [Series(vertical, points, hues[vertical]) for vertical, points in gammas.items()]
    relative = [
        Series(vertical, points / [1.0, points[0, 1]], hues[vertical])
        for vertical, points in gammas.items()
        if points[0, 1] != 0
    ]
    height = min(max(280, 16 * len(gammas)), _MOST_HIGH_PX)
    routed = _by_vertical(students[run], "train/", "/routed", order)
    charts = [
        LineChart("gamma", absolute, height_px=height, names="line_end", y_scale=_scale_for(absolute)),
        LineChart("gamma relative to its start", relative, height_px=height, names="line_end"),
    ]
    charts = [replace(chart, note=_describe_named(chart)) for chart in charts]
    rows = [
        [
            vertical,
            format_short(float(points[0, 1])),
            format_short(float(points[-1, 1])),
            f"× {points[-1, 1] / points[0, 1]:.3f}" if points[0, 1] else DASH,
            format_count(float(routed[vertical][-1, 1])) if vertical in routed else DASH,
        ]
        for vertical, points in gammas.items()
    ]
    return PacePart(run, Markup("").join(map(draw_line_chart, charts)), rows)


def draw_vertical_charts(
    runs: Mapping[str, Curves], looks: Mapping[str, str], order: Sequence[str], prefix: str, suffix: str
) -> Markup:
    """A small chart for each vertical, of the curves with the key `prefix + VERTICAL + suffix`, with a line for each student."""
    found = {run: _by_vertical(c, prefix, suffix, order) for run, c in _runs_below("students/", runs).items()}
    found = {run: curves for run, curves in found.items() if curves}
    if not found:
        return Markup("")
    charts = []
    is_fraction = suffix == "/ap"
    for vertical in order:
        series = [Series(run, c[vertical], looks[run]) for run, c in found.items() if vertical in c]
        if series:
            scale = "linear" if is_fraction else _scale_for(series)
            y_format = format_percent if is_fraction else format_short
            y_range = (0.0, 1.0) if is_fraction else None
            chart = LineChart(vertical, series, y_scale=scale, y_format=y_format, y_range=y_range, **SMALL)
            charts.append(draw_line_chart(chart))
    legend = draw_legend([(run, looks[run]) for run in found])
    return Markup('{}<div class="multiples">{}</div>').format(legend, Markup("").join(charts))


def verticals_in_curves(runs: Mapping[str, Curves]) -> list[str]:
    """The verticals of all runs: each VERTICAL of a key train/VERTICAL/gamma, train/VERTICAL/loss or val/VERTICAL/ap."""
    forms = (("train/", "/gamma"), ("train/", "/loss"), ("val/", "/ap"))
    found = [
        key[len(prefix) : -len(suffix)]
        for curves in runs.values()
        for key in curves
        for prefix, suffix in forms
        if key.startswith(prefix) and key.endswith(suffix) and len(key) > len(prefix) + len(suffix)
    ]
    return list(dict.fromkeys(found))


def _runs_below(folder: str, runs: Mapping[str, Curves]) -> dict[str, Curves]:
    """The runs whose name begins with `folder`, by the rest of the name."""
    return {run.removeprefix(folder): curves for run, curves in runs.items() if run.startswith(folder)}


def _by_vertical(curves: Curves, prefix: str, suffix: str, order: Sequence[str]) -> dict[str, np.ndarray]:
    """The curves with the keys `prefix + VERTICAL + suffix`, by vertical."""
    return {v: curves[f"{prefix}{v}{suffix}"] for v in order if f"{prefix}{v}{suffix}" in curves}


def _describe_named(chart: LineChart) -> str:
    num_named, num_all = len(choose_named(chart)), len(chart.series)
    return "" if num_named == num_all else f"{num_named} of {num_all} are named; a line says its name when pointed at"


def _series_of(runs: Mapping[str, Curves], key: str, looks: Mapping[str, str]) -> list[Series]:
    return [Series(run, curves[key], looks[run]) for run, curves in runs.items() if key in curves]


def _scale_for(series: Sequence[Series]) -> str:
    """`log` if all values are positive and span more than a factor of eight, otherwise `linear`."""
    low = min((float(s.points[:, 1].min()) for s in series), default=0.0)
    high = max((float(s.points[:, 1].max()) for s in series), default=0.0)
    return "log" if low > 0 and high > 8 * low else "linear"


def _hue(number: int) -> str:
    # Steps of the golden angle around the colour wheel keep each hue far from the few before it.
    return plain(f"hsl({math.fmod(222 + 137.508 * number, 360):.0f} var(--line-saturation) var(--line-lightness))")


def _median(points: np.ndarray | None) -> float | None:
    return None if points is None else float(np.median(points[:, 1]))


def _describe_best(points: np.ndarray | None) -> str:
    if points is None:
        return DASH
    best = points[points[:, 1].argmax()]
    return f"{format_percent(float(best[1]))} at {format_count(float(best[0]))}"
