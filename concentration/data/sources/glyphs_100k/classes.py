"""The classes of Glyph-100K, from `classes.tsv.xz`, and the faces that draw them, from `faces.tsv`.

`census` wrote both files. They are shipped, so that the classes are the same with every version of Python, Pillow and FreeType.
"""

import functools
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concentration.data.split_assignment import SplitName
from concentration.taxonomy import Taxonomy, TaxonomyClass

FACES_PATH = Path(__file__).with_name("faces.tsv")
CLASSES_PATH = Path(__file__).with_name("classes.tsv.xz")


@dataclass(frozen=True, slots=True)
class Face:
    """A line of `faces.tsv`: a font.

    Attributes:
        package, file: the package, and the file in it.
        index: which font of the file it is.
        typeface: its typeface; all faces of a typeface are in one split.
        split: the split that it draws.
    """

    package: str
    file: str
    index: int
    typeface: str
    split: SplitName


@dataclass(frozen=True, slots=True)
class Character:
    """A line of `classes.tsv.xz`: a leaf class.

    Attributes:
        codepoint: the Unicode code point.
        vertical: its vertical.
        group: the class between the leaf and its vertical: a radical, or a block of Unicode.
        name: the character's Unicode name.
        faces: the numbers of the faces that draw it, in the order in which they are used.
        others: the code points of characters that look the same and belong to this class, too.
    """

    codepoint: int
    vertical: str
    group: str
    name: str
    faces: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def class_id(self) -> str:
        return f"U+{self.codepoint:04X}"


@functools.cache
def load_faces() -> tuple[Face, ...]:
    """All faces; the number of a face is its place."""
    rows = [line.split("\t") for line in FACES_PATH.read_text(encoding="utf-8").splitlines()[1:]]
    return tuple(Face(package, file, int(index), typeface, split) for package, file, index, typeface, split in rows)


@functools.cache
def load_characters() -> tuple[Character, ...]:
    """All characters, in the order of the taxonomy: by vertical, then by group."""
    characters = []
    for line in lzma.decompress(CLASSES_PATH.read_bytes()).decode().splitlines()[1:]:
        codepoint, vertical, group, name, faces, others = line.split("\t")
        characters.append(
            Character(
                int(codepoint, 16),
                vertical,
                group,
                name,
                tuple(map(int, faces.split())),
                tuple(int(other, 16) for other in others.split()),
            )
        )
    return tuple(characters)


def count_typefaces(character: Character, split: SplitName) -> int:
    """How many typefaces of a split draw the character."""
    faces = load_faces()
    return len({faces[face].typeface for face in character.faces if faces[face].split == split})


def build_taxonomy(characters: Sequence[Character]) -> Taxonomy:
    """The taxonomy of these characters: each vertical is a root, groups are its children, and characters are theirs."""
    inner: dict[str, TaxonomyClass] = {}
    leaves = []
    for c in characters:
        group_id = f"{c.vertical}/{c.group}"
        inner.setdefault(c.vertical, TaxonomyClass(c.vertical, c.vertical.replace("_", " "), (), c.vertical))
        inner.setdefault(group_id, TaxonomyClass(group_id, c.group, (c.vertical,), c.vertical))
        leaves.append(TaxonomyClass(c.class_id, f"{chr(c.codepoint)} {c.name}", (group_id,), c.vertical))
    return Taxonomy([*inner.values(), *leaves], "data=glyphs_100k")
