"""Values of the report: reads numbers from JSON that may lack them, thins curves to what a screen can show, and formats numbers.

Nothing here raises for wrong input, since a report is often opened to find out what went wrong: a value that is missing or not
finite becomes None, and is shown as a dash.

Shapes: N logged points of one curve.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

DASH = "–"
#: Larger numbers are not read: no metric has such a value, and the arithmetic of axes would overflow.
LARGEST = 1e100


def as_number(value: object) -> float | None:
    """The value as a finite float; None if it is no number, or not finite, or beyond `LARGEST`. A bool is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST else None  # the comparison is false for NaN


def as_mapping(value: object) -> Mapping:
    """The value, or an empty mapping if it is none."""
    return value if isinstance(value, Mapping) else {}


def as_mappings(value: object) -> list[Mapping]:
    """The mappings in a list; other elements are left out, and what is no list counts as an empty one."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, (list, tuple)) else []


def as_texts(value: object) -> list[str]:
    """The elements of a list as texts; what is no list counts as an empty one."""
    return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else []


def format_percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal: 12.3%."""
    return DASH if fraction is None else f"{100 * fraction:.1f}%"


def format_points(difference: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign and one decimal: +1.2."""
    if difference is None:
        return DASH
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def format_count(value: float | None) -> str:
    """A whole number with commas: 12,345."""
    return DASH if value is None else f"{value:,.0f}"


def format_short(value: float | None) -> str:
    """A number with three significant digits and a unit: 4.93M, 131k, 0.0125."""
    if value is None:
        return DASH
    size = abs(value)
    # Each unit starts a little early, since 999.7 rounds to 1,000; `k` starts late, since "4,000" reads better than "4k".
    for unit, start, one in (("T", 999.5e9, 1e12), ("G", 999.5e6, 1e9), ("M", 999.5e3, 1e6), ("k", 9999.5, 1e3)):
        if size >= start:
            return f"{value / one:.3g}{unit}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}").replace("-", "−")


def format_tick(value: float) -> str:
    """A round number as briefly as possible, for an axis: 0, 0.25, 5k, 2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def read_curves(lines: Iterable[object]) -> dict[str, np.ndarray]:
    """The curves of one metrics.jsonl by key, each (N, 2) float64: step and value, sorted by step.

    A resumed run logs some steps again; the later value counts. Values that are not finite are left out.
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
    """A curve with few points, each the mean of a bucket of neighbouring points.

    Attributes:
        x, y: (N,) the mean step and value of each bucket.
        low, high: (N,) the smallest and the largest value in it.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin_curve(points: np.ndarray, max_points: int) -> ThinCurve:
    """Thins a curve, (N, 2), to at most `max_points` buckets with about equally many points."""
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
    """The values of a nested configuration as JSON by dotted key, in its order; texts have no quotes."""
    flat: dict[str, str] = {}
    for key, value in as_mapping(config).items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            is_text = isinstance(value, str)
            flat[f"{prefix}{key}"] = value if is_text else json.dumps(value, ensure_ascii=False, default=str)
    return flat
