"""Assigns samples to the splits train, val and test: by shares of all samples, or by a number of samples per class.

A group is a set of samples that must stay in one split, such as all photographs of one product, session or photographer. A sample
without a group is a group by itself. A sample never moves to another split when data is added: shares depend on nothing but the
hash of the group, and samples that are already prepared keep their split.
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

#: The names by which folders and table columns call the splits, in lower case: see `find_split`.
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
    """How the splits val and test are taken from the training samples, if the source itself does not have them.

    group: what the samples of one group have in common; each source says which names it knows. None: every sample is a group.
    val_share, test_share: the share of the groups, chosen by a hash; None is 0.1, or 0 if a number per class is given.
    val_per_class, test_per_class: at least so many samples of every class (the paper's EFT has 50), taken in whole groups.
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
        """The share of all groups that goes to `val` or `test`, with the default filled in."""
        share = getattr(self, f"{split}_share")
        if share is None:
            return _DEFAULT_SHARE if self.per_class(split) is None else 0.0
        return share

    def per_class(self, split: SplitName) -> int | None:
        """The number of samples per class that goes to `val` or `test`; None if the split is taken by a share."""
        return getattr(self, f"{split}_per_class")

    def asks_for(self, split: SplitName) -> bool:
        """Whether the user has set the size of this split, so that ignoring it would be an error."""
        return bool(getattr(self, f"{split}_share") or self.per_class(split))


def find_split(name: str) -> SplitName | None:
    """The split that a folder or column calls by this name, in upper or lower case; None if it is not the name of a split."""
    return SPLIT_OF_NAME.get(name.lower())


class Splittable(Protocol):
    """A sample as a source lists it; `split` is the source's own assignment, "train" if it has none."""

    key: str
    labels: tuple[str, ...]
    split: SplitName
    group: str | None


@dataclass(frozen=True)
class Assignment:
    """The splits of samples, and where the configuration could not be met.

    Attributes:
        splits: the split of every sample, in the order of the samples.
        num_torn: how many groups lie in several splits, because the source or an earlier preparation put them there.
        num_ungrouped: of the samples that splits are taken from, how many have no group, where `group` asks for one.
        short_of: for each split, the classes that have fewer samples in it than `val_per_class` or `test_per_class`.
    """

    splits: list[SplitName]
    num_torn: int
    num_ungrouped: int
    short_of: dict[SplitName, list[str]]


def assign_splits(samples: Sequence[Splittable], config: SplitConfig, kept: Mapping[str, SplitName]) -> Assignment:
    """Assigns every sample to a split.

    A val or test split of the source's own is kept, even if it divides a group. If the source lacks one, it is taken from the
    training samples in whole groups; a sample that is added later joins the split of its group.

    Args:
        samples: all samples that the source lists; keys are unique.
        config: how val and test are taken.
        kept: the split of each sample that is already prepared, by key.

    Raises:
        ConfigError: `config` sets the size of a split that the source already has.
    """
    given = {sample.split for sample in samples}
    for split in ("val", "test"):
        if split in given and config.asks_for(split):
            raise ConfigError(
                f"data.split: the source has its own {split}, so that {split}_share and {split}_per_class have no effect; "
                "leave them out"
            )
    # Only training samples are assigned here: if a photographer's image is in the source's own test set, that does not move the
    # photographer's training images there.
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
    is_taken = config.group is not None and not {"val", "test"} <= given
    num_ungrouped = sum(sample.group is None for sample in samples if sample.split == "train") if is_taken else 0
    return Assignment(splits, _count_torn(samples, splits), num_ungrouped, short_of)


def _take_per_class(
    groups: Mapping[str, Sequence[Splittable]],
    split_of_group: dict[str, SplitName],
    kept: Mapping[str, SplitName],
    split: SplitName,
    count: int,
) -> list[str]:
    """Puts groups into `split`, in the order of their hashes, until it has `count` samples of every class.

    Changes `split_of_group`, and returns the classes that still have fewer samples. No class loses its last training group.
    One pass is enough: as groups are taken, the number of samples that a class lacks, and of groups it can spare, only fall.
    """
    num_samples: dict[str, int] = {}  # for each class: its samples in this split
    num_groups: dict[str, int] = {}  # for each class: its groups that are in train, or not assigned yet
    for group, members in groups.items():
        for label in {label for sample in members for label in sample.labels}:
            num_samples.setdefault(label, 0)
            num_groups[label] = num_groups.get(label, 0) + (split_of_group.get(group, "train") == "train")
        for sample in members:
            if kept.get(sample.key, split_of_group.get(group)) == split:
                for label in sample.labels:
                    num_samples[label] += 1
    undecided = [group for group in groups if group not in split_of_group]
    # NOTE: the hash is not that of the shares, so that a split by share and one by number do not prefer the same groups.
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
    """How many groups have samples in several splits."""
    first: dict[str, SplitName] = {}
    torn = set()
    for sample, split in zip(samples, splits, strict=True):
        if sample.group is not None and first.setdefault(sample.group, split) != split:
            torn.add(sample.group)
    return len(torn)


def _group(sample: Splittable) -> str:
    """The name of a sample's group. A sample without one has its key, marked so that it never equals a group's name."""
    return f"key {sample.key}" if sample.group is None else f"group {sample.group}"


def _hash(text: str) -> float:
    """A hash of the text, evenly spread over [0, 1), and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
