"""What `concentrate prepare` leaves for later stages: the shards' defaults, taxonomy and fingerprint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from concentration.data.split import Split, load_split
from concentration.data.split_assignment import SPLITS
from concentration.data.views import ViewConfig
from concentration.errors import ConfigError, DataError
from concentration.schema import Config, parse_config
from concentration.stages.folders import SHARDS
from concentration.stages.report_values import as_mapping
from concentration.stages.run_directory import RunDirectory
from concentration.taxonomy import Taxonomy


class PreparedData(Config):
    """What `prepare` has decided and later stages need."""

    image_size: int
    view: ViewConfig


class DataOverrides(Config):
    """Changes of the prepared data's defaults for one stage: the size of the network's input, and augmentation.

    image_size: the side of the network's input in pixels; None takes that of the prepared data.
    view: the augmentation; None takes that of the prepared data.
    """

    image_size: pydantic.PositiveInt | None = None
    view: ViewConfig | None = None


def describe_splits(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What DONE.json says of the splits, by name; `train` is among them."""
    train = splits["train"]
    return {
        "taxonomy": train.taxonomy.fingerprint,
        "splits": {name: _count_samples(split) for name, split in splits.items()},
        "fingerprint": train.fingerprint,
    }


def _count_samples(split: Split) -> dict[str, Any]:
    counts = split.count_labels()
    return {
        "samples": len(split),
        "shards": len(split.shards),
        "fingerprint": split.fingerprint,
        "classes_with_images": int(np.count_nonzero(counts)),
        "by_vertical": dict(zip(split.taxonomy.verticals, split.count_routed().tolist(), strict=True)),
    }


def load_prepared(workdir: Path, overrides: DataOverrides) -> tuple[PreparedData, Taxonomy, str]:
    """Image size and augmentation, the taxonomy, and the fingerprint of the shards.

    Raises:
        ConfigError: `prepare` has not finished.
        DataError: the taxonomy is another one than the shards were prepared with, or an index is missing.
    """
    directory = RunDirectory(workdir / SHARDS)
    done = directory.load_done("concentrate prepare", taxonomy=str, splits=dict, fingerprint=str)
    taxonomy = Taxonomy.load(directory.path / "taxonomy.json")
    if taxonomy.fingerprint != done["taxonomy"]:
        raise DataError(
            f"{directory.path}/taxonomy.json: changed since `concentrate prepare`; restore it or prepare again"
        )
    for split in SPLITS:
        facts = done["splits"].get(split, {"shards": 0})
        num_written = facts.get("shards") if isinstance(facts, dict) else facts
        num_found = len(list(directory.path.glob(f"{split}-*.index")))
        if num_found != num_written:
            raise DataError(
                f"{directory.path}: {num_found} files {split}-*.index, but `concentrate prepare` wrote {num_written!r}; "
                f"bring them back, or delete {directory.path} and prepare again"
            )
    data = directory.load_config().get("data")
    known = data if isinstance(data, dict) else {}
    recorded = {name: known[name] for name in PreparedData.model_fields if name in known}
    try:
        prepared = parse_config(PreparedData, recorded)
    except ConfigError as error:
        raise DataError(
            f"{directory.path}/config.json: {error}; bring it back, or delete {directory.path} and prepare again"
        ) from None
    values = prepared.model_dump() | overrides.model_dump(exclude_none=True)
    return parse_config(PreparedData, values), taxonomy, done["fingerprint"]


def has_split(workdir: Path, name: str) -> bool:
    """Whether the prepared set has images in this split."""
    return any((workdir / SHARDS).glob(f"{name}-*.index"))


def load_prepared_split(workdir: Path, name: str, taxonomy: Taxonomy) -> Split:
    """The split `name` as `prepare` has left it.

    Raises:
        ConfigError: `prepare` has not finished.
        DataError: as `load_split`, or an index is not the one that `prepare` wrote, though a whole one.
    """
    split = load_split(workdir / SHARDS, name, taxonomy)
    done = RunDirectory(split.directory).load_done("concentrate prepare", splits=dict, fingerprint=str)
    # Sets of earlier versions have that of `train` alone.
    recorded = done["fingerprint"] if name == "train" else as_mapping(done["splits"].get(name)).get("fingerprint")
    if recorded not in (None, split.fingerprint):
        raise DataError(
            f"{split.directory}/{name}-*.index: not those that `concentrate prepare` wrote; bring them back, or delete "
            f"{split.directory} and prepare again"
        )
    return split
