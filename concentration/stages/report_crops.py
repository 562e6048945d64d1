"""The report's part on ensembles and several crops: what they gain and cost.

It shows whatever an evaluation holds, and a dash for each number that it lacks.

Source: Szegedy et al., "Going deeper with convolutions", Table 3.
"""

from collections.abc import Mapping
from typing import Any

from concentration.stages.report_values import (
    as_number,
    as_texts,
    format_count,
    format_percent,
    format_points,
    format_short,
)


def build_crops_part(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rows of the table, and the base that they are compared with; None if no evaluation has several models or crops.

    The rows are the evaluations with several models or crops, and those of the same models alone on one crop. Of the latter, the
    one with the lowest top-1 error is the base, as in the paper.
    """
    read = {name: _read(name, evaluation) for name, evaluation in evaluations.items()}
    several = [row for row in read.values() if row["cost"] > 1]
    if not several:
        return None
    used = {model for row in several for model in row["models"]}
    alone = [row for row in read.values() if row["cost"] == 1 and set(row["models"]) <= used]
    known = [row for row in alone if row["top1"] is not None]
    base = max(known, key=lambda row: row["top1"]) if known else None
    rows = sorted([*alone, *several], key=lambda row: (len(row["models"]), row["num_crops"]))
    return {"base": None if base is None else base["name"], "rows": [_show(row, base) for row in rows]}


def _read(name: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    models = as_texts(evaluation.get("models")) or [name]
    num_crops = int(as_number(evaluation.get("num_crops")) or 1)
    numbers = {key: as_number(evaluation.get(key)) for key in ("top1", "top5", "mpvap", "multiply_adds")}
    is_max = evaluation.get("combination") == "max"
    return {"name": name, "models": models, "num_crops": num_crops, "cost": len(models) * num_crops, **numbers,
            "combination": "max" if is_max else "mean"}  # fmt: skip


def _show(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    is_base = base is not None and row["name"] == base["name"]
    gain = None
    if base is not None and not (is_base or row["top5"] is None or base["top5"] is None):
        gain = base["top5"] - row["top5"]  # the difference of the errors, so a negative one is an improvement
    errors = [format_percent(None if row[key] is None else 1 - row[key]) for key in ("top5", "top1")]
    return {
        "name": row["name"],
        "cells": [
            format_count(len(row["models"])),
            format_count(row["num_crops"]),
            row["combination"] if row["cost"] > 1 else "",
            format_count(row["cost"]),
            format_short(row["multiply_adds"]),
            errors[0],
            "base" if is_base else format_points(gain),
            errors[1],
            format_percent(row["mpvap"]),
        ],
    }
