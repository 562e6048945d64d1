"""Translates the labels of samples from their own taxonomy into another one, to evaluate a network on foreign data.

Shapes: N samples, L labels, C classes of the samples' own taxonomy.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from concentration.data.split import Split
from concentration.errors import DataError, unreadable
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy


def map_labels(split: Split, taxonomy: Taxonomy, class_map: Mapping[str, str] | None, where: str) -> Split:
    """The same samples with their labels translated into classes of `taxonomy`.

    Labels without a counterpart are dropped, so a sample may be left without labels.

    Args:
        split: the samples with labels of their own taxonomy.
        taxonomy: the taxonomy to translate into.
        class_map: class ids of the split's own taxonomy, mapped to those of `taxonomy`; None keeps the ids that both have.
        where: what errors call the map.

    Raises:
        DataError: the map names a class that its taxonomy lacks, or no sample has a label left.
    """
    own = split.taxonomy
    pairs = {class_id: class_id for class_id in own.position} if class_map is None else class_map
    known = {here: there for here, there in pairs.items() if class_map is not None or there in taxonomy.position}
    output_C = np.full(own.num_classes, -1, dtype=np.int64)
    for here, there in known.items():
        if here not in own.position or there not in taxonomy.position:
            wrong, side = (here, "samples") if here not in own.position else (there, "network")
            raise DataError(
                f"{where}: {here!r} to {there!r}: there is no class {wrong!r} among those of the {side}; correct the map"
            )
        output_C[own.output(here)] = taxonomy.output(there)
    mapped_L = output_C[split.label_output]
    is_kept_L = mapped_L >= 0
    if not is_kept_L.any():
        raise DataError(f"{where}: no sample is left with a label; give a map of the classes (class_map)")
    num_classes = taxonomy.num_classes
    sample, output = np.divmod(
        np.unique(split.sample_of_label[is_kept_L] * num_classes + mapped_L[is_kept_L]), num_classes
    )
    mapped = copy.copy(split)
    for name in ("sample_of_label", "fingerprint"):  # these are cached, and depend on what changes here
        mapped.__dict__.pop(name, None)
    mapped.taxonomy = taxonomy
    mapped.label_output = output.astype(np.int32)
    mapped.label_start = np.searchsorted(sample, np.arange(len(split) + 1))
    return mapped


def load_class_map(path: Path) -> dict[str, str]:
    """Reads a class map: a JSON object from class ids to class ids.

    Raises:
        DataError: the file is missing, cannot be read, or holds something else.
    """
    try:
        content = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a JSON object from their class ids to ours") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise DataError(f'{path}: expected a JSON object from class ids to class ids, such as {{"n02084071": "dog"}}')
    return content
