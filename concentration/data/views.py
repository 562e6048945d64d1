"""Views: what a network sees of an image. The parameters of a view are drawn from (seed, epoch, sample) alone.

A drawn view is rounded to a record of 13 bytes before it is used, so that the view that a teacher saw is stored exactly, and the
student that replays it sees the same pixels.

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

#: Of the files that are taken for images.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

#: How a crop becomes the network's input: Pillow's filters; those but `nearest` are antialiased, `area` is a mean over boxes.
Interpolation = Literal["bilinear", "area", "nearest", "cubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "cubic": Image.Resampling.BICUBIC,
}
#: Of the centre view, and of all views where no other is drawn.
INTERPOLATION: Interpolation = "bilinear"


class ViewConfig(Config):
    """Augmentation of training images; evaluation and teachers see the centre view.

    crop_area: the least share of an area that a crop keeps; 1 keeps all.
    crop_of: whose area: that of the largest `square` inside, or of the whole `image`. There, a crop that would not fit becomes
        as wide or high as the image, and keeps its area.
    crop_aspect: crops are up to this much wider or higher than square.
    flip: the probability of a mirror image.
    brightness, contrast, saturation: the largest relative change of each.
    light: whether the colours of the light are drawn.
    interpolation: `random` draws one of all for each view.
    distortion: of drawings, in place of a crop; None for none.
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
        left, top, right, bottom: the crop, as shares of the upright image's width and height; with a distortion, of the
            largest square in its middle.
        flip: whether the crop is mirrored.
        brightness, contrast: factors, contrast about the crop's mean; 1 changes nothing.
        distortion: of the crop, which then is the whole square.
        saturation: a factor; 1 changes nothing.
        light: number of a colour of light (`photometry`); 0 changes nothing.
        interpolation: by which the crop is resized.
        record: what it was decoded from, kept since each image's view is written down.
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
        """The record, little-endian.

        Crop in 1/65,535 (4 x u16) or distortion (8 bytes); flip and brightness in 1/64 (1 and 7 bits); whether it is a
        distortion, and contrast in 1/64 (1 and 7 bits); saturation in 1/64 above 1 (i8); light (u8); interpolation (u8).
        Zeros at the end change nothing.
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
        """Raises: ValueError, one of UNDECODABLE, where it is no record."""
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
        object.__setattr__(view, "record", record)  # not of __init__, so that a changed copy does not keep it
        return view

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of an upright image of this width and height."""
        width, height = size
        if self.distortion is not None:
            return CentreView().at(0, size).box(size)
        return self.left * width, self.top * height, self.right * width, self.bottom * height


@functools.lru_cache(maxsize=1024)  # where nothing is drawn, all square images have one view
def _round_view(exact: View) -> View:
    return View.decode(exact.encode())


_CROP, _COLOUR = struct.Struct("<4H"), struct.Struct("<b2B")
assert _CROP.size == DISTORTION_BYTES == VIEW_BYTES - 2 - _COLOUR.size
CROP_STEPS, FACTOR_STEPS = 65_535, 64


class Views(Protocol):
    """The views of a batch."""

    def at(self, row: int, size: tuple[int, int]) -> View:
        """The view of one sample of the batch, whose upright image has this width and height."""


@dataclass(frozen=True)
class DrawnViews:
    """Random views; the crop is centred at (x, y) as shares of the free room, 0.5 being the middle.

    Attributes:
        area: (B,) of the crop, as a share of the largest square's, or of the image's.
        aspect: (B,) its width over its height.
        x, y, brightness, contrast, saturation: (B,) float64.
        flip: (B,) bool.
        light, interpolation: (B,) int64, their numbers.
        crop_of: what `area` is a share of.
        distortions: in place of the crop.
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
        # At least two steps of the record: rounding must not make the crop empty.
        share_x = max(2 / CROP_STEPS, min(1, max(1, (area * aspect) ** 0.5) / width))
        share_y = max(2 / CROP_STEPS, min(1, max(1, (area / aspect) ** 0.5) / height))
        left, top = (1 - share_x) * self.x[row], (1 - share_y) * self.y[row]
        return left, top, left + share_x, top + share_y


@dataclass(frozen=True)
class StoredViews:
    """Views that were drawn earlier.

    Attributes:
        record_BV: (B, 13) uint8, as `View.encode` writes them.
    """

    record_BV: np.ndarray

    def at(self, row: int, size: tuple[int, int]) -> View:
        """Raises: ValueError, one of UNDECODABLE, where the image could not be decoded when its views were drawn."""
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


def is_hidden(name: str) -> bool:
    """Whether a part of a member's path begins with a dot, as what macOS leaves beside every file does."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def draw_views(config: ViewConfig, seed: int, epoch: int, ordinals: np.ndarray) -> DrawnViews:
    """The views of these samples in this epoch, whatever the batch, rank or worker that asks."""

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
    """The versions on which the pixels of a view depend; its parameters depend on none."""
    versions = {"pillow": PIL.__version__}
    versions |= {name: features.version(name) or "none" for name in ("libjpeg_turbo", "webp", "zlib")}
    return versions


def decode_view(content: bytes, views: Views, row: int, image_size: int) -> tuple[np.ndarray, View, bool]:
    """One view as uint8 (3, image_size, image_size), which view it is, and whether the image is grey, as its file says.

    A distortion's noise is then grey, too. Of a file of colours that are all grey, it is not.

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
