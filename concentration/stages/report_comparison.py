"""The report's parts that compare two networks by class: student and teachers, or a new student and the one in service."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from concentration.stages.report_comparable import describe_images, is_comparable
from concentration.stages.report_values import (
    DASH,
    as_mapping,
    as_mappings,
    as_number,
    as_texts,
    format_count,
    format_percent,
    format_points,
)

#: Classes whose AP differs by at most this are called level.
LEVEL = 0.005
NUM_CLASSES_SHOWN = 12


def compare_classes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every class of either evaluation: the AP in both, and what the second gained; the largest loss comes first.

    `gain` is None if a class has no AP in one of them, because it is new, gone, or without a test image.
    """
    known = [{str(c.get("id")): c for c in as_mappings(e.get("classes"))} for e in (first, second)]
    rows = []
    for class_id in {**known[1], **known[0]}:
        described = known[1].get(class_id) or known[0][class_id]
        before, after = (as_number(as_mapping(of.get(class_id)).get("ap")) for of in known)
        gain = None if before is None or after is None else after - before
        rows.append(
            {
                "id": class_id,
                "name": str(described.get("name", class_id)),
                "vertical": str(described.get("vertical", "")),
                "first": before,
                "second": after,
                "gain": gain,
                "num_test": as_number(described.get("num_test")),
            }
        )
    return sorted(rows, key=lambda row: (row["gain"] is None, row["gain"] or 0.0))


def count_by_vertical(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """For each vertical, how many of the classes with both APs gained, lost or are level."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["gain"] is not None:
            of_vertical = counts.setdefault(row["vertical"], {"gained": 0, "lost": 0, "level": 0})
            of_vertical["level" if abs(row["gain"]) <= LEVEL else "gained" if row["gain"] > 0 else "lost"] += 1
    return counts


def build_comparison_part(
    names: Sequence[str], evaluations: Mapping[str, Mapping[str, Any]], agreement: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """What the template shows on what a second network gained and lost against a first; None without two names.

    Args:
        names: the names of two evaluations, the network in service first.
        evaluations: the evaluations by name.
        agreement: the counts of `metrics.agreement.Agreement`, `overall` and `by_vertical`; None if the answers were not kept.
    """
    if len(names) != 2:
        return None
    first, second = (as_mapping(evaluations[name]) for name in names)
    rows = compare_classes(first, second)
    counts = count_by_vertical(rows)
    verticals = dict.fromkeys(v for e in (first, second) for v in as_mapping(e.get("pvap")))
    flips = as_mapping(as_mapping(agreement).get("by_vertical"))
    known = [row for row in rows if row["gain"] is not None]
    return {
        "names": list(names),
        "sentence": _describe(names, first, second, counts, as_mapping(as_mapping(agreement).get("overall"))),
        "verticals": [
            _describe_vertical(v, first, second, counts.get(v, {}), as_mapping(flips.get(v))) for v in verticals
        ],
        "tables": _build_tables(
            {
                "Lost most": [row for row in known if row["gain"] < -LEVEL],
                "Gained most": [row for row in known[::-1] if row["gain"] > LEVEL],
                "New or gone": [row for row in rows if (row["first"] is None) != (row["second"] is None)],
            }
        ),
        "all": [_show_class(row) for row in known],
    }


def build_teachers_part(
    gates: Mapping[str, Mapping[str, Any]],
    names: tuple[str, str],
    evaluations: Mapping[str, Mapping[str, Any]],
    agreement: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """What the template shows on the teachers: what their gates found, and how the student agrees with each.

    None if there are no gates and no comparable evaluations.

    Args:
        gates: the content of each gates/VERTICAL.json, by vertical.
        names: the names of the specialists' evaluation and of the student's.
        evaluations: the evaluations by name.
        agreement: as in `build_comparison_part`, for the specialists and the student.
    """
    are_evaluated = all(name in evaluations for name in names)
    rows = compare_classes(*(as_mapping(evaluations[name]) for name in names)) if are_evaluated else []
    counts = count_by_vertical(rows)
    verticals = {**gates, **counts}
    if not verticals:
        return None
    flips = as_mapping(as_mapping(agreement).get("by_vertical"))
    known = [row for row in rows if row["gain"] is not None]
    return {
        "student": names[1],
        "problems": [(v, text) for v, gate in gates.items() for text in as_texts(as_mapping(gate).get("problems"))],
        "rows": [
            _describe_teacher(v, as_mapping(gates.get(v)), as_mapping(flips.get(v)), counts.get(v, {}))
            for v in verticals
        ],
        "tables": _build_tables(
            {
                "Loses to its teacher": [row for row in known if row["gain"] < -LEVEL],
                "Beats its teacher": [row for row in known[::-1] if row["gain"] > LEVEL],
            }
        ),
    }


def _describe(names: Sequence[str], first: Mapping, second: Mapping, counts: Mapping, overall: Mapping) -> str:
    """The sentences above the comparison of two networks."""
    total = {kind: sum(of_vertical[kind] for of_vertical in counts.values()) for kind in ("gained", "lost", "level")}
    if is_comparable(first, second):
        pairs = {label: (first.get(key), second.get(key)) for key, label in (("mpvap", "mpvap"), ("top1", "top-1"))}
        apart = ""
    else:
        pairs = _average_over_both(first, second)
        apart = (
            f"They were measured on different test images: {describe_images(first)}, and {describe_images(second)}. "
        )
    parts = []
    for label, pair in pairs.items():
        before, after = map(as_number, pair)
        if before is not None and after is not None:
            parts.append(
                f"{label} {format_percent(before)} → {format_percent(after)} ({format_points(after - before)})"
            )
    text = f"{names[1]} against {names[0]}: {', '.join(parts)}. " if parts else ""
    text += apart
    text += f"{total['gained']} classes gained AP, {total['lost']} lost some, {total['level']} are level."
    if overall:
        newly, lost = (as_number(overall.get(key)) for key in ("only_second_right", "only_first_right"))
        text += f" {format_count(newly)} test images are newly right, {format_count(lost)} newly wrong."
    return text


def _average_over_both(first: Mapping, second: Mapping) -> dict[str, tuple[float, float]]:
    """The mean pvap over the verticals that both have: the only number that two sets of test images have in common."""
    before, after = (as_mapping(e.get("pvap")) for e in (first, second))
    both = [v for v in before if as_number(before[v]) is not None and as_number(after.get(v)) is not None]
    if not both:
        return {}
    label = f"mpvap over the {len(both)} vertical{'s' * (len(both) != 1)} of both"
    return {label: (fmean(before[v] for v in both), fmean(after[v] for v in both))}


def _describe_vertical(vertical: str, first: Mapping, second: Mapping, counts: Mapping, flips: Mapping) -> dict:
    """A row of the table of verticals: both APs, their difference, classes that gained and lost, images newly right and wrong."""
    before, after = (as_number(as_mapping(e.get("pvap")).get(vertical)) for e in (first, second))
    change = None if before is None or after is None else after - before
    cells = [format_percent(before), format_percent(after), format_points(change)]
    cells += [format_count(counts.get(kind)) for kind in ("gained", "lost")]
    cells += [format_count(as_number(flips.get(key))) for key in ("only_second_right", "only_first_right")]
    return {"name": vertical, "cells": cells}


def _describe_teacher(vertical: str, gate: Mapping, flips: Mapping, counts: Mapping) -> dict:
    """A row of the table of teachers: what the gate measured, how often the student agrees, and what it gained and lost."""
    number, same = (as_number(flips.get(key)) for key in ("num_samples", "same"))
    cells = [format_count(as_number(gate.get("images_per_class")))]
    cells += [format_percent(as_number(gate.get(key))) for key in ("ap", "generalist_ap", "constant_ap")]
    cells += [format_percent(same / number) if number and same is not None else DASH]
    cells += [format_count(as_number(flips.get(key))) for key in ("only_second_right", "only_first_right")]
    cells += [format_count(counts.get(kind)) for kind in ("gained", "lost")]
    return {"name": vertical, "cells": cells, "is_fit": not gate.get("problems")}


def _build_tables(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A title and the first rows for each list of classes that is not empty."""
    return [(title, [_show_class(row) for row in own[:NUM_CLASSES_SHOWN]]) for title, own in rows.items() if own]


def _show_class(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = [format_percent(row["first"]), format_percent(row["second"]), format_points(row["gain"])]
    return {"name": row["name"], "vertical": row["vertical"], "cells": [*cells, format_count(row["num_test"])]}
