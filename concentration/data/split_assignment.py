"""Which sample is for training, validation or the test: by a hash, or a number of samples of every class.

A group is what must not be torn apart: all photographs of one product, session or photographer. A sample without a group is
a group by itself. A split is a pure function of the samples and of the splits that an earlier preparation gave them, so a
sample never moves: shares depend on the group's hash alone, and what is prepared already keeps its split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import pydantic

from concentration.data.views import Share
from concentration.errors import ConfigError
from concentration.schema import Config

SPLITS = ("train", "val", "test")
SplitName = Literal["train", "val", "test"]

#: What the splits are called in folders and columns, in capitals or not: see `find_split`.
SPLIT_OF_NAME: Mapping[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

_DEFAULT_SHARE = 0.1


class SplitConfig(Config):
    """How validation and test are cut off the training samples, where the source itself has none.

    group: what samples of one group have in common; each source says what it names. None: every sample by itself.
    val_share, test_share: of the groups, by a hash; None is 0.1, or nothing where a number per class is given.
    val_per_class, test_per_class: at least so many samples of every class (the paper's EFT has 50), whole groups at a time.
    """

    group: str | None = None
    val_share: Share | None = None
    test_share: Share | None = None
    val_per_class: pydantic.PositiveInt | None = None
    test_per_class: pydantic.PositiveInt | None = None

    @pydantic.model_validator(mode="after")
    def _check(self):
        for split in ("val", "test"):
            share, count = self.share(split), self.per_class(split)
            if share and count:
                raise ValueError(f"data.split: {split}_share={share} and {split}_per_class={count}: give one of them")
        if self.share("val") + self.share("test") > 1:
            raise ValueError(
                f"data.split: val_share={self.share('val')} and test_share={self.share('test')}: more than all samples"
            )
        return self

    def share(self, split: SplitName) -> float:
        share = getattr(self, f"{split}_share")
        if share is None:
            return _DEFAULT_SHARE if self.per_class(split) is None else 0.0
        return share

    def per_class(self, split: SplitName) -> int | None:
        return getattr(self, f"{split}_per_class")

    def asks_for(self, split: SplitName) -> bool:
        """Whether the user has said how large the split is to be."""
        return bool(getattr(self, f"{split}_share") or self.per_class(split))


def find_split(name: str) -> SplitName | None:
    """The split that a folder or a column calls so; None where it is no name of one."""
    return SPLIT_OF_NAME.get(name.lower())


class Splittable(Protocol):
    """A sample as it is listed: `split` is the source's own, "train" where it has none."""

    key: str
    labels: tuple[str, ...]
    split: SplitName
    group: str | None


@dataclass(frozen=True)
class Assignment:
    """The splits of samples, and what could not be as it was asked for.

    Attributes:
        splits: of every sample, in the order they were given.
        num_torn: groups that lie in several splits, because the source or an earlier preparation put them there.
        short_of: by split, the classes that have fewer samples in it than `val_per_class` or `test_per_class`.
    """

    splits: list[SplitName]
    num_torn: int
    short_of: dict[SplitName, list[str]]


def assign_splits(samples: Sequence[Splittable], config: SplitConfig, kept: Mapping[str, SplitName]) -> Assignment:
    """The split of every sample.

    A split that the source gives is kept, also where it tears a group; one that it does not give is cut off its training
    samples. No group is torn by that, and the members that come to a group later join it.

    Args:
        samples: all that the source lists; keys are unique.
        config: how to cut.
        kept: by key, the splits of samples that are prepared already.

    Raises:
        ConfigError: it is said how to cut a split that the source gives.
    """
    given = {sample.split for sample in samples}
    for split in ("val", "test"):
        if split in given and config.asks_for(split):
            raise ConfigError(
                f"data.split: the source has its own {split}, so that {split}_share and {split}_per_class have no effect; "
                "leave them out"
            )
    # Only these are cut: a photographer in the source's own test set does not take all training images there.
    open_groups: dict[str, list[Splittable]] = {}
    for sample in samples:
        if sample.split == "train":
            open_groups.setdefault(_group(sample), []).append(sample)
    split_of_group: dict[str, SplitName] = {}
    for group, members in open_groups.items():
        earlier = {kept[sample.key] for sample in members if sample.key in kept}
        if earlier:
            split_of_group[group] = min(earlier, key=SPLITS.index)
    short_of = {}
    for split in ("test", "val"):
        count = config.per_class(split)
        if count is not None and split not in given:
            short_of[split] = _take_per_class(open_groups, split_of_group, kept, split, count)
    test_share, val_share = (0.0 if split in given else config.share(split) for split in ("test", "val"))
    for group in open_groups:
        if group not in split_of_group:
            place = _hash(group)
            is_val = place < test_share + val_share
            split_of_group[group] = "test" if place < test_share else "val" if is_val else "train"
    splits: list[SplitName] = []
    for sample in samples:
        own = sample.split if sample.split != "train" else split_of_group[_group(sample)]
        splits.append(kept.get(sample.key, own))
    return Assignment(splits, _count_torn(samples, splits), short_of)


def _take_per_class(
    groups: Mapping[str, Sequence[Splittable]],
    split_of_group: dict[str, SplitName],
    kept: Mapping[str, SplitName],
    split: SplitName,
    count: int,
) -> list[str]:
    """Puts groups into `split`, smallest hash first, until it has `count` samples of every class; returns those short of it.

    No class loses its last training group. One pass is enough: what a class lacks, and what it could lose, only falls.
    """
    num_samples: dict[str, int] = {}  # of each class in this split
    num_groups: dict[str, int] = {}  # of each class that are, or may come to be, for training
    for group, members in groups.items():
        for label in {label for sample in members for label in sample.labels}:
            num_samples.setdefault(label, 0)
            num_groups[label] = num_groups.get(label, 0) + (split_of_group.get(group, "train") == "train")
        for sample in members:
            if kept.get(sample.key, split_of_group.get(group)) == split:
                for label in sample.labels:
                    num_samples[label] += 1
    undecided = [group for group in groups if group not in split_of_group]
    # NOTE: another hash than that of the shares, which may cut the other split off the same groups.
    for group in sorted(undecided, key=lambda group: (_hash(f"{split} {group}"), group)):
        labels = [label for sample in groups[group] for label in sample.labels]
        is_wanted = any(num_samples[label] < count for label in labels)
        if is_wanted and all(num_groups[label] > 1 for label in labels):
            split_of_group[group] = split
            for label in labels:
                num_samples[label] += 1
            for label in set(labels):
                num_groups[label] -= 1
    return sorted(label for label, found in num_samples.items() if found < count)


def _count_torn(samples: Sequence[Splittable], splits: Sequence[SplitName]) -> int:
    first: dict[str, SplitName] = {}
    torn = set()
    for sample, split in zip(samples, splits, strict=True):
        if sample.group is not None and first.setdefault(sample.group, split) != split:
            torn.add(sample.group)
    return len(torn)


def _group(sample: Splittable) -> str:
    """NOTE: a key and a group may be the same text; the mark keeps them apart."""
    return f"key {sample.key}" if sample.group is None else f"group {sample.group}"


def _hash(text: str) -> float:
    """Evenly spread over [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
