"""Distortions of drawings: turned, slanted, stretched, moved, bolder or lighter, blurred, partly erased, noisy.

A distortion is eight bytes of a view's record (`views`), and all that it does follows from the record: where it erases and
what noise it adds, too.

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

_FIRST_PURPOSE = 110

#: Of a distortion in a view's record.
DISTORTION_BYTES = 8
#: Of the random bytes that belong to a record: `draw_bytes`.
ERASE_BYTES = 4


class DistortionConfig(Config):
    """How far drawings are distorted; each amount is drawn evenly from nothing to this, and for all but the last four both ways.

    rotate: degrees.
    shear: sideways, as a share of the height.
    scale: of the logarithm of width and height, each for itself: 0.1 is about a tenth.
    shift: sideways and up or down, as a share of the side.
    stroke: how much of the strokes' outermost pixel is added (bolder) or taken away (lighter), of light ink on dark paper.
    blur: radius in pixels.
    erase: the share of the image under a rectangle of one grey.
    noise: added to or taken from each pixel, as a share of white.
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
    """One distortion: `DistortionConfig`'s amounts; scale and shift by width and height."""

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
        """Eight bytes: the first six amounts with 128 for none, then two of 4 bits each in two bytes, stroke with 8 for none."""
        wide = (128 + round(getattr(self, name) * steps) for name, steps in WIDE_STEPS.items())
        stroke, blur = 8 + round(self.stroke * 8), round(self.blur * 8)
        erase, noise = round(self.erase * 32), round(self.noise * 32)
        return struct.pack("8B", *wide, stroke << 4 | blur, erase << 4 | noise)

    @classmethod
    def decode(cls, record: bytes) -> "Distortion":
        *wide, stroke_blur, erase_noise = struct.unpack("8B", record)
        amounts = [(byte - 128) / steps for byte, steps in zip(wide, WIDE_STEPS.values(), strict=True)]
        stroke, blur = (stroke_blur // 16 - 8) / 8, stroke_blur % 16 / 8
        return cls(*amounts, stroke, blur, erase_noise // 16 / 32, erase_noise % 16 / 32)


#: To half a degree; slant and place to a fifth of a pixel of 48; size to a hundredth.
WIDE_STEPS = {"rotate": 2, "shear": 256, "scale_x": 100, "scale_y": 100, "shift_x": 256, "shift_y": 256}


@dataclass(frozen=True)
class DrawnDistortions:
    """Random distortions of a batch; by the name of an amount, (B,) float64."""

    amounts: dict[str, np.ndarray]

    def at(self, row: int) -> Distortion:
        return Distortion(**{name: float(values[row]) for name, values in self.amounts.items()})


def draw_distortions(config: DistortionConfig, seed: int, epoch: int, ordinals: np.ndarray) -> DrawnDistortions:
    """The distortions of these samples in this epoch, whatever the batch, rank or worker that asks."""
    amounts = {}
    for number, field in enumerate(fields(Distortion)):
        limit = getattr(config, field.name.removesuffix("_x").removesuffix("_y"))
        uniform = uniforms(seed, _FIRST_PURPOSE + number, epoch, ordinals)
        amounts[field.name] = limit * (uniform if field.name in ("blur", "erase", "noise") else 2 * uniform - 1)
    return DrawnDistortions(amounts)


def distort(image: Image.Image, distortion: Distortion) -> Image.Image:
    """The distorted image, of the same size (S, S) and mode, grey or RGB; what comes in from outside is black."""
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
    """(B,) bool, of records of views, an array or a tensor: whether they hold a distortion where others have a crop."""
    return record_BV[:, DISTORTION_BYTES + 1] >= 128


def draw_bytes(record: bytes, num_pixels: int) -> bytes:
    """Of a distortion's record: four bytes say where and in which grey something is erased, the others are each pixel's noise."""
    return hashlib.shake_128(record).digest(ERASE_BYTES + num_pixels)


def _build_matrix(distortion: Distortion, size: int) -> tuple[float, ...]:
    """From a pixel of the result to a pixel of the image: six numbers, row by row; the centre is the fixed point."""
    angle = math.radians(distortion.rotate)
    cosine, sine = math.cos(angle), math.sin(angle)
    shrink_x, shrink_y = math.exp(-distortion.scale_x), math.exp(-distortion.scale_y)
    a, b = shrink_x * (cosine + distortion.shear * sine), shrink_x * (-sine + distortion.shear * cosine)
    c, d = shrink_y * sine, shrink_y * cosine
    x, y = size * (0.5 + distortion.shift_x), size * (0.5 + distortion.shift_y)
    return a, b, size / 2 - a * x - b * y, c, d, size / 2 - c * x - d * y


def _erase(pixels: np.ndarray, share: float, random_bytes: np.ndarray) -> None:
    """Overwrites a rectangle of the image with one grey; (S, S) or (S, S, 3)."""
    size = pixels.shape[0]
    aspect, x, y, grey = random_bytes.tolist()
    stretch = 2 ** (aspect / 255 - 0.5)
    width, height = (min(size, round(size * math.sqrt(share) * factor)) for factor in (stretch, 1 / stretch))
    left, top = round((size - width) * x / 255), round((size - height) * y / 255)
    pixels[top : top + height, left : left + width] = grey
