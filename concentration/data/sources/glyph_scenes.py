"""`data=glyph_scenes`: images of several characters, each labelled with all of them, as photographs are with hashtags.

Every image has a *topic*, which makes some characters of any verticals more likely, so that these occur together. The popularity
of characters follows Zipf's law: a few are frequent and most are rare. Splits are by typeface, as in `glyphs`.

Shapes: N images of a split, T topics, L leaves (characters), K places (or candidates for the characters) of an image.
"""

from typing import Literal

import numpy as np
import pydantic
from PIL import Image, ImageChops
from pydantic import Field

from concentration.data.order import permutation, uniforms
from concentration.data.sources.glyphs import FACES, GlyphsConfig, GlyphSource, encode_png
from concentration.data.sources.source import Item, LocalSource
from concentration.data.split_assignment import SPLITS, SplitConfig, SplitName
from concentration.data.views import ViewConfig
from concentration.schema import Config
from concentration.taxonomy import Taxonomy

#: How many topics prefer a character.
_HOMES = 2
#: How many candidates are drawn for each character of an image, since those that come twice are dropped.
_CANDIDATES_PER_PLACE = 4
#: How far a character may lie from the middle of its cell, as a share of the cell's side.
_JITTER = 0.2
#: The number of the random stream of each purpose.
_POPULARITY, _HOME, _TOPIC, _COUNT, _CHARACTER, _CELL, _FACE, _SHIFT = range(20, 28)


class GlyphScenesConfig(Config):
    """Which characters are drawn, how many on an image, and how they come together.

    verticals, num_classes: which characters, as in `glyphs`.
    num_images, num_val_images, num_test_images: how many images each split has.
    min_characters, max_characters: the number of characters of an image is drawn uniformly from this range.
    num_topics: how many topics there are; every image has one.
    affinity: how many times as likely a topic makes its own characters as they would be without topics; 1 is without topics.
    tail: the n-th most popular character is n ** -tail times as likely as the first; 0 makes all equally likely.
    image_size: the side of the square image, in pixels.
    cells: the image is divided into cells x cells squares, and each character is drawn into one of them.
    seed: the seed of everything random in the images.
    view: augmentation in training on top of the drawings' own.
    """

    kind: Literal["glyph_scenes"] = "glyph_scenes"
    verticals: tuple[str, ...] | None = None
    num_classes: int | None = Field(None, ge=2)
    num_images: pydantic.PositiveInt = 40_000
    num_val_images: pydantic.PositiveInt = 2_000
    num_test_images: pydantic.PositiveInt = 6_000
    min_characters: pydantic.PositiveInt = 1
    max_characters: pydantic.PositiveInt = 4
    num_topics: pydantic.PositiveInt = 24
    affinity: float = Field(30.0, ge=1)
    tail: float = Field(1.0, ge=0, le=3)
    image_size: int = Field(48, ge=16, le=512)
    cells: int = Field(2, ge=1, le=8)
    seed: int = Field(0, ge=0)
    view: ViewConfig = ViewConfig()

    @pydantic.model_validator(mode="after")
    def _check_sizes(self):
        if self.image_size < 8 * self.cells:
            raise ValueError(
                f"data.image_size={self.image_size} with data.cells={self.cells}: a cell has under 8 pixels; "
                f"give data.image_size={8 * self.cells} at least, or fewer cells"
            )
        if not self.min_characters <= self.max_characters <= self.cells**2:
            raise ValueError(
                f"data.min_characters={self.min_characters} and data.max_characters={self.max_characters}: expected the "
                f"first to be at most the second, and that at most the {self.cells**2} places of data.cells={self.cells}"
            )
        return self


class GlyphScenesSource(LocalSource):
    """Draws images of several characters. An image depends on nothing but the configuration and its number.

    Raises:
        ConfigError: as `GlyphSource`.
    """

    #: Unused, since typefaces decide which split a drawing is in.
    split = SplitConfig()

    def __init__(self, config: GlyphScenesConfig):
        self._config = config
        self._cell_size = config.image_size // config.cells
        self._glyphs = GlyphSource(
            GlyphsConfig(
                verticals=config.verticals,
                num_classes=config.num_classes,
                image_size=self._cell_size,
                seed=config.seed,
            )
        )

    def build_taxonomy(self) -> Taxonomy:
        """The taxonomy of `glyphs`."""
        return self._glyphs.build_taxonomy()

    def list_items(self) -> list[Item]:
        return [item for split in SPLITS for item in self._list_split(split)]

    def list_notes(self) -> list[str]:
        return []

    def read(self, item: Item) -> tuple[str, bytes]:
        """`"png"` and a grey image, (image_size, image_size). Raises: as `GlyphSource.read`."""
        number, placed = item.locator
        scene = Image.new("L", (self._config.image_size, self._config.image_size))
        for left, top, codepoint, face in placed:
            drawing = self._glyphs.draw(codepoint, face, number)
            below = scene.crop((left, top, left + self._cell_size, top + self._cell_size))
            scene.paste(ImageChops.lighter(below, drawing), (left, top))
        return "png", encode_png(scene)

    def topic_probabilities(self) -> np.ndarray:
        """(T, L) float64: the probability of each of `GlyphSource.characters` in each topic."""
        config, num_leaves = self._config, len(self._glyphs.characters)
        rank_L = permutation(num_leaves, config.seed, _POPULARITY)
        popularity_L = (1.0 + rank_L) ** -config.tail
        home_LH = uniforms(config.seed, _HOME, np.arange(num_leaves)[:, None], np.arange(_HOMES))
        is_home_TL = np.zeros((config.num_topics, num_leaves), dtype=bool)
        is_home_TL[(home_LH * config.num_topics).astype(int).T, np.arange(num_leaves)] = True
        weight_TL = popularity_L * np.where(is_home_TL, config.affinity, 1.0)
        return weight_TL / weight_TL.sum(axis=1, keepdims=True)

    def draw_topics(self, split: SplitName) -> np.ndarray:
        """(N,) int64: the topic of every image of a split. It is not written to the shards, but experiments need it."""
        config, number = self._config, SPLITS.index(split)
        drawn_N = uniforms(config.seed, _TOPIC, number, np.arange(self._count_images(split)))
        return (drawn_N * config.num_topics).astype(int)

    def _list_split(self, split: SplitName) -> list[Item]:
        config, stream, numbers_N1 = self._config, SPLITS.index(split), np.arange(self._count_images(split))[:, None]
        spread = config.max_characters - config.min_characters + 1
        count_N = config.min_characters + (uniforms(config.seed, _COUNT, stream, numbers_N1[:, 0]) * spread).astype(int)
        cells_NK = uniforms(config.seed, _CELL, stream, numbers_N1, np.arange(config.cells**2)).argsort(axis=1)
        places = np.arange(config.max_characters)
        chance_NK = uniforms(config.seed, _FACE, stream, numbers_N1, places)
        shift_NK2 = uniforms(config.seed, _SHIFT, stream, numbers_N1[:, :, None], places[:, None], np.arange(2)) * 2 - 1
        corner_NK2 = self._find_corners(cells_NK[:, places], shift_NK2)
        items = []
        for number, candidates in enumerate(self._draw_candidates(split).tolist()):
            chosen = [self._glyphs.characters[leaf] for leaf in dict.fromkeys(candidates)][: count_N[number]]
            drawn = []
            for place, character in enumerate(chosen):
                faces = [face for face in character.faces if FACES[face].split == split]
                face = faces[int(chance_NK[number, place] * len(faces))]
                drawn.append((*corner_NK2[number, place].tolist(), character.codepoint, face))
            labels = tuple(character.class_id for character in chosen)
            items.append(Item(f"scene-{split}-{number:07d}", labels, (number, drawn), split))
        return items

    def _find_corners(self, cells_NK: np.ndarray, shift_NK2: np.ndarray) -> np.ndarray:
        """(N, K, 2) int64: left and top of each character: its cell's corner, randomly shifted, but inside the image.

        Args:
            cells_NK: the number of each character's cell.
            shift_NK2: random numbers in [-1, 1].
        """
        cell_NK2 = np.stack([cells_NK % self._config.cells, cells_NK // self._config.cells], axis=-1)
        corner_NK2 = np.rint((cell_NK2 + _JITTER * shift_NK2) * self._cell_size).astype(int)
        return corner_NK2.clip(0, self._config.image_size - self._cell_size)

    def _draw_candidates(self, split: SplitName) -> np.ndarray:
        """(N, K) int64: candidates for the characters of each image, drawn by its topic; likely ones come several times."""
        config, topic_N = self._config, self.draw_topics(split)
        places = np.arange(_CANDIDATES_PER_PLACE * config.max_characters)
        drawn_NK = uniforms(config.seed, _CHARACTER, SPLITS.index(split), np.arange(len(topic_N))[:, None], places)
        candidate_NK = np.empty(drawn_NK.shape, dtype=np.int64)
        for topic, probability_L in enumerate(self.topic_probabilities()):
            mine = topic_N == topic
            found = np.searchsorted(probability_L.cumsum(), drawn_NK[mine], side="right")
            candidate_NK[mine] = np.minimum(found, len(probability_L) - 1)  # rounding may leave the last sum below 1
        return candidate_NK

    def _count_images(self, split: SplitName) -> int:
        config = self._config
        return {"train": config.num_images, "val": config.num_val_images, "test": config.num_test_images}[split]
