"""Draws the charts of the report as HTML with inline SVG: lines over steps, groups of bars, and the scale of the headline.

A chart has a fixed height and takes any width. The SVG of its lines is stretched, but strokes and texts are not, so that the same
chart can be read on a phone and on a wide screen. Texts reach the page only through `Markup.format`, which escapes them.

Shapes: N points of one curve.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from concentration.stages.report_looks import plain
from concentration.stages.report_values import format_percent, format_short, format_tick, thin_curve

#: The coordinates of the stretched SVG run from 0 to this number on both axes.
EXTENT = 1000
#: The height of a name at the end of a line.
LABEL_HEIGHT_PX = 15
#: The share of the width that a bar of 100% takes; the rest is for its number.
BAR_SHARE = 0.84


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what it is called.
        points: (N, 2) step and value, N >= 1.
        look: how it is drawn (`report_looks`).
    """

    name: str
    points: np.ndarray
    look: str


@dataclass(frozen=True)
class LineChart:
    """A chart of values over steps.

    Attributes:
        title, note: the texts above the chart.
        series: its lines.
        height_px: its height.
        max_points: how many points of a line are drawn; of more, neighbours are averaged.
        num_ticks: about how many ticks an axis has.
        names: where the names of the lines stand.
        y_scale: the scale of the values.
        y_range: the range of the values; None takes that of the lines.
        y_format: how a value is written.
    """

    title: str
    series: Sequence[Series]
    note: str = ""
    height_px: int = 260
    max_points: int = 240
    num_ticks: int = 5
    names: Literal["legend", "line_end", "hidden"] = "legend"
    y_scale: Literal["linear", "log"] = "linear"
    y_range: tuple[float, float] | None = None
    y_format: Callable[[float], str] = format_short


@dataclass(frozen=True)
class Bar:
    """A named fraction (None if unknown), and how it is drawn (`report_looks`)."""

    name: str
    fraction: float | None
    look: str


def draw_line_chart(chart: LineChart) -> Markup:
    """A figure with title, axes and lines; empty if the chart has no series."""
    if not chart.series:
        return Markup("")
    x_axis = _step_axis(max(float(s.points[-1, 0]) for s in chart.series), chart.num_ticks)
    y_axis = _axis(chart.y_range or _value_range(chart), chart.y_scale)
    lines = Markup("").join(_draw_series(series, chart, x_axis, y_axis) for series in chart.series)
    ends = _draw_end_labels(chart, y_axis) if chart.names == "line_end" else Markup("")
    return Markup(
        '<figure class="chart chart-{names}"><figcaption><b>{title}</b>{note}</figcaption>{legend}'
        '<div class="plot" role="img" aria-label="{summary}" style="height:{height}px">'
        '{ticks}<svg viewBox="0 0 {extent} {extent}" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'
        "{ends}</div></figure>"
    ).format(
        names=chart.names,
        title=chart.title,
        note=Markup(' <span class="note">{}</span>').format(chart.note) if chart.note else "",
        legend=draw_legend([(s.name, s.look) for s in chart.series]) if chart.names == "legend" else "",
        summary=_summarise(chart),
        height=chart.height_px,
        extent=EXTENT,
        ticks=draw_ticks(x_axis, y_axis, chart.num_ticks, has_percents=chart.y_format is format_percent),
        grid=draw_grid(x_axis, y_axis, chart.num_ticks),
        lines=lines,
        ends=ends,
    )


def is_crowded(chart: LineChart) -> bool:
    """Whether a chart with names at the ends of lines has more lines than names fit. Then marks would cover each other, too."""
    return chart.names == "line_end" and len(chart.series) > chart.height_px // LABEL_HEIGHT_PX


def choose_named(chart: LineChart) -> Sequence[Series]:
    """The series that are named at the ends of their lines. If not all fit, evenly spaced ones of the order by last value."""
    if not is_crowded(chart):
        return chart.series
    most = chart.height_px // LABEL_HEIGHT_PX
    ranked = sorted(chart.series, key=lambda series: float(series.points[-1, 1]))
    return [ranked[number] for number in np.linspace(0, len(ranked) - 1, most).round().astype(int)]


def draw_legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """A legend: each name with a swatch of its look."""
    items = Markup("").join(
        Markup('<li><i style="{}"></i><bdi>{}</bdi></li>').format(look, name) for name, look in entries
    )
    return Markup('<ul class="legend">{}</ul>').format(items)


def draw_bars(bars: Sequence[Bar], label: str) -> Markup:
    """Horizontal bars with their numbers, and grid lines at every quarter.

    Args:
        label: what the bars are of, for screen readers.
    """
    pitch_px, bar_px = 17, 13
    height = pitch_px * len(bars)
    grid = Markup("").join(
        Markup('<line x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{h}"/>').format(x=q * 25 * BAR_SHARE, h=height)
        for q in range(5)
    )
    rows = []
    for number, bar in enumerate(bars):
        top = number * pitch_px + (pitch_px - bar_px) / 2
        width = 100 * BAR_SHARE * min(max(bar.fraction or 0.0, 0.0), 1.0)
        rows.append(
            Markup(
                "<g><title>{name}: {value}</title>"
                '<rect y="{top}" width="{width:.2f}%" height="{bar}" rx="2" style="{look}"/>'
                '<text x="{width:.2f}%" y="{baseline}" dx="6">{value}</text></g>'
            ).format(
                name=bar.name,
                value=format_percent(bar.fraction),
                top=top,
                width=width,
                bar=bar_px,
                look=bar.look,
                baseline=top + bar_px - 2.5,
            )
        )
    summary = f"{label}: " + ", ".join(f"{bar.name} {format_percent(bar.fraction)}" for bar in bars)
    return Markup(
        '<svg class="bars" width="100%" height="{}" role="img" aria-label="{}"><g class="grid">{}</g>{}</svg>'
    ).format(height, summary, grid, Markup("").join(rows))


def draw_scale(low: Bar, high: Bar, subject: Bar) -> Markup:
    """A line with marks of a subject and of two references; no fraction may be None."""
    assert low.fraction is not None
    assert high.fraction is not None
    assert subject.fraction is not None
    bars = (low, high, subject)
    fractions = [bar.fraction for bar in bars]
    span = max(fractions) - min(fractions) or 0.01
    # The margins leave room for names to the left and right of the outer marks.
    start, width = min(fractions) - 0.4 * span, 1.8 * span
    x_of = {bar.name: 100 * (bar.fraction - start) / width for bar in bars}
    left, right = (low, high) if low.fraction <= high.fraction else (high, low)
    marks = [(left, "below-left"), (right, "below-right"), (subject, "above")]
    drawn = Markup("").join(
        Markup('<span class="mark {}" style="left:{:.2f}%;{}"><span><b>{}</b> <bdi>{}</bdi></span></span>').format(
            place, x_of[bar.name], bar.look, format_percent(bar.fraction), bar.name
        )
        for bar, place in marks
    )
    begin, end = sorted((x_of[low.name], x_of[subject.name]))
    # A subject below the lower reference has made no progress, so its line is not drawn in its colour.
    reach_look = subject.look if subject.fraction >= low.fraction else plain("var(--soft)")
    summary = ", ".join(f"{bar.name} {format_percent(bar.fraction)}" for bar in bars)
    return Markup(
        '<div class="scale" role="img" aria-label="mpvap: {}"><span class="reach" style="left:{:.2f}%;width:{:.2f}%;'
        '{}"></span>{}</div>'
    ).format(summary, begin, end - begin, reach_look, drawn)


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"

    def position(self, value: float | np.ndarray) -> np.ndarray:
        """Where a value lies on the axis, from 0 (`low`) to 1 (`high`); values outside are moved to the ends."""
        if self.scale == "log":
            start, end = math.log(self.low), math.log(self.high)
            return np.clip((np.log(np.maximum(value, self.low)) - start) / (end - start), 0.0, 1.0)
        return np.clip((np.asarray(value) - self.low) / (self.high - self.low), 0.0, 1.0)

    def ticks(self, num_ticks: int) -> list[float]:
        """About `num_ticks` round values on the axis, ascending."""
        if self.scale == "log":
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in exponents for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= num_ticks + 1:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / (num_ticks + 1))]
            # The axis spans less than a factor of five, where the round values of a linear axis fit better.
        step = _round_step((self.high - self.low) / num_ticks)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def spread_labels(wanted_px: Sequence[float], gap_px: float, height_px: float) -> list[float]:
    """Moves labels apart: positions close to the wanted ones, in the same order, at least `gap_px` apart, from 0 to `height_px`.

    If not all fit, the gap shrinks. The positions with the least squared error are an isotonic regression, which is computed by
    pooling adjacent violators.
    """
    gap_px = min(gap_px, height_px / max(len(wanted_px) - 1, 1))
    order = sorted(range(len(wanted_px)), key=lambda n: wanted_px[n])
    crowds: list[list[float]] = []  # pools of labels that touch: each label's wanted position minus all gaps before it
    for rank, number in enumerate(order):
        crowds.append([wanted_px[number] - rank * gap_px])
        while len(crowds) > 1 and _mean(crowds[-2]) > _mean(crowds[-1]):
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    highest = height_px - gap_px * (len(order) - 1)
    fitted = [min(max(_mean(crowd), 0.0), highest) for crowd in crowds for _ in crowd]
    placed = [0.0] * len(order)
    for rank, number in enumerate(order):
        placed[number] = fitted[rank] + rank * gap_px
    return placed


def draw_mark(kind: Literal["dot", "touch"], place: tuple[float, float], title: str) -> Markup:
    """A visible dot in the look of its group, or an invisible place that shows its title when pointed at."""
    # A mark is a line of length 0, since its caps stay round or square however the SVG is stretched.
    path = f"M{place[0]:.0f} {place[1]:.0f}h0"
    hole = Markup('<path class="hole" d="{}"/>').format(path) if kind == "dot" else ""
    return Markup('<path class="{}" d="{}"><title>{}</title></path>{}').format(kind, path, title, hole)


def draw_grid(x_axis: Axis, y_axis: Axis, num_ticks: int) -> Markup:
    """A line at each tick of both axes, for the stretched SVG; across there is about one tick less than upwards."""
    lines = [f"M0 {EXTENT - round(EXTENT * float(y_axis.position(v)))}H{EXTENT}" for v in y_axis.ticks(num_ticks)]
    lines += [f"M{round(EXTENT * float(x_axis.position(v)))} 0V{EXTENT}" for v in x_axis.ticks(num_ticks - 1)]
    return Markup('<path class="grid" d="{}"/>').format("".join(lines))


def draw_ticks(x_axis: Axis, y_axis: Axis, num_ticks: int, has_percents: bool) -> Markup:
    """The values at the ticks of both axes; `has_percents` says that those of the y axis are fractions."""
    down = [(100 * (1 - float(y_axis.position(v))), v) for v in y_axis.ticks(num_ticks)]
    across = [(100 * float(x_axis.position(v)), v) for v in x_axis.ticks(num_ticks - 1)]
    labels = [
        Markup('<span class="y" style="top:{:.1f}%">{}</span>').format(
            place, f"{100 * value:g}%" if has_percents else format_tick(value)
        )
        for place, value in down
    ]
    labels += [
        Markup('<span class="x" style="left:{:.1f}%">{}</span>').format(place, format_tick(value))
        for place, value in across
    ]
    return Markup("").join(labels)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _round_step(step: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(step))
    return min((m * magnitude for m in (1, 2, 2.5, 5, 10)), key=lambda rounded: abs(math.log(rounded / step)))


def _step_axis(last: float, num_ticks: int) -> Axis:
    axis = _axis([0.0, last], "linear")
    # A run of 6,000 steps logs its last values at 5,999 or 5,990. The axis reaches the round number just beyond.
    behind = Axis(axis.low, axis.high * 1.03).ticks(num_ticks - 1)
    return Axis(axis.low, max(axis.high, *behind[-1:]))


def _axis(values: Sequence[float], scale: Literal["linear", "log"]) -> Axis:
    low, high = float(min(values)), float(max(values))
    if high - low <= max(1e-9 * abs(high), 1e-30):  # constant up to rounding
        pad = max(0.1 * abs(high), 1e-9)
        return Axis(low - pad, high + pad)
    if scale == "log" and low > 0:
        return Axis(low, high, "log")
    return Axis(low, high)


def _value_range(chart: LineChart) -> tuple[float, float]:
    # The range of the averaged points and not of all: one spike among 100,000 points must not flatten the line.
    curves = [thin_curve(series.points, chart.max_points) for series in chart.series]
    low, high = min(float(c.y.min()) for c in curves), max(float(c.y.max()) for c in curves)
    if chart.y_scale == "log":
        return (low, high) if low <= 0 else (low / 1.1, high * 1.1)
    pad = 0.06 * (high - low)
    return (max(low - pad, 0.0) if low >= 0 else low - pad), high + pad


def _coordinates(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> list[tuple[int, int]]:
    across = np.rint(EXTENT * x_axis.position(x)).astype(int)
    down = np.rint(EXTENT * (1 - y_axis.position(y))).astype(int)
    return list(zip(across.tolist(), down.tolist(), strict=True))


def _path(points: Sequence[tuple[int, int]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _draw_series(series: Series, chart: LineChart, x_axis: Axis, y_axis: Axis) -> Markup:
    curve = thin_curve(series.points, chart.max_points)
    points = _coordinates(curve.x, curve.y, x_axis, y_axis)
    band = Markup("")
    if len(series.points) > len(points) and chart.names == "legend":
        low = _coordinates(curve.x, curve.low, x_axis, y_axis)
        high = _coordinates(curve.x, curve.high, x_axis, y_axis)
        band = Markup('<path class="band" d="{}Z"/>').format(_path(low + high[::-1]))
    every = max(1, math.ceil(len(points) / 32))
    kind = "dot" if len(points) <= 32 else "touch"
    marks = Markup("").join(
        draw_mark(kind, points[n], f"{series.name}, step {curve.x[n]:,.0f}: {chart.y_format(float(curve.y[n]))}")
        for n in range(0, len(points), every)
        if (chart.names != "hidden" or kind == "dot") and not is_crowded(chart)
    )
    last = chart.y_format(float(series.points[-1, 1]))
    return Markup(
        '<g class="series" style="{}">{}<path class="line" d="{}"><title>{}: {} at the end</title></path>{}</g>'
    ).format(series.look, band, _path(points), series.name, last, marks)


def _draw_end_labels(chart: LineChart, y_axis: Axis) -> Markup:
    series = choose_named(chart)
    wanted = [chart.height_px * (1 - float(y_axis.position(s.points[-1, 1]))) for s in series]
    placed = spread_labels(wanted, LABEL_HEIGHT_PX, chart.height_px)
    leaders = Markup("").join(
        Markup('<path style="{}" d="M0 {:.1f}L14 {:.1f}"/>').format(s.look, a, b)
        for s, a, b in zip(series, wanted, placed, strict=True)
    )
    labels = Markup("").join(
        Markup('<span class="end" dir="auto" title="{name}: {value}" style="top:{:.1f}px;{}">{name}</span>').format(
            y, s.look, name=s.name, value=chart.y_format(float(s.points[-1, 1]))
        )
        for s, y in zip(series, placed, strict=True)
    )
    return Markup('<svg class="leaders" width="14" height="{}" aria-hidden="true">{}</svg>{}').format(
        chart.height_px, leaders, labels
    )


def _summarise(chart: LineChart) -> str:
    """The text that a screen reader reads instead of the chart."""
    parts = [
        f"{s.name} from {chart.y_format(float(s.points[0, 1]))} to {chart.y_format(float(s.points[-1, 1]))}"
        for s in chart.series
    ]
    return f"{chart.title}, over training steps: {'; '.join(parts)}"
