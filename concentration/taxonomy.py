"""The taxonomy: classes with parents, grouped into verticals; their order in the outputs, label smearing and routing.

Shapes: C all classes, M verticals, V classes of one vertical.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concentration.errors import DataError, unreadable
from concentration.schema import CONTROL, check_folder_name, parse_json


@dataclass(frozen=True)
class TaxonomyClass:
    """One class: a leaf or an inner node of the hierarchy. Networks have an output for either."""

    id: str
    name: str
    parents: tuple[str, ...]
    vertical: str


class Taxonomy:
    """Classes in file order, and the output index, which orders them by vertical so that each vertical is one slice.

    Verticals come in the order of their first appearance. Inside a vertical, classes keep their file order. Classes
    are only ever appended to a file, so a class keeps its position inside its vertical for ever.

    Raises:
        DataError: two classes share an id; a parent is unknown, or parents form a cycle; a vertical has one class only, or a
            name that no folder can have; an id holds a control character; two ids or two verticals differ only in spaces or
            in how accents are encoded, or two verticals only in capitals.
    """

    def __init__(self, classes: Sequence[TaxonomyClass], where: str = "taxonomy"):
        self.classes = tuple(classes)
        self._where = where
        self.position = _index_ids(self.classes, where)
        _check_parents(self.classes, self.position, where)
        self.verticals = tuple(dict.fromkeys(c.vertical for c in self.classes))
        vertical_number = {name: number for number, name in enumerate(self.verticals)}
        vertical_of_position = np.array([vertical_number[c.vertical] for c in self.classes], dtype=np.int64)
        #: (C,) for every output, the position of its class in the file.
        self.position_of_output = np.argsort(vertical_of_position, kind="stable")
        #: (C,) for every position in the file, the output of its class.
        self.output_of_position = np.empty_like(self.position_of_output)
        self.output_of_position[self.position_of_output] = np.arange(len(self.classes))
        #: (C,) number of the vertical of every output.
        self.vertical_of_output = vertical_of_position[self.position_of_output]
        #: (M,) number of classes in every vertical: N_v.
        self.vertical_sizes = tuple(int(n) for n in np.bincount(vertical_of_position, minlength=len(self.verticals)))
        #: (M + 1,) the first output of every vertical, then C.
        self.vertical_starts = tuple(int(n) for n in np.concatenate([[0], np.cumsum(self.vertical_sizes)]))
        _check_spellings("class ids", self.position, where, _read_class, "spaces or how accents are encoded")
        _check_spellings(
            "verticals", self.verticals, where, _read_vertical, "capitals, spaces or how accents are encoded"
        )
        for name, size in zip(self.verticals, self.vertical_sizes, strict=True):
            _check_folder_name(name, where)
            if size < 2:
                raise DataError(
                    f"{where}: vertical {name!r} has {size} class, expected at least 2; "
                    "merge it into another vertical or give it more classes"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_verticals(self) -> int:
        return len(self.verticals)

    def class_of_output(self, output: int) -> TaxonomyClass:
        """The class of an output. Raises: DataError where there is no such output."""
        return self.classes[self.position_of_output[self._check_output(output)]]

    def output(self, class_id: str) -> int:
        """The output index of a class.

        Raises:
            DataError: the taxonomy has no such class.
        """
        if class_id not in self.position:
            raise DataError(f"{self._where}: no class {class_id!r}; add it to the taxonomy or correct the label")
        return int(self.output_of_position[self.position[class_id]])

    def vertical_number(self, name: str) -> int:
        """Raises: DataError, listing the verticals, where `name` is none of them."""
        if name not in self.verticals:
            raise DataError(f"{self._where}: no vertical {name!r}; valid: {', '.join(self.verticals)}")
        return self.verticals.index(name)

    def vertical_slice(self, name: str) -> slice:
        """The outputs of one vertical, contiguous by construction."""
        number = self.vertical_number(name)
        return slice(self.vertical_starts[number], self.vertical_starts[number + 1])

    @functools.cached_property
    def is_leaf(self) -> np.ndarray:
        """(C,) bool by output: whether the class is nobody's parent."""
        leaf = np.ones(self.num_classes, dtype=bool)
        for c in self.classes:
            for parent in c.parents:
                leaf[self.output(parent)] = False
        return leaf

    @functools.cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """By output: the outputs of all ancestors inside the class's own vertical, along all of its parents, sorted."""
        # Siblings share one tuple: there may be a million of them, below a few thousand parents.
        above: dict[tuple[str, ...], tuple[int, ...]] = {}
        memo: dict[str, tuple[int, ...]] = {}
        for class_id in _parents_first(self.classes, self.position):
            c = self.classes[self.position[class_id]]
            inside = tuple(p for p in c.parents if self.classes[self.position[p]].vertical == c.vertical)
            if inside not in above:
                above[inside] = tuple(sorted({self.output(p) for p in inside}.union(*(memo[p] for p in inside))))
            memo[class_id] = above[inside]
        return tuple(memo[self.classes[position].id] for position in self.position_of_output)

    def smear(self, outputs: Iterable[int]) -> tuple[int, ...]:
        """Label smearing: the outputs with their ancestors inside their verticals, sorted (Gao et al., section 3.1).

        Raises:
            DataError: one of them is no output.
        """
        outputs = {self._check_output(output) for output in outputs}
        return tuple(sorted(outputs.union(*(self.ancestors[output] for output in outputs))))

    @functools.cached_property
    def smeared_outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """`smear([output])` of all outputs, concatenated: (C + 1,) where each begins, and (S,) the outputs; both int64."""
        smeared = [self.smear([output]) for output in range(self.num_classes)]
        start = np.cumsum([0, *map(len, smeared)])
        return start, np.fromiter(itertools.chain.from_iterable(smeared), dtype=np.int64, count=start[-1])

    def route(self, outputs: Iterable[int]) -> tuple[str, ...]:
        """F_map: the verticals whose teachers see a sample with these labels, in order (Gao et al., section 3.1).

        Raises:
            DataError: one of the labels is no output.
        """
        numbers = {int(self.vertical_of_output[self._check_output(output)]) for output in outputs}
        return tuple(self.verticals[number] for number in sorted(numbers))

    def lineage(self, output: int) -> tuple[str, ...]:
        """Names from the furthest ancestor to the class itself, along the first parent inside the vertical."""
        names = []
        c: TaxonomyClass | None = self.class_of_output(output)
        while c is not None:
            names.append(c.name)
            inside = [self.classes[self.position[p]] for p in c.parents]
            inside = [p for p in inside if p.vertical == c.vertical]
            c = inside[0] if inside else None
        return tuple(reversed(names))

    def restrict(self, vertical: str) -> "Taxonomy":
        """The taxonomy of one vertical alone, as its teacher sees it: the same classes in the same order.

        Raises:
            DataError: there is no such vertical.
        """
        # By output and not by looking at every class: there may be a million, and this is asked once a vertical.
        inside = [self.classes[position] for position in self.position_of_output[self.vertical_slice(vertical)]]
        return _build_closed(inside, f"{self._where} [{vertical}]")

    def without(self, verticals: Sequence[str]) -> "Taxonomy":
        """The classes of the other verticals in the same order.

        Raises:
            DataError: one of these verticals does not exist, or no other would be left.
        """
        for vertical in verticals:
            self.vertical_number(vertical)
        kept = set(self.verticals) - set(verticals)
        if not kept:
            raise DataError(f"{self._where}: no vertical would be left without {', '.join(verticals)}; keep one")
        inside = [c for c in self.classes if c.vertical in kept]
        return _build_closed(inside, f"{self._where} without {', '.join(verticals)}")

    def merged(self, verticals: Sequence[str], into: str) -> "Taxonomy":
        """The same classes in the same order, with these verticals merged into one named `into`.

        A parent that lay in another of these verticals then lies inside the merged one, so labels are smeared to it, too.

        Raises:
            DataError: one of these verticals does not exist, or a vertical that is not merged is named `into`.
        """
        for vertical in verticals:
            self.vertical_number(vertical)
        if into in self.verticals and into not in verticals:
            raise DataError(f"{self._where}: there is a vertical {into!r} already; merge it, too, or give another name")
        classes = [dataclasses.replace(c, vertical=into) if c.vertical in verticals else c for c in self.classes]
        return Taxonomy(classes, f"{self._where} with {into}")

    def _check_output(self, output: int) -> int:
        """The same as an int of Python; -1, which often stands for "no label", would be the last class."""
        number = operator.index(output)
        if not 0 <= number < self.num_classes:
            raise DataError(f"{self._where}: no output {number}; expected 0 to {self.num_classes - 1}")
        return number

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of ids, parents and verticals in order, that is of what the outputs mean; names for display do not count."""
        text = "\n".join(json.dumps([c.id, sorted(c.parents), c.vertical]) for c in self.classes)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict:
        return {
            "classes": [
                {"id": c.id, "name": c.name, "parents": list(c.parents), "vertical": c.vertical} for c in self.classes
            ]
        }

    @classmethod
    def from_json(cls, content: object, where: str = "taxonomy") -> "Taxonomy":
        """The taxonomy of a parsed `taxonomy.json`. Raises: DataError, naming the entry, where `content` is none."""
        if not isinstance(content, Mapping) or not isinstance(content.get("classes"), list):
            raise DataError(f'{where}: expected {{"classes": [...]}}, found {type(content).__name__} without it')
        if not content["classes"]:
            raise DataError(f"{where}: 'classes' is empty; a taxonomy needs at least two classes")
        return cls([_parse_class(entry, f"{where}: classes[{n}]") for n, entry in enumerate(content["classes"])], where)

    @classmethod
    def load(cls, path: str | Path) -> "Taxonomy":
        """The taxonomy of a file. Raises: DataError where it is missing, not JSON, or not a valid taxonomy."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; correct the path or bring it back; `concentrate prepare` writes shards/taxonomy.json, "
                "`concentrate group` groupings/NAME.json"
            ) from None
        except OSError as error:
            raise unreadable(path, error) from None
        return cls.from_json(parse_json(content, str(path)), str(path))


_KEYS = ("id", "name", "parents", "vertical")


@functools.cache  # a key of the user's own is in every class
def _find_near_key(key: str) -> list[str]:
    return difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.75)


def _parse_class(entry: object, where: str) -> TaxonomyClass:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected an object with id, name, parents, vertical; found {entry!r}")
    for key in entry:
        # Keys of the user's own are fine, but "parent" for "parents" would silently lose the hierarchy.
        if key not in _KEYS and (near := _find_near_key(key)):
            raise DataError(f"{where}: unknown key {key!r}; did you mean '{near[0]}'?")
    class_id, vertical = entry.get("id"), entry.get("vertical")
    name, parents = entry.get("name", class_id), entry.get("parents", [])
    for key, value in (("id", class_id), ("vertical", vertical), ("name", name)):
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: '{key}' is {value!r}, expected a text that is not empty")
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise DataError(f"{where} ({class_id!r}): 'parents' is {parents!r}, expected a list of class ids")
    return TaxonomyClass(class_id, name, tuple(parents), vertical)


def _index_ids(classes: Sequence[TaxonomyClass], where: str) -> dict[str, int]:
    position: dict[str, int] = {}
    for number, c in enumerate(classes):
        if CONTROL.search(c.id):
            raise DataError(
                f"{where}: the class id {c.id!r} has a line break or another control character; leave it out, as ids stand one a "
                "line in files"
            )
        if c.id in position:
            raise DataError(
                f"{where}: classes[{position[c.id]}] and classes[{number}] share the id {c.id!r}; make ids unique"
            )
        position[c.id] = number
    return position


def _check_spellings(what: str, texts: Iterable[str], where: str, read: Callable[[str], str], differences: str) -> None:
    """Raises: DataError where `read` makes two texts the same, which then differ only in `differences`."""
    seen: dict[str, str] = {}
    for text in texts:
        if (alike := read(text)) in seen:
            raise DataError(
                f"{where}: the {what} {seen[alike]!a} and {text!a} differ in {differences} alone; write both alike, or rename one"
            )
        seen[alike] = text


def _read_class(text: str) -> str:
    """The text as people read it. NOTE: macOS and Linux encode accents differently; and a CSV may say `birds / gull`."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return "/".join(" ".join(part.split()) for part in composed.split("/"))


def _read_vertical(text: str) -> str:
    """As `_read_class`, and without capitals: on a disk that ignores case, as macOS's does, two folders would be one."""
    return _read_class(text).casefold()


def _check_folder_name(vertical: str, where: str) -> None:
    try:
        check_folder_name(vertical)
    except ValueError as error:
        shown = vertical if len(vertical) <= 40 else f"{vertical[:20]}..."
        raise DataError(f"{where}: vertical {shown!r}: {error}") from None


def _check_parents(classes: Sequence[TaxonomyClass], position: Mapping[str, int], where: str) -> None:
    for c in classes:
        for parent in c.parents:
            if parent not in position:
                raise DataError(
                    f"{where}: class {c.id!r} has the parent {parent!r}, which is no class; add or remove it"
                )
    placed = set(_parents_first(classes, position))
    stuck = [c for c in classes if c.id not in placed]
    if stuck:
        raise DataError(f"{where}: the parents form a cycle: {_describe_cycle(stuck)}; remove one of these parents")


def _parents_first(classes: Sequence[TaxonomyClass], position: Mapping[str, int]) -> list[str]:
    """Class ids in an order in which parents come before children; the classes on or below a cycle are missing."""
    waiting = {c.id: len(set(c.parents)) for c in classes}
    children: dict[str, list[str]] = {}
    for c in classes:
        for parent in set(c.parents):
            children.setdefault(parent, []).append(c.id)
    ready = [class_id for class_id, count in waiting.items() if count == 0]
    for class_id in ready:  # grows while it is walked
        for child in children.get(class_id, ()):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    return ready


def _describe_cycle(stuck: Sequence[TaxonomyClass]) -> str:
    by_id = {c.id: c for c in stuck}
    path = [stuck[0].id]
    while path[-1] not in path[:-1]:
        path.append(next(parent for parent in by_id[path[-1]].parents if parent in by_id))
    return " -> ".join(map(repr, path[path.index(path[-1]) :]))


def _build_closed(classes: Sequence[TaxonomyClass], where: str) -> Taxonomy:
    """Of these classes, without the parents that are not among them."""
    ids = {c.id for c in classes}
    closed = [dataclasses.replace(c, parents=tuple(p for p in c.parents if p in ids)) for c in classes]
    return Taxonomy(closed, where)
