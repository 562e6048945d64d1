"""Reads Open Images' tree of classes: nested nodes with `LabelName`, `Subcategory` and `Part`, in which a class may recur."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concentration.errors import DataError, unreadable
from concentration.schema import parse_json


@dataclass(frozen=True)
class Hierarchy:
    """The tree without its root ("Entity"), which is not a class.

    Attributes:
        roots: the children of the root, in order.
        parents: for every class, in the order of the tree, the classes that it is a kind of.
        kinds: for each class with subcategories, these.
        parts: for each class with parts, these; a part is not a kind of its whole.
    """

    roots: tuple[str, ...]
    parents: dict[str, list[str]]
    kinds: dict[str, list[str]]
    parts: dict[str, list[str]]

    def choose_subtree(self, nodes: Sequence[str]) -> dict[str, str]:
        """For every class below one of `nodes`: the first node that it is a kind of, or if there is none, a part of.

        The classes are in the order of the tree.
        """
        chosen: dict[str, str] = {}
        for with_parts in (False, True):
            for node in nodes:
                for c in self._below(node, with_parts):
                    chosen.setdefault(c, node)
        return {c: chosen[c] for c in self.parents if c in chosen}

    def _below(self, node: str, with_parts: bool) -> list[str]:
        found = {node: None}
        waiting = [node]
        while waiting:
            here = waiting.pop()
            for c in self.kinds.get(here, []) + (self.parts.get(here, []) if with_parts else []):
                if c not in found:
                    found[c] = None
                    waiting.append(c)
        return list(found)


def load_hierarchy(path: Path) -> Hierarchy:
    """Reads the file of the tree. Raises: DataError if it has another form."""
    try:
        root = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise unreadable(path, error) from None
    parents: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    roots = []
    waiting = [(root, None, kinds)]
    while waiting:
        node, above, links = waiting.pop(0)
        if not _is_node(node):
            raise DataError(
                f"{path}: a node is {str(node)[:80]}, expected LabelName, and lists Subcategory and Part; fetch the file again"
            )
        here = node["LabelName"]
        if node is not root:
            known = parents.setdefault(here, [])
            if above is None:
                roots.append(here)
            else:
                if links is kinds and above not in known:
                    known.append(above)
                if here not in links.setdefault(above, []):
                    links[above].append(here)
        for key, inner_links in (("Subcategory", kinds), ("Part", parts)):
            inner = node.get(key, [])
            waiting += [(child, None if node is root else here, inner_links) for child in inner]
    return Hierarchy(tuple(dict.fromkeys(roots)), parents, kinds, parts)


def _is_node(node: object) -> bool:
    if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str):
        return False
    return all(isinstance(node.get(key, []), list) for key in ("Subcategory", "Part"))
