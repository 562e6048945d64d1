"""The first part of the report: how good each network is, what it costs, and how much of the gap the student closes.

The gap is the one between the generalist and the specialists.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from concentration.stages.report_charts import Bar, draw_scale
from concentration.stages.report_comparable import describe_images
from concentration.stages.report_values import (
    DASH,
    as_mapping,
    as_mappings,
    as_number,
    as_texts,
    format_count,
    format_percent,
    format_points,
    format_short,
)

#: The two references that the page's subject is compared with, at the lower and the upper end of the gap.
LOW, HIGH = "generalist", "specialists"
#: Differences below this are called level, since percentages with one decimal do not show them.
SMALLEST_GAP = 0.0005
METRICS = {
    "mpvap": "mpvap",
    "mpvap_log_softmax": "mpvap, log-softmax",
    "mpvap_unsmeared": "mpvap, unsmeared",
    "top1": "top-1",
    "top5": "top-5",
    "top1_in_vertical": "top-1 in vertical",
    "map_at_50": "mAP@50",
}


def describe_gap(evaluations: Mapping[str, Mapping[str, Any]], subject: str, metric: str = "mpvap") -> str:
    """A sentence on how much of the gap from the generalist to the specialists the subject closes.

    It fits any order of the three, and any of them may be missing.
    """
    roles = (LOW, subject, HIGH)
    values = {name: as_number(as_mapping(evaluations.get(name)).get(metric)) for name in roles}
    missing = [name for name in dict.fromkeys(roles) if values[name] is None]
    if missing or subject in (LOW, HIGH):
        return _describe_without(missing, evaluations, subject, metric)
    low, student, high = (values[name] for name in roles)
    assert low is not None
    assert student is not None
    assert high is not None
    gap, gain = high - low, student - low
    beside = "level with it" if abs(gain) < SMALLEST_GAP else f"{_points(gain)} {'above' if gain > 0 else 'below'} it"
    at_low, at_student, at_high = format_percent(low), format_percent(student), format_percent(high)
    label = METRICS[metric]
    it, begin = ("the student", "The student") if subject == "student" else (subject, subject)
    if gap < SMALLEST_GAP:
        relation = "are level with" if gap > -SMALLEST_GAP else "are worse than"
        return (
            f"There is no gap to close: the specialists ({at_high} {label}) {relation} the generalist ({at_low}); "
            f"{it}, at {at_student}, is {beside}."
        )
    span = f"the {_points(gap)} between the generalist ({at_low} {label}) and the specialists ({at_high})"
    if gain <= -SMALLEST_GAP:
        return f"{begin} closes none of {span}: at {at_student}, it is {_points(gain)} below the generalist."
    if student >= high + SMALLEST_GAP:
        above = _points(student - high)
        return f"{begin} closes all of {span} and, at {at_student}, is {above} above the specialists."
    share = 1.0 if high - student < SMALLEST_GAP else max(gain, 0.0) / gap
    return f"{begin}, at {at_student}, closes {_format_share(share)} of {span}."


def describe_gap_log_softmax(evaluations: Mapping[str, Mapping[str, Any]], subject: str) -> str:
    """The same sentence for mpvap after log-softmax, which makes scores comparable across samples; empty if one of the three is
    missing."""
    values = [as_number(as_mapping(evaluations.get(name)).get("mpvap_log_softmax")) for name in (LOW, subject, HIGH)]
    if subject in (LOW, HIGH) or any(value is None for value in values):
        return ""
    return describe_gap(evaluations, subject, "mpvap_log_softmax")


def subject_of(evaluations: Mapping[str, Mapping]) -> str:
    """The network that the page is about if none was named.

    It is the student, or else the one of the highest mpvap that is no reference, of those for the most classes.
    """
    if "student" in evaluations:
        return "student"

    def rank(name: str) -> tuple[float, ...]:
        return tuple(as_number(as_mapping(evaluations[name]).get(key)) or 0 for key in ("num_classes", "mpvap"))

    others = [name for name in evaluations if name not in (LOW, HIGH)]
    return max(others, key=rank) if others else next(iter(evaluations), "")


def find_unmeasured(evaluation: Mapping[str, Any]) -> list[str]:
    """The verticals without a labelled test sample; they have no AP, and are in no mean."""
    measured = as_mapping(evaluation.get("pvap"))
    verticals = dict.fromkeys(as_texts([c.get("vertical") for c in as_mappings(evaluation.get("classes"))]))
    return [vertical for vertical in verticals if vertical not in measured]


def draw_headline_scale(evaluations: Mapping[str, Mapping], subject: str, looks: Mapping[str, str]) -> Markup:
    """The subject between the two references on a line; empty unless the mpvap of three networks is known."""
    bars = [
        Bar(name, value, looks[name])
        for name in (LOW, HIGH, subject)
        if (value := as_number(as_mapping(evaluations.get(name)).get("mpvap"))) is not None
    ]
    return draw_scale(*bars) if len({bar.name for bar in bars}) == 3 else Markup("")


def build_tiles(evaluations: Mapping[str, Mapping], subject: str, sizes: Mapping[str, int]) -> list[dict[str, str]]:
    """Up to four numbers about the subject: its mpvap, top-1, parameters and classes, each with a note.

    Args:
        sizes: the number of classes of each vertical.
    """
    evaluation, generalist = evaluations.get(subject, {}), evaluations.get("generalist", {})
    tiles = []
    for metric, label in (("mpvap", "mpvap"), ("top1", "top-1 over all classes")):
        value, reference = as_number(evaluation.get(metric)), as_number(generalist.get(metric))
        if value is not None:
            compared = value is not None and reference is not None and subject != "generalist"
            note = f"{format_points(value - reference)} points vs generalist" if compared else ""
            tiles.append({"label": label, "value": format_percent(value), "note": note})
    parameters, ensemble = _total_parameters(evaluation), _total_parameters(evaluations.get("specialists", {}))
    if parameters:
        ratio = (
            f"the specialists hold {_format_times(ensemble / parameters)}×"
            if ensemble and subject != "specialists"
            else ""
        )
        tiles.append({"label": "parameters", "value": format_short(parameters), "note": ratio})
    num_classes, num_samples = as_number(evaluation.get("num_classes")), as_number(evaluation.get("num_samples"))
    if num_classes:
        verticals = max(len(as_mapping(evaluation.get("pvap"))), len(sizes))
        missing = len(find_unmeasured(evaluation))
        left_out = f" ({missing} without a test image, which mpvap leaves out)" if missing else ""
        where = f"in {verticals} verticals{left_out}, " if verticals else ""
        skipped = as_number(evaluation.get("num_samples_skipped"))
        beside = f" ({format_count(skipped)} more cannot be decoded)" if skipped else ""
        note = f"{where}{format_count(num_samples)} test images{beside}" if num_samples else where.rstrip(", ")
        tiles.append({"label": "classes", "value": format_count(num_classes), "note": note})
    return tiles


def build_headline_table(evaluations: Mapping[str, Mapping], elsewhere: Mapping[str, Mapping]) -> dict[str, Any]:
    """The columns and rows of the first table. A metric that no evaluation has gets no column.

    Args:
        evaluations: the evaluations on the same test images; the best value of each column is marked.
        elsewhere: the evaluations on other test images; their rows are grouped by images, and none is marked.
    """
    everything = {**evaluations, **elsewhere}
    values = {m: {n: as_number(e.get(m)) for n, e in everything.items()} for m in METRICS}
    metrics = [m for m in METRICS if m == "mpvap" or any(v is not None for v in values[m].values())]
    best = {m: max((v for n in evaluations if (v := values[m][n]) is not None), default=None) for m in metrics}
    low, high = (as_number(as_mapping(evaluations.get(name)).get("mpvap")) for name in (LOW, HIGH))
    has_gap = low is not None and high is not None and high - low >= SMALLEST_GAP
    rows = []
    by_images: dict[str, list[dict[str, Any]]] = {}
    for name, evaluation in everything.items():
        mpvap, is_comparable = values["mpvap"][name], name in evaluations
        cells = [
            _cell(format_percent(values[m][name]), is_best=is_comparable and values[m][name] == best[m])
            for m in metrics
        ]
        if has_gap:
            known = is_comparable and mpvap is not None and name not in (LOW, HIGH)
            cells.append(_cell(_format_share((mpvap - low) / (high - low)) if known else DASH))
        parts = as_mapping(evaluation.get("num_parameters"))
        detail = ", ".join(f"{part} {format_short(as_number(parts.get(part)))}" for part in ("base", "top"))
        cells.append(_cell(format_short(_total_parameters(evaluation)), title=detail))
        cells.append(_cell(format_short(as_number(evaluation.get("multiply_adds")))))
        own_rows = rows if is_comparable else by_images.setdefault(describe_images(evaluation), [])
        own_rows.append({"name": name, "cells": cells})
    columns = [METRICS[m] for m in metrics] + ["gap closed"] * has_gap + ["parameters", "multiply-adds"]
    return {"columns": columns, "rows": rows, "elsewhere": by_images}


def _cell(text: str, is_best: bool = False, title: str = "") -> dict[str, Any]:
    return {"text": text, "is_best": is_best and text != DASH, "title": title}


def _format_share(share: float) -> str:
    """A share as whole percents; only a complete one is 100%."""
    text = f"{share:.0%}".replace("-", "−")
    return "over 99%" if text == "100%" and share < 0.9999 else text


def _points(difference: float) -> str:
    points = f"{100 * abs(difference):.1f}"
    return f"{points} point" if points == "1.0" else f"{points} points"


def _describe_without(
    missing: Sequence[str], evaluations: Mapping[str, Mapping[str, Any]], subject: str, metric: str
) -> str:
    known = {n: v for n, e in evaluations.items() if (v := as_number(as_mapping(e).get(metric))) is not None}
    if not known:
        return f"No evaluation holds {metric} yet."
    best = max(known, key=lambda name: known[name])
    names = dict.fromkeys([subject if subject in known else best, best])
    reached = ", where ".join(f"{name} reaches {format_percent(known[name])} {metric}" for name in names)
    reached += "" if len(known) == 1 else f", the highest of {len(known)} evaluations"
    if not missing:  # the subject is itself a reference
        return f"{reached}."
    lacking = " and ".join((", ".join(missing[:-1]), missing[-1])) if len(missing) > 1 else missing[0]
    return f"{reached}; how much of the gap from generalist to specialists is closed cannot be said without {lacking}."


def _total_parameters(evaluation: Mapping) -> float | None:
    return as_number(as_mapping(evaluation.get("num_parameters")).get("total"))


def _format_times(ratio: float) -> str:
    """Two digits below a hundred; NOTE: `.2g` alone writes 405 as 4.1e+02."""
    return f"{ratio:.2g}" if ratio < 99.5 else format_count(ratio)
