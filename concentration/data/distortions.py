"""Distortions of drawings: rotation, shear, scale, shift, stroke width, blur, an erased rectangle, and noise.

A distortion takes eight bytes of a view's record (`views`). Everything it does follows from these bytes, also where it erases and
which noise it adds, so that a stored view can be repeated exactly.

Shapes: B batch, S the side of a square image.
"""

import hashlib
import math
import struct
from dataclasses import dataclass, fields

import numpy as np
import pydantic
from PIL import Image, ImageFilter

from concentration.data.order import uniforms
from concentration.schema import Config

#: The random streams (`order.random_bits`) of the amounts are numbered from here; `views` has those before.
_FIRST_PURPOSE = 110

#: The length of an encoded distortion.
DISTORTION_BYTES = 8
#: How many of the random bytes of `draw_bytes` say what is erased.
ERASE_BYTES = 4


class DistortionConfig(Config):
    """How far drawings are distorted: the largest amount of each distortion.

    Blur, erase and noise are drawn uniformly between 0 and this amount, the others between minus and plus this amount.

    rotate: degrees.
    shear: the sideways slant, as a share of the height.
    scale: change of the logarithms of width and height, drawn separately: 0.1 is about a tenth larger or smaller.
    shift: sideways, and up or down, as a share of the side.
    stroke: strokes of light ink on dark paper become bolder (positive) or thinner (negative) by this share of a pixel a side.
    blur: the standard deviation of a Gaussian in pixels.
    erase: the share of the image that is covered by a rectangle of one grey.
    noise: the largest change of a pixel, as a share of white.
    """

    rotate: float = pydantic.Field(0.0, ge=0, le=45)
    shear: float = pydantic.Field(0.0, ge=0, le=0.49)
    scale: float = pydantic.Field(0.0, ge=0, le=1)
    shift: float = pydantic.Field(0.0, ge=0, le=0.49)
    stroke: float = pydantic.Field(0.0, ge=0, le=0.85)
    blur: float = pydantic.Field(0.0, ge=0, le=1.8)
    erase: float = pydantic.Field(0.0, ge=0, le=0.45)
    noise: float = pydantic.Field(0.0, ge=0, le=0.45)


@dataclass(frozen=True, slots=True)
class Distortion:
    """One distortion: the amounts of `DistortionConfig`, with scale and shift along the width (x) and the height (y)."""

    rotate: float
    shear: float
    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float
    stroke: float
    blur: float
    erase: float
    noise: float

    def encode(self) -> bytes:
        """Eight bytes: one for each of the first six amounts, in which 128 is none; then stroke (8 is none) and blur, erase and
        noise in 4 bits each."""
        wide = (128 + round(getattr(self, name) * steps) for name, steps in WIDE_STEPS.items())
        stroke, blur = 8 + round(self.stroke * 8), round(self.blur * 8)
        erase, noise = round(self.erase * 32), round(self.noise * 32)
        return struct.pack("8B", *wide, stroke << 4 | blur, erase << 4 | noise)

    @classmethod
    def decode(cls, record: bytes) -> "Distortion":
        """The distortion that `encode` rounded to these eight bytes."""
        *wide, stroke_blur, erase_noise = struct.unpack("8B", record)
        amounts = [(byte - 128) / steps for byte, steps in zip(wide, WIDE_STEPS.values(), strict=True)]
        stroke, blur = (stroke_blur // 16 - 8) / 8, stroke_blur % 16 / 8
        return cls(*amounts, stroke, blur, erase_noise // 16 / 32, erase_noise % 16 / 32)


#: How many steps of a byte make one unit of an amount: half a degree is one step, and so is a hundredth of scale.
WIDE_STEPS = {"rotate": 2, "shear": 256, "scale_x": 100, "scale_y": 100, "shift_x": 256, "shift_y": 256}


@dataclass(frozen=True)
class DrawnDistortions:
    """The random distortions of a batch: for the name of each amount, its values (B,) float64."""

    amounts: dict[str, np.ndarray]

    def at(self, row: int) -> Distortion:
        """The distortion of one sample of the batch."""
        return Distortion(**{name: float(values[row]) for name, values in self.amounts.items()})


def draw_distortions(config: DistortionConfig, seed: int, epoch: int, ordinals: np.ndarray) -> DrawnDistortions:
    """The distortions of these samples in this epoch; they do not depend on the batch, rank or worker."""
    amounts = {}
    for number, field in enumerate(fields(Distortion)):
        limit = getattr(config, field.name.removesuffix("_x").removesuffix("_y"))
        uniform = uniforms(seed, _FIRST_PURPOSE + number, epoch, ordinals)
        amounts[field.name] = limit * (uniform if field.name in ("blur", "erase", "noise") else 2 * uniform - 1)
    return DrawnDistortions(amounts)


def distort(image: Image.Image, distortion: Distortion) -> Image.Image:
    """The distorted image, of the same size (S, S) and mode (grey or RGB). Pixels that come from outside the image are black."""
    matrix = _build_matrix(distortion, image.width)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    if distortion.stroke:
        grown = image.filter(ImageFilter.MaxFilter(3) if distortion.stroke > 0 else ImageFilter.MinFilter(3))
        image = Image.blend(image, grown, abs(distortion.stroke))
    if distortion.blur:
        image = image.filter(ImageFilter.GaussianBlur(distortion.blur))
    if not (distortion.erase or distortion.noise):
        return image
    pixels = np.array(image)
    random_bytes = np.frombuffer(draw_bytes(distortion.encode(), pixels.size), dtype=np.uint8)
    if distortion.erase:
        _erase(pixels, distortion.erase, random_bytes[:ERASE_BYTES])
    if distortion.noise:
        random_pixels = random_bytes[ERASE_BYTES:].reshape(pixels.shape)
        noise = (random_pixels / np.float32(127.5) - 1) * np.float32(255 * distortion.noise)
        pixels = (pixels + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def are_distorted(record_BV):
    """(B,) bool: which records of views (B, 13) uint8, an array or a tensor, hold a distortion instead of a crop."""
    return record_BV[:, DISTORTION_BYTES + 1] >= 128


def draw_bytes(record: bytes, num_pixels: int) -> bytes:
    """The random bytes of a distortion: ERASE_BYTES that place the erased rectangle and choose its grey, then a byte of noise for
    each of `num_pixels` values. They are a hash of `record`, the eight bytes of the distortion."""
    return hashlib.shake_128(record).digest(ERASE_BYTES + num_pixels)


def _build_matrix(distortion: Distortion, size: int) -> tuple[float, ...]:
    """The affine map from a place in the result to one in the image, as Pillow takes it: two rows of three numbers.

    Apart from the shift, the centre of the image stays where it is.
    """
    angle = math.radians(distortion.rotate)
    cosine, sine = math.cos(angle), math.sin(angle)
    shrink_x, shrink_y = math.exp(-distortion.scale_x), math.exp(-distortion.scale_y)
    a, b = shrink_x * (cosine + distortion.shear * sine), shrink_x * (-sine + distortion.shear * cosine)
    c, d = shrink_y * sine, shrink_y * cosine
    x, y = size * (0.5 + distortion.shift_x), size * (0.5 + distortion.shift_y)
    return a, b, size / 2 - a * x - b * y, c, d, size / 2 - c * x - d * y


def _erase(pixels: np.ndarray, share: float, random_bytes: np.ndarray) -> None:
    """Overwrites a rectangle of `pixels`, (S, S) or (S, S, 3) uint8, with one grey.

    Args:
        share: the share of the image that the rectangle covers.
        random_bytes: (ERASE_BYTES,) uint8: the rectangle's aspect, its place along x and y, and the grey.
    """
    size = pixels.shape[0]
    aspect, x, y, grey = random_bytes.tolist()
    stretch = 2 ** (aspect / 255 - 0.5)
    width, height = (min(size, round(size * math.sqrt(share) * factor)) for factor in (stretch, 1 / stretch))
    left, top = round((size - width) * x / 255), round((size - height) * y / 255)
    pixels[top : top + height, left : left + width] = grey
