"""The report's part on calibration: reliability diagrams, accuracy and error before and after, thresholds, and rejection.

It shows whatever a calibration file holds, and a dash for each number that it lacks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from concentration.stages.report_comparable import describe_images, split_comparable
from concentration.stages.report_values import (
    DASH,
    as_mapping,
    as_mappings,
    as_number,
    format_count,
    format_percent,
)

#: The side of a reliability diagram in its own coordinates.
SIDE = 200
#: The radii of the dots of the bins with the fewest and with the most answers.
SMALLEST_DOT, LARGEST_DOT = 2.0, 7.0


def build_calibration_part(
    calibrations: Mapping[str, Mapping[str, Any]], subject: str, evaluation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the template shows on calibration; None if nothing is calibrated.

    Args:
        calibrations: the content of each calibrations/NAME.json, by NAME.
        subject: the network whose diagrams, thresholds and rejections are shown; if it has no calibration, the first one is.
        evaluation: the subject's evaluation; calibrations that were measured on other test images get tables of their own.
    """
    if not calibrations:
        return None
    comparable, elsewhere = split_comparable(calibrations, evaluation)
    by_images: dict[str, list[dict[str, Any]]] = {}
    for name, calibration in elsewhere.items():
        by_images.setdefault(describe_images(calibration), []).append(_describe_model(name, calibration))
    shown = subject if subject in calibrations else next(iter({**comparable, **elsewhere}))
    content = as_mapping(calibrations[shown])
    before, after = as_mapping(content.get("before")), as_mapping(content.get("after"))
    return {
        "subject": shown,
        "kind": f"{content.get('scope', DASH)} {content.get('form', DASH)}",
        "models": [_describe_model(name, as_mapping(c)) for name, c in comparable.items()],
        "elsewhere": by_images,
        "plots": [draw_reliability("all answers", before, after), *_draw_by_vertical(before, after)],
        "methods": _list_methods(as_mapping(content.get("methods"))),
        "thresholds": _list_thresholds(content),
        "wanted": _describe_wanted(content),
        "rejections": _list_rejections(as_mapping(content.get("none_of_these"))),
    }


def draw_reliability(title: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """A reliability diagram: the share of right answers over their probability. The diagonal is perfect calibration.

    Args:
        title: what the answers are of.
        before, after: `reliability` and `ece` without and with the calibration.
    """
    quarters = [SIDE * q / 4 for q in range(1, 4)]
    grid = Markup("").join(Markup('<path d="M0 {0}H{1}M{0} 0V{1}"/>').format(at, SIDE) for at in quarters)
    lines = Markup("").join(
        _draw_bins(as_mappings(each.get("reliability")), kind) for kind, each in (("before", before), ("after", after))
    )
    errors = [format_percent(as_number(each.get("ece"))) for each in (before, after)]
    return Markup(
        '<figure class="reliability"><figcaption><b><bdi>{title}</bdi></b> <span class="note">error {0} → {1}</span></figcaption>'
        '<svg viewBox="-8 -8 {size} {size}" role="img" aria-label="{title}: calibration error {0} before, {1} after">'
        '<g class="grid">{grid}</g><path class="frame" d="M0 0V{side}H{side}"/><path class="promise" d="M0 {side}L{side} 0"/>'
        "{lines}</svg></figure>"
    ).format(*errors, title=title, size=SIDE + 16, side=SIDE, grid=grid, lines=lines)


def _draw_bins(bins: Sequence[Mapping[str, Any]], kind: str) -> Markup:
    """A line with a dot for each bin; the area of a dot grows with the number of answers."""
    known = [
        (p, share, count)
        for each in bins
        if (p := as_number(each.get("probability"))) is not None
        and (share := as_number(each.get("share_right"))) is not None
        and (count := as_number(each.get("num_answers")))
    ]
    if not known:
        return Markup("")
    most = max(count for _, _, count in known)
    points = [(SIDE * p, SIDE * (1 - share)) for p, share, _ in known]
    dots = Markup("").join(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}: {} said, {} right, {} answers</title></circle>').format(
            x, y, SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * (count / most) ** 0.5, kind, format_percent(p),
            format_percent(share), format_count(count),
        )
        for (x, y), (p, share, count) in zip(points, known, strict=True)
    )  # fmt: skip
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Markup('<g class="{}"><path d="{}"/>{}</g>').format(kind, path, dots)


def _draw_by_vertical(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Markup]:
    first, second = as_mapping(before.get("by_vertical")), as_mapping(after.get("by_vertical"))
    return [draw_reliability(v, as_mapping(first.get(v)), as_mapping(second.get(v))) for v in {**first, **second}]


def _describe_model(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of networks: top-1 and calibration error, each before and after."""
    before, after = as_mapping(content.get("before")), as_mapping(content.get("after"))
    cells = [format_percent(as_number(each.get(key))) for key in ("top1", "ece") for each in (before, after)]
    return {"name": name, "cells": cells}


def _list_methods(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of methods (scope and form): top-1 and calibration error on val and on test."""
    rows = []
    for name, splits in methods.items():
        values = [as_mapping(as_mapping(splits).get(split)) for split in ("val", "test")]
        cells = [format_percent(as_number(value.get(key))) for value in values for key in ("top1", "ece")]
        rows.append({"name": name, "cells": cells})
    return rows


def _list_thresholds(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of verticals: slope, shift, threshold, precision and share of answers that are kept."""
    scaling, thresholds = as_mapping(content.get("scaling")), as_mapping(content.get("thresholds"))
    by_vertical = as_mapping(thresholds.get("by_vertical"))
    rows = []
    for vertical, entry in by_vertical.items():
        line, entry = as_mapping(scaling.get(vertical)), as_mapping(entry)
        slope, shift = (as_number(line.get(key)) for key in ("slope", "shift"))
        texts = [DASH if value is None else f"{value:.3g}".replace("-", "−") for value in (slope, shift)]
        rows.append({"name": vertical, "cells": [*texts, *_percents(entry, "threshold", "precision", "share_kept")]})
    if by_vertical:
        overall = as_mapping(thresholds.get("test"))
        rows.append(
            {"name": "all, by class where known", "cells": [DASH] * 3 + _percents(overall, "precision", "share_kept")}
        )
    return rows


def _describe_wanted(content: Mapping[str, Any]) -> dict[str, str]:
    """The precision and the rate of false rejections that were asked for, and what came of them."""
    wanted = as_mapping(as_mapping(content.get("thresholds")).get("wanted"))
    none = as_mapping(content.get("none_of_these"))
    rates = as_mapping(none.get("false_rejection_rate"))
    return {
        "precision": format_percent(as_number(wanted.get("precision"))),
        "num_by_class": format_count(len(as_mapping(as_mapping(content.get("thresholds")).get("by_class")))),
        "threshold": format_percent(as_number(none.get("threshold"))),
        **{key: format_percent(as_number(rates.get(key))) for key in ("wanted", "val", "test")},
    }


def _list_rejections(none: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of images that show no class: how many, the share rejected, and the area under the ROC curve."""
    left_out = {f"{vertical} left out": each for vertical, each in as_mapping(none.get("left_out")).items()}
    outside = {"images of elsewhere": none["outside"]} if as_mapping(none.get("outside")) else {}
    rows = []
    for name, entry in {**outside, **left_out}.items():
        entry = as_mapping(entry)
        count = format_count(as_number(entry.get("num_images")))
        rows.append({"name": name, "cells": [count, *_percents(entry, "rejected", "auroc")]})
    return rows


def _percents(entry: Mapping[str, Any], *keys: str) -> list[str]:
    return [format_percent(as_number(entry.get(key))) for key in keys]
