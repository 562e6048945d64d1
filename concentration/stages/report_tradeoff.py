"""The report's part on quality over cost: which systems are worth their multiply-adds or parameters (the Pareto front)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from concentration.stages.report_charts import EXTENT, Axis, draw_grid, draw_mark, draw_ticks, spread_labels
from concentration.stages.report_headline import METRICS
from concentration.stages.report_values import as_mapping, as_number, format_percent, format_short

#: The metrics and the costs that are compared; each pair of them has a plot.
QUALITIES = ("mpvap", "top1", "map_at_50")
COSTS = {"multiply_adds": "multiply-adds an image", "active": "parameters that an image uses"}
#: With fewer systems this part is left out.
MIN_SYSTEMS = 4

_LEAST_HEIGHT_PX, _LABEL_PX, _NUM_TICKS = 250, 14, 5


@dataclass(frozen=True)
class System:
    """One evaluated system.

    Attributes:
        name, look: what it is called, and how it is drawn (`report_looks`).
        qualities: the value of each metric; None if unknown.
        costs: the multiply-adds for an image, and the parameters that an image uses; None if unknown.
        num_parameters: all parameters that the system has.
    """

    name: str
    look: str
    qualities: Mapping[str, float | None]
    costs: Mapping[str, float | None]
    num_parameters: float | None


def build_tradeoff_part(evaluations: Mapping[str, Mapping], looks: Mapping[str, str]) -> dict[str, Any]:
    """The plots and rows of the comparison; empty if there are fewer than `MIN_SYSTEMS` systems with known mpvap and cost."""
    systems = [_read_system(name, evaluation, looks[name]) for name, evaluation in evaluations.items()]
    systems = [system for system in systems if system.costs["multiply_adds"] and system.qualities["mpvap"] is not None]
    if len(systems) < MIN_SYSTEMS:
        return {}
    fronts = {quality: find_front(systems, quality, "multiply_adds") for quality in QUALITIES}
    rows = [
        {
            "name": system.name,
            "qualities": [
                {"text": format_percent(system.qualities[quality]), "is_on_front": system.name in fronts[quality]}
                for quality in QUALITIES
            ],
            "costs": [format_short(system.costs[cost]) for cost in COSTS],
            "num_parameters": format_short(system.num_parameters),
        }
        for system in sorted(systems, key=lambda system: system.costs["multiply_adds"])
    ]
    plots = Markup("").join(_draw_plot(systems, quality, cost) for cost in COSTS for quality in QUALITIES)
    columns = [*(METRICS[quality] for quality in QUALITIES), *COSTS.values(), "parameters in all"]
    return {"plots": plots, "rows": rows, "columns": columns}


def find_front(systems: Sequence[System], quality: str, cost: str) -> list[str]:
    """The Pareto front: the names of the systems that are better than all with the same cost or less, by ascending cost."""
    known = [s for s in systems if s.qualities[quality] is not None and s.costs[cost] is not None]
    front: list[str] = []
    best = -math.inf
    for system in sorted(known, key=lambda system: (system.costs[cost], -system.qualities[quality])):
        if system.qualities[quality] > best:
            best = system.qualities[quality]
            front.append(system.name)
    return front


def _read_system(name: str, evaluation: Mapping, look: str) -> System:
    total = as_number(as_mapping(evaluation.get("num_parameters")).get("total"))
    active = as_number(evaluation.get("num_active_parameters"))
    costs = {"multiply_adds": as_number(evaluation.get("multiply_adds")), "active": total if active is None else active}
    return System(name, look, {quality: as_number(evaluation.get(quality)) for quality in QUALITIES}, costs, total)


def _draw_plot(systems: Sequence[System], quality: str, cost: str) -> Markup:
    """A plot with a named point for each system, and the Pareto front as a line of steps."""
    known = [s for s in systems if s.qualities[quality] is not None and s.costs[cost]]
    if not known:
        return Markup("")
    x_axis = _widen([s.costs[cost] for s in known], "log")
    y_axis = _widen([s.qualities[quality] for s in known], "linear")
    places = {s.name: _place(s, quality, cost, x_axis, y_axis) for s in known}
    front = [places[name] for name in find_front(known, quality, cost)]
    return Markup(
        '<figure class="chart chart-line_end"><figcaption><b>{title}</b> <span class="note">over {cost}</span></figcaption>'
        '<div class="plot" role="img" aria-label="{summary}" style="height:{height}px">{ticks}'
        '<svg viewBox="0 0 {extent} {extent}" preserveAspectRatio="none" aria-hidden="true">{grid}'
        '<path class="front" d="{steps}"/>{points}</svg>{names}</div></figure>'
    ).format(
        title=METRICS[quality],
        cost=COSTS[cost],
        summary=f"{METRICS[quality]} over {COSTS[cost]}: " + "; ".join(_say(s, quality, cost) for s in known),
        height=_height_px(known),
        extent=EXTENT,
        ticks=draw_ticks(x_axis, y_axis, _NUM_TICKS, has_percents=True),
        grid=draw_grid(x_axis, y_axis, _NUM_TICKS),
        steps=_draw_steps(front),
        points=Markup("").join(
            Markup('<g style="{}">{}</g>').format(s.look, draw_mark("dot", places[s.name], _say(s, quality, cost)))
            for s in known
        ),
        names=_draw_names(known, places),
    )


def _say(system: System, quality: str, cost: str) -> str:
    return f"{system.name}, {format_percent(system.qualities[quality])} at {format_short(system.costs[cost])}"


def _widen(values: Sequence[float], scale: str) -> Axis:
    """An axis a little wider than the values, so that no point lies on the edge."""
    low, high = min(values), max(values)
    if scale == "log":
        factor = max((high / low) ** 0.06, 1.05)
        return Axis(low / factor, high * factor, "log")
    pad = max(0.08 * (high - low), 0.005)
    return Axis(max(0.0, low - pad), min(1.0, high + pad))


def _place(system: System, quality: str, cost: str, x_axis: Axis, y_axis: Axis) -> tuple[float, float]:
    """The place of a system in the plot: across and down, each from 0 to `EXTENT`."""
    across, up = x_axis.position(system.costs[cost]), y_axis.position(system.qualities[quality])
    return EXTENT * float(across), EXTENT * (1 - float(up))


def _draw_steps(front: Sequence[tuple[float, float]]) -> str:
    """The path of the front: level from each point to the cost of the next, and from the last one to the edge."""
    path = f"M{front[0][0]:.0f} {front[0][1]:.0f}"
    for across, down in front[1:]:
        path += f"H{across:.0f}V{down:.0f}"
    return f"{path}H{EXTENT}"


def _height_px(systems: Sequence[System]) -> int:
    """The height of a plot, which has room for the names of all systems."""
    return max(_LEAST_HEIGHT_PX, _LABEL_PX * len(systems))


def _draw_names(systems: Sequence[System], places: Mapping[str, tuple[float, float]]) -> Markup:
    """The names of the systems at the right edge, each as near to the height of its point as there is room."""
    height = _height_px(systems)
    wanted = [height * places[s.name][1] / EXTENT for s in systems]
    placed = spread_labels(wanted, _LABEL_PX, height)
    return Markup("").join(
        Markup(
            '<span class="end" dir="auto" style="top:{:.1f}px;{}"><svg width="8" height="8" aria-hidden="true">{}</svg> {}</span>'
        ).format(top, s.look, draw_mark("dot", (4, 4), s.name), s.name)
        for s, top in zip(systems, placed, strict=True)
    )
