"""Writes docs/glyphs_100k.md: the datasheet's tables, from the shipped lists. python docs/glyphs_100k.py [FONTS]

With FONTS, the folder of the unpacked font packages, it also draws the pictures.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from concentration.config import find_config_directory
from concentration.data.distortions import Distortion, distort, draw_distortions
from concentration.data.sources.glyphs_100k.classes import Character, count_typefaces, load_characters, load_faces
from concentration.data.sources.glyphs_100k.packages import load_packages
from concentration.data.sources.glyphs_100k.source import Glyphs100kConfig, Glyphs100kSource
from concentration.data.split_assignment import SPLITS
from concentration.schema import parse_config

PAGE = Path(__file__).with_name("glyphs_100k.md")
TIERS = ("glyphs_100k", "glyphs_30k", "glyphs_5k")
BEGIN, END = "<!-- tables: python docs/glyphs_100k.py -->\n", "<!-- end of the tables -->\n"


def load_tier(name: str, path: str = "fonts") -> Glyphs100kConfig:
    import yaml

    content = yaml.safe_load((find_config_directory() / "data" / f"{name}.yaml").read_text())
    return parse_config(Glyphs100kConfig, content | {"path": path})


def write_tables() -> str:
    return "\n".join(
        [_write_verticals(), _write_tiers(), _write_typefaces_per_class(), _write_typefaces(), _write_packages()]
    )


def write_page() -> str:
    """The page with its tables written anew; the words around them stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + write_tables() + END + rest.partition(END)[2]


def _write_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += [
        "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _count_drawings(characters: Iterable[Character]) -> list[int]:
    faces = load_faces()
    counts = Counter(faces[face].split for c in characters for face in c.faces)
    return [counts[split] for split in SPLITS]


def _write_verticals() -> str:
    rows = []
    for vertical, members in itertools.groupby(load_characters(), lambda c: c.vertical):
        members = list(members)
        num_typefaces = [count_typefaces(c, "train") for c in members]
        has_val = sum(count_typefaces(c, "val") > 0 for c in members)
        row = [vertical, len(members), len({c.group for c in members}), *_count_drawings(members)]
        rows.append([*row, f"{np.median(num_typefaces):g}", has_val])
    totals = [sum(column) for column in zip(*(row[1:6] for row in rows), strict=True)]
    rows.append(
        [
            "all",
            *totals,
            f"{np.median([count_typefaces(c, 'train') for c in load_characters()]):g}",
            sum(row[-1] for row in rows),
        ]
    )
    titles = [
        "vertical",
        "characters",
        "groups",
        "train drawings",
        "val",
        "test",
        "median training typefaces",
        "with val",
    ]
    return "### Verticals\n\n" + _write_table(titles, rows)


def _write_tiers() -> str:
    rows = []
    for name in TIERS:
        source = Glyphs100kSource(load_tier(name))
        items, taxonomy = source.list_items(), source.build_taxonomy()
        counts = Counter(item.split for item in items)
        sizes = [int(taxonomy.is_leaf[taxonomy.vertical_slice(v)].sum()) for v in taxonomy.verticals]
        per_class = counts["train"] / sum(sizes)
        rows.append(
            [
                f"`data={name}`",
                sum(sizes),
                taxonomy.num_classes,
                f"{max(sizes):,} to {min(sizes):,}",
                *(counts[s] for s in SPLITS),
                f"{per_class:.1f}",
            ]
        )
    titles = [
        "tier",
        "characters",
        "classes",
        "characters of a vertical",
        "train drawings",
        "val",
        "test",
        "train drawings a character",
    ]
    return "### Tiers\n\n" + _write_table(titles, rows)


def _write_typefaces_per_class() -> str:
    counts = Counter(count_typefaces(c, "train") for c in load_characters())
    bins = [(2, 2), (3, 3), (4, 4), (5, 7), (8, 11), (12, 15), (16, 99)]
    rows = [
        [f"{a}" if a == b else f"{a} to {b}" if b < 99 else f"{a} or more", sum(counts[n] for n in range(a, b + 1))]
        for a, b in bins
    ]
    return "### Training typefaces of a character\n\n" + _write_table(["typefaces", "characters"], rows)


def _write_typefaces() -> str:
    faces = load_faces()
    typefaces = {face.typeface: face.split for face in faces}
    lines = []
    for split in SPLITS:
        names = sorted(name for name, s in typefaces.items() if s == split)
        num_faces = sum(face.split == split for face in faces)
        listed = "; ".join(names)
        lines.append(f"- {split}: {len(names)} typefaces, {num_faces} faces: {listed}.")
    return "### Typefaces\n\n" + "\n".join(lines) + "\n"


def _write_packages() -> str:
    packages = load_packages().values()
    used = Counter(face.package for face in load_faces())
    rows = [[p.name, p.version, f"{p.size_bytes / 1e6:.1f}", used[p.name], p.licence] for p in packages]
    total = sum(p.size_bytes for p in packages) / 1e6
    text = f"### Packages: {len(packages)}, {total:.0f} MB\n\n"
    return text + _write_table(["package", "version", "MB", "faces", "licence of its files"], rows)


def draw_pictures(fonts: str) -> None:
    """Two pictures: each vertical's characters in training and test typefaces, and one drawing in many views."""
    source = Glyphs100kSource(load_tier("glyphs_100k", fonts))
    items: dict[str, list] = {}
    for item in source.list_items():
        items.setdefault(item.labels[0], []).append(item)
    rows = []
    for _, members in itertools.groupby(load_characters(), lambda c: c.vertical):
        members = list(members)
        row = []
        for character in members[len(members) // 8 :: len(members) // 4][:4]:
            drawn = items[character.class_id]
            training, test = ([item for item in drawn if item.split == split] for split in ("train", "test"))
            blank = [np.zeros((48, 48), np.uint8)] * max(0, 3 - len(training))
            row += [*(_read(source, item) for item in training[:3]), *blank, _read(source, test[0])]
            row.append(np.full((48, 4), 96, np.uint8))
        rows.append(np.concatenate(row, axis=1))
    Image.fromarray(np.concatenate(rows)).save(PAGE.with_suffix(".png"))
    view = load_tier("glyphs_100k").view
    drawn = draw_distortions(view.distortion, 0, 0, np.arange(64))
    chosen = [next(iter(items[f"U+{ord(letter):04X}"])) for letter in "永한Ωष⇒龍あÆ"]
    pictures = [
        [
            np.asarray(distort(Image.fromarray(_read(source, item)), Distortion.decode(drawn.at(8 * row + n).encode())))
            for n in range(8)
        ]
        for row, item in enumerate(chosen)
    ]
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in pictures])).save(
        PAGE.with_name("glyphs_100k_views.png")
    )


def _read(source: Glyphs100kSource, item) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(source.read(item)[1])))


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
    if len(sys.argv) > 1:
        draw_pictures(sys.argv[1])
