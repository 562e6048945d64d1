"""Adding images and classes to a prepared set: what was there before, and what stays as it is.

Nothing that was there is changed: new shards are numbered after the old ones, new classes come at the taxonomy's end, so
every position in an index and every output inside its vertical remains. `appending.json` says what was there from before the
first new file is written until all are; a killed run is continued from it.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from concentration.data.index import ShardIndex
from concentration.data.sources.source import Item
from concentration.data.split_assignment import SPLITS, SplitName
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.taxonomy import Taxonomy

_FILE = "appending.json"
_SHARD_FILE = re.compile(r"(train|val|test)-(\d+)\.(tar|pack|index|hashes|skipped)")


@dataclass(frozen=True)
class Before:
    """What a folder of shards held when something was first appended to it, and this had not yet finished.

    Attributes:
        num_classes: the first classes of `taxonomy.json`.
        next_shard: by split, the number after its last shard's.
    """

    num_classes: int
    next_shard: dict[str, int]

    @classmethod
    def look(cls, path: Path, taxonomy: Taxonomy) -> "Before":
        """Of a finished folder of shards."""
        numbers: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for file in [*path.glob("*.tar"), *path.glob("*.pack"), *path.glob("*.index")]:  # given shards lie elsewhere
            split, number = _parse_name(file)
            numbers[split] = max(numbers[split], number + 1)
        return cls(taxonomy.num_classes, numbers)

    @classmethod
    def load(cls, path: Path) -> "Before | None":
        """Of a folder in which appending was begun; None where it was not.

        Raises: DataError where the file is damaged.
        """
        try:
            values = json.loads((path / _FILE).read_text(encoding="utf-8"))
            return cls(int(values["num_classes"]), {split: int(values["next_shard"][split]) for split in SPLITS})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / _FILE}: damaged ({error!r}); delete {path} and prepare again") from None

    def save(self, path: Path) -> None:
        write_atomically(path / _FILE, asdict(self))

    def forget(self, path: Path) -> None:
        (path / _FILE).unlink(missing_ok=True)

    def holds(self, file: Path) -> bool:
        """Whether a shard, or a file beside it, was there."""
        split, number = _parse_name(file)
        return number < self.next_shard[split]

    def taxonomy(self, path: Path) -> Taxonomy:
        """As it was: classes are only ever appended."""
        return Taxonomy(Taxonomy.load(path / "taxonomy.json").classes[: self.num_classes], f"{path}/taxonomy.json")


@dataclass(frozen=True)
class Kept:
    """What a source still lists of the samples that were there.

    Attributes:
        splits: by key, where it lies.
        num_gone: samples that the source does not list any more; they stay in their shards.
        num_other_labels: samples for which the source lists other labels now; the old ones stay.
    """

    splits: dict[str, SplitName]
    num_gone: int
    num_other_labels: int


def find_kept(path: Path, before: Before, taxonomy: Taxonomy, items: Mapping[str, Item]) -> Kept:
    """Looks up the samples of all shards that were there.

    Args:
        path: the folder of shards.
        before: what was there.
        taxonomy: with all classes of `items`.
        items: by key, all that the source lists.

    Raises: DataError where an index is damaged.
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


def append_classes(earlier: Taxonomy, now: Taxonomy, where: str) -> Taxonomy:
    """The earlier classes as they are, and then those that only `now` has, in its order.

    Raises: DataError where a class has another vertical or other parents now: outputs and their smearing would mean something
        else.
    """
    for c in now.classes:
        if c.id in earlier.position:
            old = earlier.classes[earlier.position[c.id]]
            for what, before, after in (
                ("vertical", old.vertical, c.vertical),
                ("parents", sorted(old.parents), sorted(c.parents)),
            ):
                if before != after:
                    raise DataError(
                        f"{where}: class '{c.id}' had the {what} {before!r}, and now {after!r}; "
                        "restore it, or prepare everything anew with overwrite=true"
                    )
    return Taxonomy([*earlier.classes, *(c for c in now.classes if c.id not in earlier.position)], where)


def extend_classes(earlier: Taxonomy, now: Taxonomy, where: str) -> Taxonomy:
    """The same, for a taxonomy whose classes are known by their positions (.cls): new ones must stand at its end.

    Raises: DataError where they do not, a class is gone, or means something else.
    """
    extended = append_classes(earlier, now, where)
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
