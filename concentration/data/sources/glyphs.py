"""`data=glyphs`: Unicode characters drawn by the fonts that come with matplotlib. A class is a character.

Splits are by face: `train` is DejaVu without its bold obliques, `val` is those, `test` is STIXGeneral, a typeface that
training never saw. `glyphs.tsv`, written by `glyph_selection`, lists the characters, their inner classes and faces.
"""

import functools
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from pydantic import Field

from concentration.data.sources.source import Item, LocalSource
from concentration.data.split_assignment import SPLITS, SplitConfig, SplitName
from concentration.data.views import ViewConfig
from concentration.errors import ConfigError, DataError
from concentration.schema import Config, suggest
from concentration.taxonomy import Taxonomy, TaxonomyClass

SELECTION_PATH = Path(__file__).with_name("glyphs.tsv")


@dataclass(frozen=True, slots=True)
class Face:
    """A font file of matplotlib's wheel and the one split that it draws."""

    file: str
    split: SplitName


#: The number of a face is part of keys and of `glyphs.tsv`: append only.
FACES = (
    Face("DejaVuSans.ttf", "train"),
    Face("DejaVuSans-Bold.ttf", "train"),
    Face("DejaVuSans-Oblique.ttf", "train"),
    Face("DejaVuSansMono.ttf", "train"),
    Face("DejaVuSansMono-Bold.ttf", "train"),
    Face("DejaVuSansMono-Oblique.ttf", "train"),
    Face("DejaVuSerif.ttf", "train"),
    Face("DejaVuSerif-Bold.ttf", "train"),
    Face("DejaVuSerif-Italic.ttf", "train"),
    Face("DejaVuSans-BoldOblique.ttf", "val"),
    Face("DejaVuSansMono-BoldOblique.ttf", "val"),
    Face("DejaVuSerif-BoldItalic.ttf", "val"),
    Face("STIXGeneral.ttf", "test"),
    Face("STIXGeneralItalic.ttf", "test"),
    Face("STIXGeneralBol.ttf", "test"),
    Face("STIXGeneralBolIta.ttf", "test"),
)

# Place in the em square, in shares of its side: DejaVu rises 0.93 em over the baseline and falls 0.24 em below it.
_EM = 0.76
_BASELINE = 0.77

#: How far the augmentation of a split goes, as a share of the ranges in `_draw_augmentation`.
_STRENGTH = {"train": 1.0, "val": 0.3, "test": 0.3}


class GlyphsConfig(Config):
    """Which characters are drawn, how often and how large.

    verticals: the verticals that are kept, in the order of the taxonomy whatever the order here; null keeps all.
    num_classes: the most leaves that are kept, spread over the verticals in proportion; null keeps all.
    num_drawings: training drawings of each leaf, spread over its training faces.
    num_coarse_drawings: further training drawings of each leaf, which are labelled only with its parents.
    num_val_drawings, num_test_drawings: drawings of each leaf by each held-out face.
    image_size: the side of the square image, in pixels.
    seed: the seed of everything random in the drawings.
    view: augmentation in training on top of the drawings' own.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"num_coarse_drawings"})

    kind: Literal["glyphs"] = "glyphs"
    verticals: tuple[str, ...] | None = None
    num_classes: int | None = Field(None, ge=2)
    num_drawings: int = Field(100, ge=1)
    num_coarse_drawings: int = Field(0, ge=0)
    num_val_drawings: int = Field(2, ge=1)
    num_test_drawings: int = Field(3, ge=1)
    image_size: int = Field(32, ge=8, le=512)
    seed: int = Field(0, ge=0)
    view: ViewConfig = ViewConfig()


@dataclass(frozen=True, slots=True)
class Character:
    """A leaf class: one line of `glyphs.tsv`."""

    codepoint: int
    vertical: str
    groups: tuple[str, ...]
    faces: tuple[int, ...]
    name: str

    @property
    def class_id(self) -> str:
        return f"U+{self.codepoint:04X}"


class GlyphSource(LocalSource):
    """Draws characters. A drawing depends on nothing but the seed, the character, the face and its number.

    Raises:
        ConfigError: an unknown or repeated vertical, or fewer than two classes for each.
    """

    #: Unused, since typefaces decide which split a drawing is in.
    split = SplitConfig()

    def __init__(self, config: GlyphsConfig):
        self._config = config
        self.characters = _select(load_characters(), config)
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}
        self._masters: dict[tuple[int, int], Image.Image] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Fonts cannot be pickled, and workers draw faster than they would receive the masters.
        return self.__dict__ | {"_fonts": {}, "_masters": {}}

    def build_taxonomy(self) -> Taxonomy:
        """Verticals as roots, groups (case, block, base letter, ...) below them, characters as leaves."""
        classes: list[TaxonomyClass] = []
        for vertical in dict.fromkeys(c.vertical for c in self.characters):
            classes.extend(_build_vertical(vertical, [c for c in self.characters if c.vertical == vertical]))
        return Taxonomy(classes, "data=glyphs")

    def list_items(self) -> list[Item]:
        return [item for split in SPLITS for item in self._list_split(split)]

    def list_notes(self) -> list[str]:
        return []

    def read(self, item: Item) -> tuple[str, bytes]:
        """`"png"` and a grey image, (image_size, image_size), light ink on dark paper.

        Raises:
            DataError: matplotlib's font file is not there.
        """
        return "png", encode_png(self.draw(*item.locator))

    def draw(self, codepoint: int, face: int, drawing: int) -> Image.Image:
        """A grey image, (image_size, image_size). Raises: as `read`."""
        size = self._config.image_size
        identity = f"{self._config.seed} {codepoint} {face} {drawing}".encode()
        # The first bytes choose the augmentation, the rest is the noise, a byte per pixel.
        random_bytes = hashlib.shake_128(identity).digest(_NUM_CHOICES + size * size)
        choices = _draw_augmentation(random_bytes[:_NUM_CHOICES], _STRENGTH[FACES[face].split])
        image = self._load_master(codepoint, face)
        image = image.transform((size, size), Image.Transform.AFFINE, choices.matrix(size), Image.Resampling.BILINEAR)
        image = image.point(_build_tone(choices.threshold, choices.gain, choices.ink, choices.paper))
        noise = Image.frombytes("L", (size, size), random_bytes[_NUM_CHOICES:]).point(_build_noise_scale(choices.noise))
        return ImageChops.add(image, noise, offset=-(choices.noise // 2))

    def _list_split(self, split: SplitName) -> list[Item]:
        """The drawings of a split, round by round over all classes, so that every shard holds many classes."""
        items = []
        has_coarse = split == "train" and self._config.num_coarse_drawings > 0
        parents = {c.id: c.parents for c in self.build_taxonomy().classes} if has_coarse else {}
        faces_of = {c: [face for face in c.faces if FACES[face].split == split] for c in self.characters}
        for drawing in range(self._count_drawings(split, max(map(len, faces_of.values())))):
            for character, faces in faces_of.items():
                if drawing < self._count_drawings(split, len(faces)):
                    face, codepoint = faces[drawing % len(faces)], character.codepoint
                    key = f"u{codepoint:04x}-f{face:02d}-{drawing:03d}"
                    is_coarse = has_coarse and drawing >= self._config.num_drawings
                    labels = parents[character.class_id] if is_coarse else (character.class_id,)
                    items.append(Item(key, labels, (codepoint, face, drawing), split))
        return items

    def _count_drawings(self, split: SplitName, num_faces: int) -> int:
        if split == "train":
            return self._config.num_drawings + self._config.num_coarse_drawings
        per_face = self._config.num_val_drawings if split == "val" else self._config.num_test_drawings
        return per_face * num_faces

    def _load_master(self, codepoint: int, face: int) -> Image.Image:
        """The character at twice the image's size, softened so that a threshold makes its strokes bolder or lighter."""
        if (codepoint, face) not in self._masters:
            size = 2 * self._config.image_size
            if face not in self._fonts:
                self._fonts[face] = load_font(face, size)
            master = draw_master(self._fonts[face], codepoint, size)
            self._masters[codepoint, face] = master.filter(ImageFilter.GaussianBlur(size / 64))
        return self._masters[codepoint, face]


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG, encoded fast rather than small, since there are many drawings."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


@functools.cache
def load_characters() -> tuple[Character, ...]:
    """All characters of `glyphs.tsv`, by vertical, in the order of the taxonomy."""
    characters = []
    for line in SELECTION_PATH.read_text(encoding="utf-8").splitlines()[1:]:
        codepoint, vertical, groups, faces, name = line.split("\t")
        numbers = tuple(int(face) for face in faces.split(","))
        characters.append(
            Character(int(codepoint, 16), vertical, tuple(filter(None, groups.split(","))), numbers, name)
        )
    return tuple(characters)


def face_path(face: int) -> Path:
    """Where matplotlib keeps the font file of a face."""
    import matplotlib  # here, because it takes long and only workers that draw need it

    return Path(matplotlib.get_data_path(), "fonts", "ttf", FACES[face].file)


def load_font(face: int, size: int) -> ImageFont.FreeTypeFont:
    """The font at the size at which its em square fits an image of side `size`, in pixels.

    Raises:
        DataError: matplotlib came without the file.
    """
    path = face_path(face)
    # NOTE: Pillow looks for a missing file of the same name among the system's fonts, which may be another version.
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; data=glyphs needs the fonts of matplotlib's wheel: pip install matplotlib"
        )
    return ImageFont.truetype(str(path), round(_EM * size), layout_engine=ImageFont.Layout.BASIC)


def draw_master(font: ImageFont.FreeTypeFont, codepoint: int, size: int, margin: int = 0) -> Image.Image:
    """The character on its em square, (size, size), with `margin` pixels around it.

    Every character stands on the same baseline, its advance centred, so that a comma stays small and low.
    """
    image = Image.new("L", (size + 2 * margin, size + 2 * margin))
    left = margin + (size - font.getlength(chr(codepoint))) / 2
    position = (left, margin + round(_BASELINE * size))
    ImageDraw.Draw(image).text(position, chr(codepoint), fill=255, font=font, anchor="ls")
    return image


def _select(characters: tuple[Character, ...], config: GlyphsConfig) -> tuple[Character, ...]:
    """The characters of the wanted verticals, at most `num_classes`, spread evenly over each vertical."""
    valid = tuple(dict.fromkeys(c.vertical for c in characters))
    wanted = valid if config.verticals is None else config.verticals
    for name in wanted:
        if name not in valid:
            raise ConfigError(f"data.verticals: no vertical '{name}' in glyphs{suggest(name, valid)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError(f"data.verticals={list(wanted)}: expected each once, and at least one of {', '.join(valid)}")
    pools = [[c for c in characters if c.vertical == name] for name in valid if name in wanted]
    total = sum(map(len, pools))
    budget = total if config.num_classes is None else min(config.num_classes, total)
    if budget < 2 * len(pools):
        raise ConfigError(
            f"data.num_classes={budget}: {len(pools)} verticals need at least {2 * len(pools)}; "
            "raise it or name fewer data.verticals"
        )
    shares = _split_budget(budget, [len(pool) for pool in pools])
    return tuple(pool[i * len(pool) // n] for pool, n in zip(pools, shares, strict=True) for i in range(n))


def _split_budget(budget: int, sizes: list[int]) -> list[int]:
    """`budget` as whole numbers in proportion to `sizes`, each at least 2 and at most its size."""
    shares = [2] * len(sizes)
    for _ in range(budget - sum(shares)):
        open_places = [n for n in range(len(sizes)) if shares[n] < sizes[n]]
        shares[min(open_places, key=lambda n: (shares[n] / sizes[n], n))] += 1
    return shares


def _build_vertical(vertical: str, characters: list[Character]) -> list[TaxonomyClass]:
    """The root, the groups that hold at least two of the characters, and the characters."""
    title = vertical.replace("_", " ")
    members: dict[str, int] = {}
    for character in characters:
        for group in character.groups:
            members[group] = members.get(group, 0) + 1
    # A group with one member says nothing that the member does not; a capped vertical has such groups.
    kept = {group for group, count in members.items() if count >= 2}

    def parent_of(group: str) -> str:
        above = group.rpartition("/")[0]
        return f"{vertical}/{above}" if above in kept else vertical

    classes = [TaxonomyClass(vertical, title, (), vertical)]
    for group in sorted(kept):
        name = f"{title} {group.replace('/', ' ')}"
        classes.append(TaxonomyClass(f"{vertical}/{group}", name, (parent_of(group),), vertical))
    for c in characters:
        parents = tuple(f"{vertical}/{group}" for group in c.groups if group in kept) or (vertical,)
        classes.append(TaxonomyClass(c.class_id, f"{chr(c.codepoint)} {c.name}", parents, vertical))
    return classes


_NUM_CHOICES = 11


@dataclass(frozen=True, slots=True)
class _Augmentation:
    """How one drawing differs from its master. Grey values are 0 to 255, places are shares of the image's side."""

    degrees: float
    scale_x: float
    scale_y: float
    shear: float
    shift_x: float
    shift_y: float
    threshold: int
    gain: int
    ink: int
    paper: int
    noise: int

    def matrix(self, size: int) -> tuple[float, ...]:
        """From a pixel of the image to a pixel of the master, which is twice as large; the centre is the fixed point."""
        cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        a, b = 2 * (cosine + self.shear * sine) / self.scale_x, 2 * (-sine + self.shear * cosine) / self.scale_x
        c, d = 2 * sine / self.scale_y, 2 * cosine / self.scale_y
        x, y = size * (0.5 + self.shift_x), size * (0.5 + self.shift_y)
        return a, b, size - a * x - b * y, c, d, size - c * x - d * y


def _draw_augmentation(random_bytes: bytes, strength: float) -> _Augmentation:
    """Spreads each byte over the range of one choice; `strength` narrows the range around its middle."""
    u = [0.5 + strength * (byte / 255 - 0.5) for byte in random_bytes]
    return _Augmentation(
        degrees=-10 + 20 * u[0],
        scale_x=0.80 + 0.35 * u[1],
        scale_y=0.85 + 0.30 * u[2],
        shear=-0.2 + 0.4 * u[3],
        shift_x=-0.07 + 0.14 * u[4],
        shift_y=-0.07 + 0.14 * u[5],
        # Rounded, so that the tables below are few and come from their caches.
        threshold=16 * round(3 + 5 * u[6]),
        gain=round(2 + 3 * u[7]),
        ink=16 * round(10 + 5 * u[8]),
        paper=8 * round(6 * u[9]),
        noise=4 * round(12 * u[10]),
    )


@functools.cache
def _build_tone(threshold: int, gain: int, ink: int, paper: int) -> list[int]:
    """The grey value of each of 256 amounts of ink: a ramp around `threshold`, the steeper the sharper the edge."""
    shares = (0.5 + gain * (np.arange(256) - threshold) / 255).clip(0, 1)
    return np.round(paper + (ink - paper) * (shares - shares[0]) / (1 - shares[0])).astype(int).tolist()


@functools.cache
def _build_noise_scale(noise: int) -> list[int]:
    """From a random byte to a grey value between 0 and `noise`."""
    return [round(noise * value / 255) for value in range(256)]
