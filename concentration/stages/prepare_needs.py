"""What later stages need of prepared data: said before the first expensive second, and not when a stage comes to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from concentration.data.split import describe_missing_split
from concentration.data.split_assignment import SPLITS
from concentration.errors import ConfigError
from concentration.schema import Config
from concentration.stages.run_directory import RunDirectory


class Need(Config):
    """That a split has images.

    split: the split that must have images.
    why: a sentence for the reader; what is chosen or measured with them.
    of_each_vertical: that every vertical with training images has some there.
    """

    split: Literal["train", "val", "test"]
    why: str
    of_each_vertical: bool = False


def check_needs(shards: Path, needs: Sequence[Need]) -> None:
    """Raises: ConfigError where finished shards lack images that are needed."""
    splits = RunDirectory(shards).load_done("concentrate prepare", splits=dict)["splits"]
    num_images = {split: splits.get(split, {"samples": 0})["samples"] for split in SPLITS}
    for need in needs:
        if not num_images[need.split]:
            missing = f"({', '.join(f'{count} {name}' for name, count in num_images.items())})"
        elif without := _find_verticals_without(splits, need):
            missing = f"of {', '.join(without[:5])}" + ", ..." * (len(without) > 5)
        else:
            continue
        raise ConfigError(
            f"{shards}: no {need.split} images {missing}, and {need.why}; {describe_missing_split(need.split)}, "
            "and run again with overwrite=changed"
        )


def _find_verticals_without(splits: dict, need: Need) -> list[str]:
    if not need.of_each_vertical:
        return []
    there = splits[need.split]["by_vertical"]
    return [vertical for vertical in splits["train"]["by_vertical"] if not there.get(vertical)]
