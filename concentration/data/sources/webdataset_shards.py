"""`data=shards`: existing WebDataset shards with a taxonomy.json, used where they lie."""

from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from concentration.data.sources.source import Split
from concentration.data.views import ViewConfig
from concentration.errors import ConfigError, DataError
from concentration.schema import Config
from concentration.taxonomy import Taxonomy


class ShardsConfig(Config):
    """Which tars are which split.

    path: the folder of the shards.
    taxonomy: None is `taxonomy.json` in that folder.
    train, val, test: patterns of file names; `val` and `test` may match nothing, and are then not there.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path"})

    kind: Literal["shards"] = "shards"
    path: Path
    taxonomy: Path | None = None
    train: str = "train-*.tar"
    val: str = "val-*.tar"
    test: str = "test-*.tar"
    image_size: pydantic.PositiveInt = 224
    view: ViewConfig = ViewConfig()


def load_shards_taxonomy(config: ShardsConfig) -> Taxonomy:
    return Taxonomy.load(config.taxonomy or config.path / "taxonomy.json")


def list_shards(config: ShardsConfig, split: Split) -> list[Path]:
    """The tars of a split, sorted.

    Raises:
        ConfigError: the pattern is none.
        DataError: there are none for training, or one is no file.
    """
    pattern = getattr(config, split)
    try:
        found = sorted(config.path.glob(pattern))
    except (ValueError, NotImplementedError):
        raise ConfigError(
            f"data.{split}={pattern}: expected a pattern of names in data.path, like 'train-*.tar'"
        ) from None
    if not found and split == "train":
        raise DataError(
            f"{config.path}: no file matches data.train={pattern}; give the folder and pattern of your shards"
        )
    for path in found:
        if not path.is_file():
            raise DataError(
                f"{path}: no file, but a folder or a link to nowhere; remove it or narrow data.{split}={pattern}"
            )
    return found
