"""Says which evaluations or calibrations can be compared: those on the same test images, with the same verticals."""

from collections.abc import Mapping
from typing import Any

from concentration.stages.report_values import as_mapping, as_mappings, as_number, format_count

#: The key under which the report keeps, in an evaluation or calibration, the fingerprints of its test images and of the map that
#: gave them labels, if there was one.
IMAGES = "images"
NUM_VERTICALS_NAMED = 6


def is_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two evaluations can be compared. What one of them does not say, as when made by hand, does not count against it."""
    facts = zip(_read_facts(first), _read_facts(second), strict=True)
    return all(mine == other for mine, other in facts if mine and other)


def split_comparable(
    measured: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """Divides evaluations or calibrations by whether they can be compared with `own`, the evaluation that the page is about.

    Returns:
        The comparable ones and the others, by name in the given order.
    """
    is_like = {name: is_comparable(own, as_mapping(each)) for name, each in measured.items()}
    comparable, elsewhere = ({n: e for n, e in measured.items() if is_like[n] is kind} for kind in (True, False))
    return comparable, elsewhere


def describe_images(measured: Mapping[str, Any]) -> str:
    """Describes the test images of an evaluation: "94 test images in 4 verticals (birds, fish, insects, trees)"."""
    verticals = list_verticals(measured)
    named = ", ".join(verticals[:NUM_VERTICALS_NAMED])
    more = f" and {len(verticals) - NUM_VERTICALS_NAMED} more" if len(verticals) > NUM_VERTICALS_NAMED else ""
    where = (
        f"{len(verticals)} vertical{'s' * (len(verticals) != 1)} ({named}{more})" if verticals else "unknown verticals"
    )
    count = as_number(measured.get("num_samples", measured.get("num_test")))
    return f"{format_count(count)} test images in {where}"


def list_verticals(measured: Mapping[str, Any]) -> list[str]:
    """The verticals of an evaluation (of its classes, or if it lists none, those with an AP) or of a calibration."""
    of_classes = dict.fromkeys(str(c["vertical"]) for c in as_mappings(measured.get("classes")) if "vertical" in c)
    return list(of_classes or as_mapping(measured.get("pvap")) or as_mapping(measured.get("scaling")))


def _read_facts(measured: Mapping[str, Any]) -> tuple:
    """The facts that must be equal for a comparison; an empty one is unknown.

    A calibration's `num_test` is none of them, since it counts only images with a leaf label.
    """
    return as_mapping(measured.get(IMAGES)), as_number(measured.get("num_samples")), set(list_verticals(measured))
