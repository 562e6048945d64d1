"""Appending images and classes to a data set that is already prepared.

Appending changes nothing that exists: new shards get the next free numbers, and new classes go to the end of the taxonomy. So the
position of a class in taxonomy.json, and its output index inside its vertical, stay the same. `appending.json` records what
existed before; it is there from before the first new file is written until the last one is, so that a killed run can go on.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from concentration.data.index import ShardIndex
from concentration.data.sources.source import Item
from concentration.data.split_assignment import SPLITS, SplitName
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.taxonomy import Taxonomy, TaxonomyClass

_FILE = "appending.json"
_SHARD_FILE = re.compile(r"(train|val|test)-(\d+)\.(tar|pack|index|hashes|skipped)")


@dataclass(frozen=True)
class Before:
    """What a folder of shards held before the appending that is under way.

    Attributes:
        num_classes: how many classes `taxonomy.json` had; they are still its first ones.
        next_shard: for each split, the number after that of its last shard.
    """

    num_classes: int
    next_shard: dict[str, int]

    @classmethod
    def look(cls, path: Path, taxonomy: Taxonomy) -> "Before":
        """What a folder holds in which nothing is being appended yet."""
        numbers: dict[str, int] = dict.fromkeys(SPLITS, 0)
        # The indices, too, since a user's own tars lie elsewhere.
        for file in [*path.glob("*.tar"), *path.glob("*.pack"), *path.glob("*.index")]:
            split, number = _parse_name(file)
            numbers[split] = max(numbers[split], number + 1)
        return cls(taxonomy.num_classes, numbers)

    @classmethod
    def load(cls, path: Path) -> "Before | None":
        """What `save` recorded; None if no appending is under way.

        Raises:
            DataError: the file is damaged.
        """
        try:
            values = json.loads((path / _FILE).read_text(encoding="utf-8"))
            return cls(int(values["num_classes"]), {split: int(values["next_shard"][split]) for split in SPLITS})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / _FILE}: damaged ({error!r}); delete {path} and prepare again") from None

    def save(self, path: Path) -> None:
        """Records that appending begins."""
        write_atomically(path / _FILE, asdict(self))

    def forget(self, path: Path) -> None:
        """Records that appending has finished."""
        (path / _FILE).unlink(missing_ok=True)

    def holds(self, file: Path) -> bool:
        """Whether this shard, or the shard that this file describes, existed before."""
        split, number = _parse_name(file)
        return number < self.next_shard[split]

    def taxonomy(self, path: Path) -> Taxonomy:
        """The taxonomy as it was before: its first `num_classes` classes."""
        return Taxonomy(Taxonomy.load(path / "taxonomy.json").classes[: self.num_classes], f"{path}/taxonomy.json")


@dataclass(frozen=True)
class Kept:
    """The samples of the existing shards, compared with what the source lists now.

    Attributes:
        splits: for each key that the source still lists, the split whose shards hold it.
        num_gone: how many samples the source no longer lists; they stay in their shards.
        num_other_labels: for how many samples the source lists other labels now; the stored labels stay.
    """

    splits: dict[str, SplitName]
    num_gone: int
    num_other_labels: int


def find_kept(path: Path, before: Before, taxonomy: Taxonomy, items: Mapping[str, Item]) -> Kept:
    """Compares the samples of the existing shards with what the source lists now.

    Args:
        path: the folder of shards.
        before: what the folder held before appending.
        taxonomy: a taxonomy that has all classes of `items`.
        items: all items that the source lists, by key.

    Raises:
        DataError: an index is damaged.
    """
    splits: dict[str, SplitName] = {}
    num_gone = num_other_labels = 0
    for index_path in sorted(path.glob("*.index")):
        if not before.holds(index_path):
            continue
        index = ShardIndex.load(index_path)
        for row, key in enumerate(index.keys):
            item = items.get(key)
            if item is None:
                num_gone += 1
                continue
            splits[key], _ = _parse_name(index_path)
            earlier = index.label_position[index.label_start[row] : index.label_start[row + 1]]
            num_other_labels += set(earlier.tolist()) != {taxonomy.position.get(label) for label in item.labels}
    return Kept(splits, num_gone, num_other_labels)


def append_classes(earlier: Taxonomy, now: Sequence[TaxonomyClass], where: str) -> Taxonomy:
    """The taxonomy with the earlier classes unchanged, followed by those that only `now` has, in the order of `now`.

    An earlier class keeps its parents in other verticals, too, whatever they are in `now`: labels are not smeared to them, and
    Open Images lists those alone whose verticals have an image (a lobster is seafood once there is food).

    Raises:
        DataError: a class has another vertical in `now`, or other parents in it, so that stored outputs would change their
            meaning.
    """
    vertical_of = {c.id: c.vertical for c in (*earlier.classes, *now)}
    for c in now:
        if c.id in earlier.position:
            old = earlier.classes[earlier.position[c.id]]
            before, after = (sorted(p for p in a.parents if vertical_of[p] == a.vertical) for a in (old, c))
            for what, was, now_is in (("vertical", old.vertical, c.vertical), ("parents", before, after)):
                if was != now_is:
                    raise DataError(
                        f"{where}: class '{c.id}' had the {what} {was!r}, and now {now_is!r}; "
                        "restore it, or prepare everything anew with overwrite=true"
                    )
    return Taxonomy([*earlier.classes, *(c for c in now if c.id not in earlier.position)], where)


def extend_classes(earlier: Taxonomy, now: Taxonomy, where: str) -> Taxonomy:
    """As `append_classes`, for shards whose labels are positions (.cls): there `now` must list its new classes last.

    Raises:
        DataError: a new class is not at the end, a class is missing, or has another vertical or other parents.
    """
    extended = append_classes(earlier, now.classes, where)
    for position, pair in enumerate(itertools.zip_longest(extended.classes, now.classes)):
        expected, found = (None if c is None else c.id for c in pair)
        if expected != found:
            raise DataError(
                f"{where}: class {found!r} at position {position}, expected {expected!r}; classes may only be added at the "
                "end: restore the others, or prepare everything anew with overwrite=true"
            )
    return extended


def _parse_name(path: Path) -> tuple[SplitName, int]:
    found = _SHARD_FILE.fullmatch(path.name)
    if found is None:
        raise DataError(f"{path}: no shard of `concentrate prepare`; move it elsewhere")
    return found[1], int(found[2])
