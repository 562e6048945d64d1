"""Which evaluations the report may set against each other: those on the same test images, with the same verticals."""

from collections.abc import Mapping
from typing import Any

from concentration.stages.report_values import as_mapping, as_mappings, as_number, format_count

#: In an evaluation, as the report reads it: the fingerprint of the test images, and of the map that gave their labels if any.
IMAGES = "images"
NUM_VERTICALS_NAMED = 6


def is_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether nothing says that they were measured on different test images; one made by hand may say nothing of it."""
    facts = zip(_read_facts(first), _read_facts(second), strict=True)
    return all(mine == other for mine, other in facts if mine and other)


def split_comparable(
    evaluations: Mapping[str, Mapping[str, Any]], subject: str
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """Those that are comparable with the subject's, itself among them, and the others; both in the order given."""
    own = as_mapping(evaluations.get(subject))
    is_like = {name: is_comparable(own, as_mapping(evaluation)) for name, evaluation in evaluations.items()}
    comparable, elsewhere = ({n: e for n, e in evaluations.items() if is_like[n] is kind} for kind in (True, False))
    return comparable, elsewhere


def describe_images(evaluation: Mapping[str, Any]) -> str:
    """As in "94 test images in 4 verticals (birds, fish, insects, trees)"."""
    verticals = list_verticals(evaluation)
    named = ", ".join(verticals[:NUM_VERTICALS_NAMED])
    more = f" and {len(verticals) - NUM_VERTICALS_NAMED} more" if len(verticals) > NUM_VERTICALS_NAMED else ""
    where = (
        f"{len(verticals)} vertical{'s' * (len(verticals) != 1)} ({named}{more})" if verticals else "unknown verticals"
    )
    return f"{format_count(as_number(evaluation.get('num_samples')))} test images in {where}"


def list_verticals(evaluation: Mapping[str, Any]) -> list[str]:
    """Of its classes; those with an AP where it lists no classes."""
    of_classes = dict.fromkeys(str(c["vertical"]) for c in as_mappings(evaluation.get("classes")) if "vertical" in c)
    return list(of_classes or as_mapping(evaluation.get("pvap")))


def _read_facts(evaluation: Mapping[str, Any]) -> tuple:
    """What has to be equal; what is empty is not known."""
    return as_mapping(evaluation.get(IMAGES)), as_number(evaluation.get("num_samples")), set(list_verticals(evaluation))
