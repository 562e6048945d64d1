"""`data=shards`: existing WebDataset shards with a taxonomy.json. They stay where they are: on this machine, or behind a URL."""

import functools
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from braceexpand import braceexpand

from concentration.data.index import index_shard
from concentration.data.near_duplicates import MaxDistance
from concentration.data.remote import Location, Remote, is_url, join, parse_location
from concentration.data.shard_cache import Access, CacheConfig, ShardCache
from concentration.data.shard_members import LabelMember
from concentration.data.split_assignment import SplitName
from concentration.data.views import ViewConfig
from concentration.errors import ConfigError, DataError
from concentration.schema import Config, parse_json
from concentration.taxonomy import Taxonomy


class ShardsConfig(Config):
    """Where the shards are, and to which split each belongs.

    path: the folder of the shards, or its URL: `s3://bucket/prefix`, `https://host/folder`, or any other that fsspec opens.
    taxonomy: the taxonomy's file or its URL; None is `taxonomy.json` in that folder.
    train, val, test: patterns of file names. Wildcards are looked up in the folder (over http, in the page that lists it). Names
        in braces, `train-{000000..000099}.tar`, must all exist, and the folder is not listed. `val` and `test` may match nothing,
        or be null; then there is no such split.
    labels: which member holds a sample's labels; `auto` takes whichever of `.json` and `.cls` there is, and refuses both.
    image_size: the side of the networks' input in pixels; shards keep images in their own size.
    view: the augmentation of training images.
    near_duplicates: images of different splits are reported as near-duplicates if their perceptual hashes differ in at most this
        many of 64 bits; None does not look for any, and decodes no image. If it is changed, preparing again only repeats the
        search.
    storage_options: arguments of fsspec's file system. They are written to disk and must hold no secrets, which are taken from
        the environment.
    cache: the cache of remote shards. If only this or `storage_options` changes, preparing again only records it.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path", "storage_options", "cache", "near_duplicates"})

    kind: Literal["shards"] = "shards"
    path: Annotated[Location, pydantic.BeforeValidator(parse_location)]
    taxonomy: Annotated[Location, pydantic.BeforeValidator(parse_location)] | None = None
    train: str = "train-*.tar"
    val: str | None = "val-*.tar"
    test: str | None = "test-*.tar"
    labels: LabelMember = "auto"
    image_size: pydantic.PositiveInt = 224
    view: ViewConfig = ViewConfig()
    near_duplicates: MaxDistance | None = None
    storage_options: dict[str, Any] | None = None
    cache: CacheConfig = CacheConfig()

    @pydantic.model_validator(mode="after")
    def _check_access(self):
        _ = self.access  # refuses secrets
        if not self.is_remote and (self.storage_options or self.cache != CacheConfig()):
            raise ValueError("storage_options and cache are for remote shards, and data.path is no URL; remove them")
        return self

    @property
    def is_remote(self) -> bool:
        return isinstance(self.path, str)

    @property
    def access(self) -> Access:
        return Access(storage_options=self.storage_options, cache=self.cache)


def load_shards_taxonomy(config: ShardsConfig) -> Taxonomy:
    """The taxonomy of the shards. Raises: DataError if it cannot be read, or is no taxonomy."""
    location = config.taxonomy or join(config.path, "taxonomy.json")
    if isinstance(location, Path):
        return Taxonomy.load(location)
    return Taxonomy.from_json(parse_json(config.access.build_remote().read(location), location), location)


def list_shards(config: ShardsConfig, split: SplitName) -> list[Location]:
    """The tars of a split, sorted.

    Raises:
        ConfigError: the pattern is not one of file names.
        DataError: there is no tar for training, or a match is not a file.
    """
    pattern = getattr(config, split)
    if pattern is None and split != "train":
        return []
    names = _expand_braces(config, split, pattern)
    find = functools.partial(_find_remote, config.access.build_remote()) if config.is_remote else _find_here
    found: set[Location] = set()
    for name in names:
        if "{" in pattern and not glob.has_magic(name):
            found.add(join(config.path, name))
        else:
            found.update(find(config.path, name))
    if not found and split == "train":
        raise DataError(
            f"{config.path}: no file matches data.train={pattern}; give the folder and pattern of your shards"
        )
    for location in found:
        if isinstance(location, Path) and not location.is_file():
            raise DataError(
                f"{location}: no file, but a folder, a link to nowhere or nothing; bring it, remove it or narrow "
                f"data.{split}={pattern}"
            )
    return sorted(found)


def check_owners(config: ShardsConfig, shards_of: Mapping[SplitName, Sequence[Location]]) -> None:
    """Raises: DataError if a tar belongs to two splits, since a network would be tested on what it was trained on."""
    owner: dict[Location, SplitName] = {}
    for split, shards in shards_of.items():
        for shard in shards:
            if shard in owner:
                raise DataError(
                    f"{shard}: matches both data.{owner[shard]}={getattr(config, owner[shard])} and "
                    f"data.{split}={getattr(config, split)}; give patterns that no file shares"
                )
            owner[shard] = split


def index_given_shard(
    shard: Location, index_path: Path, taxonomy: Taxonomy, labels: LabelMember, cache: ShardCache | None
) -> None:
    """Writes the index of one shard, unless it exists. A remote shard is fetched into the cache, where training finds it."""
    if index_path.exists():
        return
    if isinstance(shard, Path):
        index = index_shard(shard, taxonomy, str(shard.resolve()), labels)
    else:
        index = cache.admit(shard, lambda path: index_shard(path, taxonomy, shard, labels))
    index.save(index_path)


def _expand_braces(config: ShardsConfig, split: SplitName, pattern: str) -> list[str]:
    """The patterns that a pattern with braces stands for. Raises: ConfigError if it is not one of names in the folder."""
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        names = []
    if not all(names) or not names or any(name.startswith("/") or is_url(name) for name in names):
        raise ConfigError(
            f"data.{split}={pattern}: expected a pattern of names in data.path, like 'train-*.tar' or "
            "'train-{000000..000099}.tar'"
        )
    return names


def _find_here(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern))


def _find_remote(remote: Remote, folder: str, pattern: str) -> list[str]:
    return remote.glob(join(folder, pattern))
