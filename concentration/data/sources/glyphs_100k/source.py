"""`data=glyphs_100k` and its smaller tiers: a bitmap for every character and face, written into packs."""

import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import ImageFont
from pydantic import Field

from concentration.data.sources.glyphs_100k.classes import (
    Character,
    build_taxonomy,
    count_typefaces,
    load_characters,
    load_faces,
)
from concentration.data.sources.glyphs_100k.drawing import draw_bitmap, encode_bitmap, open_font
from concentration.data.sources.glyphs_100k.packages import fetch_packages, load_packages
from concentration.data.sources.source import Item
from concentration.data.split_assignment import SPLITS, SplitConfig
from concentration.data.views import ViewConfig
from concentration.errors import DataError
from concentration.schema import Config
from concentration.taxonomy import Taxonomy

#: The least number of characters of a vertical, even in the smallest tier.
_MIN_LEAVES = 2


class Glyphs100kConfig(Config):
    """Which characters, and how many drawings of each.

    path: the folder of the unpacked font packages; those that are missing are fetched from Debian.
    num_classes: the most characters that are kept, in proportion to the verticals; None keeps all.
    prefer: which characters of a vertical are kept: evenly `spread` ones, common and rare, or those that most training
        `typefaces` draw.
    max_drawings: the most training drawings of a character, each of another face, of as many typefaces as there are.
    image_size: the side of the networks' input in pixels; shards hold bitmaps of 48 pixels.
    view: the augmentation of training images.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path"})

    kind: Literal["glyphs_100k"] = "glyphs_100k"
    path: Path
    num_classes: int | None = Field(None, ge=40)
    prefer: Literal["spread", "typefaces"] = "spread"
    max_drawings: int = Field(24, ge=2)
    image_size: int = Field(48, ge=8, le=512)
    view: ViewConfig = ViewConfig()


class Glyphs100kSource:
    """Draws characters. A drawing depends on nothing but the character and the face."""

    #: Unused, since typefaces decide which split a drawing is in.
    split = SplitConfig()
    is_compact = True

    def __init__(self, config: Glyphs100kConfig):
        self._config = config
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fonts": {}}

    def build_taxonomy(self) -> Taxonomy:
        return build_taxonomy(self._select())

    def list_items(self) -> list[Item]:
        faces = load_faces()
        items = []
        for character in self._select():
            counts = dict.fromkeys(SPLITS, 0)
            for face in character.faces:
                split = faces[face].split
                counts[split] += 1
                if split != "train" or counts[split] <= self._config.max_drawings:
                    key = f"u{character.codepoint:04x}-f{face:03d}"
                    items.append(Item(key, (character.class_id,), (character.codepoint, face), split))
        return items

    def list_notes(self) -> list[str]:
        return []

    def fetch(self) -> None:
        """Fetches the font packages. Raises: DataError if one cannot be fetched."""
        packages = load_packages()
        names = dict.fromkeys(face.package for face in load_faces())
        fetch_packages([packages[name] for name in names], self._config.path)

    def read(self, item: Item) -> tuple[str, bytes]:
        """`"png"` and the character's bitmap, (48, 48), in 16 greys, light ink on dark paper.

        Raises:
            DataError: the font is not there, or draws nothing.
        """
        codepoint, number = item.locator
        if number not in self._fonts:
            self._fonts[number] = self._open(number)
        bitmap = draw_bitmap(self._fonts[number], codepoint)
        if bitmap is None:
            face = load_faces()[number]
            raise DataError(
                f"{face.package}/{face.file}: draws nothing for U+{codepoint:04X}; is Pillow's FreeType very old?"
            )
        return "png", encode_bitmap(bitmap)

    def _open(self, number: int) -> ImageFont.FreeTypeFont:
        face = load_faces()[number]
        path = load_packages()[face.package].folder(self._config.path) / face.file
        # NOTE: Pillow looks for a missing file of the same name among the system's fonts, which may be another version.
        if not path.is_file():
            raise DataError(f"{path}: no such file; run `concentrate prepare`, which fetches the fonts into data.path")
        return open_font(path, face.index)

    def _select(self) -> list[Character]:
        """The characters of the tier: of each vertical its share, in the order of the taxonomy."""
        characters, config = load_characters(), self._config
        if config.num_classes is None or config.num_classes >= len(characters):
            return list(characters)
        selected = []
        for _, members in itertools.groupby(characters, lambda c: c.vertical):
            members = list(members)
            share = max(_MIN_LEAVES, config.num_classes * len(members) // len(characters))
            if config.prefer == "spread":
                selected += [members[place * len(members) // share] for place in range(share)]
            else:
                most_drawn = sorted(range(len(members)), key=lambda n: (-count_typefaces(members[n], "train"), n))
                selected += [members[place] for place in sorted(most_drawn[:share])]
        return selected
