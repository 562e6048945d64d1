"""What the report may set against each other: evaluations, or calibrations, on the same test images, with the same verticals."""

from collections.abc import Mapping
from typing import Any

from concentration.stages.report_values import as_mapping, as_mappings, as_number, format_count

#: In an evaluation or a calibration, as the report reads it: the fingerprint of the test images, and of the map that gave their
#: labels if any.
IMAGES = "images"
NUM_VERTICALS_NAMED = 6


def is_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether nothing says that they were measured on different test images; one made by hand may say nothing of it."""
    facts = zip(_read_facts(first), _read_facts(second), strict=True)
    return all(mine == other for mine, other in facts if mine and other)


def split_comparable(
    measured: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """Those that are comparable with the page's own evaluation, and the others; both in the order given."""
    is_like = {name: is_comparable(own, as_mapping(each)) for name, each in measured.items()}
    comparable, elsewhere = ({n: e for n, e in measured.items() if is_like[n] is kind} for kind in (True, False))
    return comparable, elsewhere


def describe_images(measured: Mapping[str, Any]) -> str:
    """As in "94 test images in 4 verticals (birds, fish, insects, trees)"."""
    verticals = list_verticals(measured)
    named = ", ".join(verticals[:NUM_VERTICALS_NAMED])
    more = f" and {len(verticals) - NUM_VERTICALS_NAMED} more" if len(verticals) > NUM_VERTICALS_NAMED else ""
    where = (
        f"{len(verticals)} vertical{'s' * (len(verticals) != 1)} ({named}{more})" if verticals else "unknown verticals"
    )
    count = as_number(measured.get("num_samples", measured.get("num_test")))
    return f"{format_count(count)} test images in {where}"


def list_verticals(measured: Mapping[str, Any]) -> list[str]:
    """Of an evaluation's classes, or those with an AP where it lists none; those that a calibration scales."""
    of_classes = dict.fromkeys(str(c["vertical"]) for c in as_mappings(measured.get("classes")) if "vertical" in c)
    return list(of_classes or as_mapping(measured.get("pvap")) or as_mapping(measured.get("scaling")))


def _read_facts(measured: Mapping[str, Any]) -> tuple:
    """What has to be equal; what is empty is not known. A calibration's `num_test` is of the images with a leaf alone."""
    return as_mapping(measured.get(IMAGES)), as_number(measured.get("num_samples")), set(list_verticals(measured))
