"""Views: what a network sees of an image. The parameters of a random view depend on nothing but (seed, epoch, sample).

A random view is rounded to a record of 13 bytes before it is used. So the stored record describes exactly the view that a teacher
saw, and a student that replays it sees the same pixels.

Shapes: B batch.
"""

import functools
import struct
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
import PIL
import pydantic
from PIL import Image, features

from concentration.data.decoding import SIDEWAYS, load_upright, open_image, read_orientation
from concentration.data.distortions import (
    DISTORTION_BYTES,
    Distortion,
    DistortionConfig,
    DrawnDistortions,
    distort,
    draw_distortions,
)
from concentration.data.order import uniforms
from concentration.data.photometry import NUM_LIGHTS, change_colours
from concentration.packed_targets import VIEW_BYTES
from concentration.schema import Config

_AREA, _ASPECT, _LEFT, _TOP, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _LIGHT, _INTERPOLATION = range(100, 110)

Share = pydantic.confloat(ge=0, le=1)

#: How a crop is resized to the network's input: one of Pillow's filters. All but `nearest` are antialiased; `area` is a mean over
#: boxes.
Interpolation = Literal["bilinear", "area", "nearest", "cubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "cubic": Image.Resampling.BICUBIC,
}
#: The interpolation of the centre view, and of all views if none is drawn.
INTERPOLATION: Interpolation = "bilinear"


class ViewConfig(Config):
    """The augmentation of training images. Evaluation sees the centre view.

    crop_area: the smallest area of a crop, as a share of the area that `crop_of` names; 1 keeps all of it.
    crop_of: what `crop_area` is a share of: the largest `square` in the middle, or the whole `image`. Of the latter, a crop that
        would be wider or higher than the image becomes exactly as wide or high, and keeps its area.
    crop_aspect: the largest ratio of a crop's sides; 1 gives squares.
    flip: the probability that the view is mirrored.
    brightness, contrast, saturation: the largest relative change of each.
    light: whether a colour of the light is drawn.
    interpolation: `random` draws one of all interpolations for each view.
    distortion: a distortion of drawings in place of a crop; None for none.
    """

    crop_area: Share = 1.0
    crop_of: Literal["square", "image"] = "square"
    crop_aspect: float = pydantic.Field(default=1.0, ge=1.0)
    flip: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    light: bool = False
    interpolation: Literal["bilinear", "random"] = "bilinear"
    distortion: DistortionConfig | None = None

    @pydantic.model_validator(mode="after")
    def _check_distortion(self):
        if self.distortion is not None and (self.crop_area, self.crop_aspect, self.crop_of) != (1, 1, "square"):
            raise ValueError(
                f"crop_area={self.crop_area}, crop_aspect={self.crop_aspect}, crop_of={self.crop_of} have no effect with a "
                "distortion, which is of the largest square in the middle: give distortion.scale and distortion.shift, or "
                "distortion=null"
            )
        return self


@dataclass(frozen=True, slots=True)
class View:
    """One view of one image.

    Attributes:
        left, top, right, bottom: the crop, as shares of the upright image's width and height. With a distortion the crop is the
            largest square in the middle, and these are 0, 0, 1, 1.
        flip: whether the crop is mirrored.
        brightness, contrast: factors, contrast about the crop's mean; 1 changes nothing.
        distortion: the distortion of the crop; None for none.
        saturation: a factor; 1 changes nothing.
        light: the number of a colour of the light (`photometry`); 0 changes nothing.
        interpolation: how the crop is resized.
        record: the record that the view was decoded from, so that writing it again costs nothing.
    """

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    distortion: Distortion | None = None
    saturation: float = 1.0
    light: int = 0
    interpolation: Interpolation = INTERPOLATION
    record: bytes | None = field(default=None, init=False, compare=False, repr=False)

    def encode(self) -> bytes:
        """The view as a record of 13 bytes, little-endian.

        Bytes 0-7: the crop in steps of 1/65,535 (4 x u16), or the distortion. Byte 8: flip (the highest bit) and brightness in
        steps of 1/64. Byte 9: whether there is a distortion (the highest bit) and contrast in steps of 1/64. Byte 10: saturation
        minus 1 in steps of 1/64 (i8). Byte 11: light. Byte 12: interpolation. Zeros in bytes 10 to 12 change nothing, so that
        records of an earlier version, which ended there, still mean the same.
        """
        if self.record is not None:
            return self.record
        if self.distortion is None:
            crop = (self.left, self.top, self.right, self.bottom)
            place = _CROP.pack(*(round(share * CROP_STEPS) for share in crop))
        else:
            place = self.distortion.encode()
        flip_brightness = self.flip << 7 | min(127, round(self.brightness * FACTOR_STEPS))
        is_distorted_contrast = (self.distortion is not None) << 7 | min(127, round(self.contrast * FACTOR_STEPS))
        saturation = min(127, round(self.saturation * FACTOR_STEPS) - FACTOR_STEPS)
        rest = _COLOUR.pack(saturation, self.light, INTERPOLATIONS.index(self.interpolation))
        return place + bytes([flip_brightness, is_distorted_contrast]) + rest

    @classmethod
    def decode(cls, record: bytes) -> "View":
        """The view that `encode` rounded to this record. Raises: ValueError, one of UNDECODABLE, if the record is invalid."""
        place, (flip_brightness, is_distorted_contrast) = record[: _CROP.size], record[_CROP.size : -_COLOUR.size]
        saturation, light, interpolation = _COLOUR.unpack(record[-_COLOUR.size :])
        if interpolation >= len(INTERPOLATIONS):
            raise ValueError(f"interpolation {interpolation} of a view, expected at most {len(INTERPOLATIONS) - 1}")
        is_distorted, contrast = divmod(is_distorted_contrast, 128)
        if is_distorted:
            crop, distortion = (0.0, 0.0, 1.0, 1.0), Distortion.decode(place)
        else:
            crop, distortion = (steps / CROP_STEPS for steps in _CROP.unpack(place)), None
        flip, brightness = divmod(flip_brightness, 128)
        factors = (brightness / FACTOR_STEPS, contrast / FACTOR_STEPS)
        colour = (1 + saturation / FACTOR_STEPS, light, INTERPOLATIONS[interpolation])
        view = cls(*crop, flip == 1, *factors, distortion, *colour)
        # Not by __init__, so that `dataclasses.replace` does not carry the record into a changed copy.
        object.__setattr__(view, "record", record)
        return view

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The crop (left, top, right, bottom) in pixels of an upright image of this size (width, height)."""
        width, height = size
        if self.distortion is not None:
            return CentreView().at(0, size).box(size)
        return self.left * width, self.top * height, self.right * width, self.bottom * height


@functools.lru_cache(maxsize=1024)  # if nothing is random, all square images share one view
def _round_view(exact: View) -> View:
    """The view rounded to its record."""
    return View.decode(exact.encode())


_CROP, _COLOUR = struct.Struct("<4H"), struct.Struct("<b2B")
assert _CROP.size == DISTORTION_BYTES == VIEW_BYTES - 2 - _COLOUR.size
CROP_STEPS, FACTOR_STEPS = 65_535, 64


class Views(Protocol):
    """The views of a batch."""

    def at(self, row: int, size: tuple[int, int]) -> View:
        """The view of the sample in this row of the batch, whose upright image has this size (width, height)."""


@dataclass(frozen=True)
class DrawnViews:
    """The random views of a batch.

    Attributes:
        area: (B,) float64, the area of the crop as a share of that of the largest square, or of the image: see `crop_of`.
        aspect: (B,) float64, the width of the crop divided by its height.
        x, y: (B,) float64, where the crop lies: 0 is the left or upper edge of the image, 1 the right or lower one.
        flip: (B,) bool.
        brightness, contrast, saturation: (B,) float64, factors.
        light, interpolation: (B,) int64, the number of each.
        crop_of: what `area` is a share of.
        distortions: distortions in place of crops; None for none.
    """

    area: np.ndarray
    aspect: np.ndarray
    x: np.ndarray
    y: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    light: np.ndarray
    interpolation: np.ndarray
    crop_of: Literal["square", "image"]
    distortions: DrawnDistortions | None = None

    def at(self, row: int, size: tuple[int, int]) -> View:
        """The view, rounded to its record."""
        if self.distortions is None:
            crop, distortion = self._crop_at(row, size), None
        else:
            crop, distortion = (0.0, 0.0, 1.0, 1.0), self.distortions.at(row)
        factors = (self.brightness[row], self.contrast[row])
        colour = (self.saturation[row], int(self.light[row]), INTERPOLATIONS[self.interpolation[row]])
        exact = View(*crop, bool(self.flip[row]), *factors, distortion, *colour)
        return _round_view(exact)

    def _crop_at(self, row: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
        width, height = size
        area, aspect = self.area[row], self.aspect[row]
        if self.crop_of == "square":
            area *= min(width, height) ** 2
        else:
            area *= width * height
            aspect = min(max(aspect, area / height**2), width**2 / area)  # neither higher nor wider than the image
        # At least two steps of the record, so that rounding cannot make the crop empty.
        share_x = max(2 / CROP_STEPS, min(1, max(1, (area * aspect) ** 0.5) / width))
        share_y = max(2 / CROP_STEPS, min(1, max(1, (area / aspect) ** 0.5) / height))
        left, top = (1 - share_x) * self.x[row], (1 - share_y) * self.y[row]
        return left, top, left + share_x, top + share_y


@dataclass(frozen=True)
class StoredViews:
    """Views that were drawn earlier and stored.

    Attributes:
        record_BV: (B, 13) uint8, their records; zeros stand for an image that could not be decoded.
    """

    record_BV: np.ndarray

    def at(self, row: int, size: tuple[int, int]) -> View:
        """The stored view. Raises: ValueError, one of UNDECODABLE, if the image could not be decoded when it was drawn."""
        if not self.record_BV[row].any():
            raise ValueError("the image could not be decoded when its views were drawn")
        return View.decode(self.record_BV[row].tobytes())


class CentreView:
    """The largest square in the middle of each image, unchanged otherwise."""

    def at(self, row: int, size: tuple[int, int]) -> View:
        width, height = size
        side = min(width, height)
        left, top = (width - side) / 2 / width, (height - side) / 2 / height
        return View(left, top, 1 - left, 1 - top)


def draw_views(config: ViewConfig, seed: int, epoch: int, ordinals: np.ndarray) -> DrawnViews:
    """The random views of these samples in this epoch; they do not depend on the batch, rank or worker."""

    def uniform(purpose: int) -> np.ndarray:
        return uniforms(seed, purpose, epoch, ordinals)

    log_aspect, unchanged = np.log(config.crop_aspect), np.zeros(len(ordinals), dtype=int)
    return DrawnViews(
        area=config.crop_area + (1 - config.crop_area) * uniform(_AREA),
        aspect=np.exp(log_aspect * (2 * uniform(_ASPECT) - 1)),
        x=uniform(_LEFT),
        y=uniform(_TOP),
        flip=uniform(_FLIP) < config.flip,
        brightness=1 + config.brightness * (2 * uniform(_BRIGHTNESS) - 1),
        contrast=1 + config.contrast * (2 * uniform(_CONTRAST) - 1),
        saturation=1 + config.saturation * (2 * uniform(_SATURATION) - 1),
        light=1 + (uniform(_LIGHT) * (NUM_LIGHTS - 1)).astype(int) if config.light else unchanged,
        interpolation=(uniform(_INTERPOLATION) * len(INTERPOLATIONS)).astype(int)
        if config.interpolation == "random"
        else unchanged,
        crop_of=config.crop_of,
        distortions=draw_distortions(config.distortion, seed, epoch, ordinals) if config.distortion else None,
    )


def describe_decoder() -> dict[str, str]:
    """The versions of the libraries that decode images: the pixels of a view depend on them, its record does not."""
    versions = {"pillow": PIL.__version__}
    versions |= {name: features.version(name) or "none" for name in ("libjpeg_turbo", "webp", "zlib")}
    return versions


def decode_view(content: bytes, views: Views, row: int, image_size: int) -> tuple[np.ndarray, View, bool]:
    """Decodes an image into one of a batch's views.

    Args:
        content: the encoded image.
        views: the views of the batch.
        row: the image's place in the batch.
        image_size: the side of the result in pixels.

    Returns:
        The pixels (3, image_size, image_size) uint8, the view, and whether the image's file is grey. A grey file gets grey noise;
        a file in colour gets coloured noise even if all its pixels are grey.

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    image = open_image(content)
    orientation = read_orientation(image)
    upright_size = image.size[::-1] if orientation in SIDEWAYS else image.size
    view = views.at(row, upright_size)
    left, top, right, bottom = view.box(upright_size)
    image = load_upright(image, orientation, min(right - left, bottom - top) / image_size)
    box = view.box(image.size)
    if image.size != (image_size, image_size) or box != (0, 0, image_size, image_size):
        image = image.resize((image_size, image_size), _FILTERS[view.interpolation], box=box)
    if view.distortion is not None:
        image = distort(image, view.distortion)
    pixels = np.asarray(image)
    if view.flip:
        pixels = pixels[:, ::-1]
    pixels = change_colours(pixels, view.brightness, view.contrast, view.saturation, view.light)
    if pixels.ndim == 2:
        return pixels[np.newaxis].repeat(3, axis=0), view, True
    return pixels.transpose(2, 0, 1), view, image.mode == "L"
