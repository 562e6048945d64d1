"""The report's part on targets: what storing them took, and whether stored targets or teachers in the loop were faster."""

from collections.abc import Mapping, Sequence
from typing import Any

from concentration.stages.report_values import DASH, as_mapping, as_number, format_count, format_short


def build_targets_part(
    target_sets: Mapping[str, Sequence[Mapping[str, Any]]], students: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What the template shows on targets; None if no student has soft targets.

    Args:
        target_sets: for each stored set an entry for each vertical, with its codec, top_k, views, num_records, bytes_per_record
            and images_per_second.
        students: for each student its `targets` (the configuration), num_images (seen in training) and images_per_second.
    """
    sets = {name: _summarise_set([as_mapping(entry) for entry in entries]) for name, entries in target_sets.items()}
    rows = [_describe_student(name, as_mapping(student), sets) for name, student in students.items()]
    rows = [row for row in rows if row is not None]
    if not rows:
        return None
    return {
        "sets": [{"name": name, **{k: _show(k, v) for k, v in summary.items()}} for name, summary in sets.items()],
        "students": [{k: _show(k, v) for k, v in row.items()} for row in rows],
        "sentence": _compare(rows),
    }


def _summarise_set(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The records, bytes and seconds of all verticals of a stored set."""
    first = entries[0] if entries else {}
    records = [as_number(entry.get("num_records")) for entry in entries]
    sizes = [as_number(entry.get("bytes_per_record")) for entry in entries]
    rates = [as_number(entry.get("images_per_second")) for entry in entries]
    return {
        **{name: first.get(name) for name in ("codec", "top_k", "views")},
        "num_records": _sum(records),
        "bytes": _sum([n * size if n and size else None for n, size in zip(records, sizes, strict=True)]),
        "seconds": _sum([n / rate if n and rate else None for n, rate in zip(records, rates, strict=True)]),
    }


def _describe_student(
    name: str, student: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The rate of a student, and the seconds before and in training; None if it has no soft targets."""
    targets = as_mapping(student.get("targets"))
    kind = targets.get("kind")
    if kind not in ("soft", "online"):
        return None
    rate, num_images = as_number(student.get("images_per_second")), as_number(student.get("num_images"))
    training = num_images / rate if rate and num_images else None
    before = 0.0 if kind == "online" else as_number(sets.get(str(targets.get("name")), {}).get("seconds"))
    return {
        "student": name,
        "kind": kind,
        "rate": rate,
        "before": before,
        "training": training,
        "total": None if training is None or before is None else training + before,
    }


def _compare(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence that compares the fastest student with stored targets and the fastest one with teachers in the loop.

    None if there is no student of one of the kinds.
    """
    best = {}
    for row in rows:
        if row["total"] is not None and row["total"] < best.get(row["kind"], {"total": float("inf")})["total"]:
            best[row["kind"]] = row
    if len(best) < 2:
        return None
    stored, online = best["soft"], best["online"]
    faster, slower = sorted((stored, online), key=lambda row: row["total"])
    what = {"soft": "Storing the targets first", "online": "Asking the teachers in every step"}
    return (
        f"{what[faster['kind']]} was faster: {faster['total']:,.0f} s for {faster['student']}, making targets included, "
        f"against {slower['total']:,.0f} s for {slower['student']}."
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None if there is no value, or one of them is unknown."""
    return sum(values) if values and all(value is not None for value in values) else None


def _show(key: str, value: Any) -> str:
    if key in ("seconds", "before", "training", "total"):
        return DASH if value is None else f"{value:,.0f} s"
    if key == "bytes":
        return DASH if value is None else f"{format_short(value)}B"
    if key == "num_records":
        return format_count(value)
    if key == "rate":
        return DASH if value is None else f"{value:,.0f}"
    return DASH if value is None else str(value)
