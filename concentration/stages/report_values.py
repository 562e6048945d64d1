"""Numbers of the report: read from JSON that may lack them, thinned to what a screen can show, written as text.

Everything here is pure and forgiving, because the report is often opened to find out what went wrong: a value that is
missing or not finite becomes None and is shown as a dash.
Shapes: N logged points of one curve.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

DASH = "–"
#: Beyond this no metric is real, and the arithmetic of axes would overflow.
LARGEST = 1e100


def as_number(value: object) -> float | None:
    """The value as a finite float; None for everything that is no such number (text, null, NaN, true, 1e200)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST else None  # NaN compares as false


def as_mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def as_mappings(value: object) -> list[Mapping]:
    """The mappings in a list; what is no list, or no mapping in it, is left out."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, (list, tuple)) else []


def as_texts(value: object) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else []


def format_percent(fraction: float | None) -> str:
    return DASH if fraction is None else f"{100 * fraction:.1f}%"


def format_points(difference: float | None) -> str:
    """A difference of two fractions in signed percentage points, with a true minus sign."""
    if difference is None:
        return DASH
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def format_count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def format_short(value: float | None) -> str:
    """Three significant digits with a unit: 4.93M, 131k, 0.0125."""
    if value is None:
        return DASH
    size = abs(value)
    # NOTE: 999.7 rounds to 1,000, so each unit starts a little early; `k` starts late, "4,000" reads better than "4k".
    for unit, start, one in (("T", 999.5e9, 1e12), ("G", 999.5e6, 1e9), ("M", 999.5e3, 1e6), ("k", 9999.5, 1e3)):
        if size >= start:
            return f"{value / one:.3g}{unit}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}").replace("-", "−")


def format_tick(value: float) -> str:
    """As short as the value allows, for an axis: 0, 0.25, 5k, 2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def read_curves(lines: Iterable[object]) -> dict[str, np.ndarray]:
    """The curves of one metrics.jsonl by key, each (N, 2) of step and value, sorted by step.

    A resumed run writes some steps a second time: the later value stands. Values that are not finite are left out.
    """
    recorded: dict[str, dict[float, float]] = {}
    for line in lines:
        step = as_number(as_mapping(line).get("step"))
        if step is None:
            continue
        for key, value in line.items():
            number = as_number(value) if key != "step" else None
            if number is not None:
                recorded.setdefault(str(key), {})[step] = number
    return {key: np.array(sorted(values.items()), dtype=np.float64) for key, values in recorded.items()}


@dataclass(frozen=True)
class ThinCurve:
    """A curve with few points: the mean of each bucket, and the least and the largest value in it. All are (N,)."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin_curve(points: np.ndarray, max_points: int) -> ThinCurve:
    """At most `max_points` buckets of (almost) equally many neighbouring points of an (N, 2) curve."""
    if len(points) <= max_points:
        return ThinCurve(points[:, 0], points[:, 1], points[:, 1], points[:, 1])
    buckets = np.array_split(points, max_points)
    return ThinCurve(
        np.array([bucket[:, 0].mean() for bucket in buckets]),
        np.array([bucket[:, 1].mean() for bucket in buckets]),
        np.array([bucket[:, 1].min() for bucket in buckets]),
        np.array([bucket[:, 1].max() for bucket in buckets]),
    )


def flatten_config(config: object, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON text, in the order of the config; texts are shown without quotes."""
    flat: dict[str, str] = {}
    for key, value in as_mapping(config).items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            is_text = isinstance(value, str)
            flat[f"{prefix}{key}"] = value if is_text else json.dumps(value, ensure_ascii=False, default=str)
    return flat
