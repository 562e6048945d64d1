"""Decides which characters are classes of Glyph-100K and which faces draw them, and writes `faces.tsv` and `classes.tsv.xz`.

    python -m concentration.data.sources.glyphs_100k.census FOLDER

fetches the packages of `packages.tsv` into FOLDER, draws every character with every face (which takes minutes), and decides. If
it is stopped, the same command goes on. Nothing imports this module at run time, since the two files are shipped.
"""

import hashlib
import io
import itertools
import lzma
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concentration.data.sources.glyphs_100k.classes import CLASSES_PATH, FACES_PATH
from concentration.data.sources.glyphs_100k.drawing import draw_bitmap
from concentration.data.sources.glyphs_100k.font_files import FaceDrawings, FontFace, draw_face, list_faces
from concentration.data.sources.glyphs_100k.likeness import (
    drop_placeholders,
    groups_of_equal,
    merge_characters,
    merge_typefaces,
)
from concentration.data.sources.glyphs_100k.packages import fetch_packages, load_packages
from concentration.data.sources.glyphs_100k.unicode_tables import (
    NUM_RADICALS,
    VERTICALS,
    UnicodeCharacter,
    UnicodeTables,
)
from concentration.data.split_assignment import SPLITS, SplitName
from concentration.files import write_atomically
from concentration.progress import Progress

#: The typefaces of the test split.
TEST_TYPEFACES = ("TW-Kai", "Noto Sans", "Noto Sans CJK", "BabelStone Han", "Noto Music")
#: The typefaces of the val split, chosen so that almost no class is lost without them in training.
VAL_TYPEFACES = ("Noto Serif CJK", "DejaVu Sans", "DejaVu Serif", "Aboriginal Serif")

#: Only the Chinese characters of these typefaces are used. Their symbols and foreign letters are the same, and one typeface is
#: held out while the other is not.
CHINESE_ONLY = ("TW-Kai", "TW-Sung")

#: How many training typefaces a class needs; it also needs one of the test split.
MIN_TYPEFACES = 2
#: The most faces of each split that are listed for a class.
MAX_FACES: Mapping[SplitName, int] = {"train": 24, "val": 4, "test": 4}
#: The most faces of one typeface that are listed for a class: plain, bold, italic.
MAX_FACES_OF_TYPEFACE = 3

NUM_HAN_VERTICALS = 9


@dataclass(frozen=True)
class Found:
    """A class.

    Attributes:
        character: the character.
        faces: the numbers of the faces that draw it, in the order in which they are used.
        others: the code points of characters that look the same and belong to the class, too.
    """

    character: UnicodeCharacter
    faces: tuple[int, ...]
    others: tuple[int, ...]


def take_census(folder: Path) -> None:
    """Fetches the packages, draws all characters, decides, and writes both files."""
    packages = load_packages()
    fetch_packages(list(packages.values()), folder)
    characters = {c.codepoint: c for c in UnicodeTables(packages["unicode-data"].folder(folder)).list_characters()}
    faces = list_faces([package for name, package in packages.items() if name != "unicode-data"], folder)
    drawings = [drop_placeholders(d) for d in _draw_all(faces, characters, folder)]
    chinese = [codepoint for codepoint, character in characters.items() if character.radical]
    drawings = [
        d.restrict(chinese) if face.typeface in CHINESE_ONLY else d for face, d in zip(faces, drawings, strict=True)
    ]
    name_of = merge_typefaces([face.typeface for face in faces], drawings)
    split_of = assign_typefaces(name_of)
    typefaces = [name_of[face.typeface] for face in faces]
    found = find_classes(characters, drawings, typefaces, split_of)
    write_census(found, faces, typefaces, split_of)


def assign_typefaces(name_of: Mapping[str, str]) -> dict[str, SplitName]:
    """The split of every typeface; one that was merged with a held-out typeface is held out, too."""
    split_of: dict[str, SplitName] = dict.fromkeys(name_of.values(), "train")
    for split, names in (("val", VAL_TYPEFACES), ("test", TEST_TYPEFACES)):
        for name in names:
            split_of[name_of[name]] = split
    return split_of


def find_classes(
    characters: Mapping[int, UnicodeCharacter],
    drawings: Sequence[FaceDrawings],
    typefaces: Sequence[str],
    split_of: Mapping[str, SplitName],
) -> list[Found]:
    """The classes, by code point: characters that enough typefaces draw, with look-alikes merged.

    Args:
        characters: all characters that may be classes, by code point.
        drawings: the drawings of each face, without placeholders.
        typefaces: the typeface of each face, after merging.
        split_of: the split of each typeface.
    """
    # The symbol of a radical looks like the character that it is made from, and is merged into that.
    rank = {codepoint: (0x2E80 <= codepoint < 0x2FE0, codepoint) for codepoint in characters}
    stands_for = merge_characters(drawings, rank)
    others: dict[int, list[int]] = {}
    for codepoint, kept in stands_for.items():
        if kept != codepoint:
            others.setdefault(kept, []).append(codepoint)
    found = []
    for codepoint, taken in _faces_by_character(drawings, typefaces, split_of, stands_for):
        counts = Counter(split_of[name] for name in {typefaces[face] for face in taken})
        if counts["train"] >= MIN_TYPEFACES and counts["test"]:
            found.append(Found(characters[codepoint], taken, tuple(sorted(others.get(codepoint, ())))))
    return found


def _faces_by_character(
    drawings: Sequence[FaceDrawings],
    typefaces: Sequence[str],
    split_of: Mapping[str, SplitName],
    stands_for: Mapping[int, int],
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields each character that is not merged into another, with the faces whose drawing of it is used.

    A drawing is not used if the face draws another character the same, or an earlier face draws this one the same.
    """
    drawn: dict[int, dict[int, int]] = {codepoint: {} for codepoint, kept in stands_for.items() if kept == codepoint}
    held_out_first = sorted(range(len(drawings)), key=lambda n: (SPLITS[::-1].index(split_of[typefaces[n]]), n))
    for face in held_out_first:
        # If one face draws two classes alike (but not most faces do), the first class keeps the drawing.
        shared = {
            codepoint
            for group in groups_of_equal(drawings[face])
            for codepoint in [c for c in group if stands_for[c] == c][1:]
        }
        for codepoint, digest in zip(drawings[face].codepoint.tolist(), drawings[face].digest.tolist(), strict=True):
            if codepoint in drawn and codepoint not in shared:
                # A later face with the same pixels, which may be of another split, is left out.
                drawn[codepoint].setdefault(digest, face)
    for codepoint, face_of in drawn.items():
        yield codepoint, _choose(sorted(face_of.values()), typefaces, split_of)


def _choose(faces: Sequence[int], typefaces: Sequence[str], split_of: Mapping[str, SplitName]) -> tuple[int, ...]:
    """Chooses at most `MAX_FACES` of each split: the first face of every typeface, then the second of each, and so on."""
    turns: list[tuple[int, int]] = []
    num_of_typeface: Counter[str] = Counter()
    for face in faces:
        turns.append((num_of_typeface[typefaces[face]], face))
        num_of_typeface[typefaces[face]] += 1
    chosen, num_of_split = [], Counter()
    for turn, face in sorted(turns):
        split = split_of[typefaces[face]]
        if turn < MAX_FACES_OF_TYPEFACE and num_of_split[split] < MAX_FACES[split]:
            chosen.append(face)
            num_of_split[split] += 1
    return tuple(chosen)


def cut_radicals(sizes: Sequence[int], num_parts: int) -> list[int]:
    """Divides the radicals into contiguous parts of which the largest is as small as possible.

    Args:
        sizes: the number of characters of each radical, from radical 1 on.
        num_parts: the number of parts.

    Returns:
        The first radical of each part, and the one after the last radical.
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(sizes, middle)) <= num_parts else (middle + 1, high)
    return [*_fill(sizes, low), len(sizes) + 1]


def _fill(sizes: Sequence[int], limit: int) -> list[int]:
    """The first radical of each part, if parts are filled in order up to `limit` characters."""
    starts, total = [1], 0
    for radical, size in enumerate(sizes, 1):
        if total + size > limit:
            starts.append(radical)
            total = 0
        total += size
    return starts


def _draw_all(faces: Sequence[FontFace], characters: Mapping[int, object], folder: Path) -> Iterator[FaceDrawings]:
    """Yields the drawings of each face. They are computed once, and kept in `FOLDER/drawings`."""
    packages, candidates = load_packages(), frozenset(characters)
    rules = hashlib.sha256(Path(sys.modules[draw_bitmap.__module__].__file__).read_bytes()).hexdigest()[:8]
    with Progress("draw", len(faces), "faces") as progress:
        for face in faces:
            name = hashlib.sha256(f"{face.package} {face.file} {face.index} {rules}".encode()).hexdigest()[:24]
            kept = folder / "drawings" / f"{name}.npz"
            if not kept.exists():
                drawn = draw_face(face, packages[face.package].folder(folder) / face.file, candidates)
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **vars(drawn))
                write_atomically(kept, buffer.getvalue())
            with np.load(kept) as arrays:
                yield FaceDrawings(**arrays)
            progress.advance()


def write_census(
    found: Sequence[Found], faces: Sequence[FontFace], typefaces: Sequence[str], split_of: Mapping[str, SplitName]
) -> None:
    """Writes both files: the faces that draw a class, numbered anew, and the classes by vertical, group and code point."""
    used = sorted({face for f in found for face in f.faces})
    number_of = {face: number for number, face in enumerate(used)}
    rows = [(faces[n].package, faces[n].file, str(faces[n].index), typefaces[n], split_of[typefaces[n]]) for n in used]
    lines = ["# package\tfile\tindex\ttypeface\tsplit", *("\t".join(row) for row in rows)]
    write_atomically(FACES_PATH, "\n".join(lines) + "\n")
    sizes = Counter(f.character.radical for f in found)
    starts = cut_radicals([sizes[radical] for radical in range(1, NUM_RADICALS + 1)], NUM_HAN_VERTICALS)
    order = [f"han_{first:03d}_{last - 1:03d}" for first, last in itertools.pairwise(starts)] + list(VERTICALS)

    def vertical_of(c: UnicodeCharacter) -> str:
        return order[sum(first <= c.radical for first in starts) - 1] if c.radical else c.vertical

    def sort_key(f: Found) -> tuple:
        return order.index(vertical_of(f.character)), f.character.radical, f.character.group, f.character.codepoint

    lines = ["# code point\tvertical\tgroup\tname\tfaces\tlook-alikes"]
    for f in sorted(found, key=sort_key):
        c = f.character
        numbers, others = (number_of[face] for face in f.faces), (f"{other:04X}" for other in f.others)
        lines.append(
            "\t".join(
                [f"{c.codepoint:04X}", vertical_of(c), c.group, c.name, " ".join(map(str, numbers)), " ".join(others)]
            )
        )
    write_atomically(CLASSES_PATH, lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    take_census(Path(sys.argv[1]))
