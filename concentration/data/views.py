"""Views: what a network sees of an image. The parameters of a view are drawn from (seed, epoch, sample) alone.

Shapes: B batch.
"""

import io
import math
import struct
from dataclasses import dataclass

import numpy as np
import pydantic
from PIL import ExifTags, Image

from concentration.data.order import uniforms
from concentration.schema import Config

_CROP, _ASPECT, _LEFT, _TOP, _FLIP, _BRIGHTNESS, _CONTRAST = range(100, 107)

Share = pydantic.confloat(ge=0, le=1)

#: What Pillow raises for a damaged or hostile image; DecompressionBombError guards against absurd sizes.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error, Image.DecompressionBombError)

# What may stand behind a name in .jpg, .png or .webp. NOTE: of Pillow's other formats some start programs (EPS), and many
# raise anything at all for a damaged file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

#: By EXIF's orientation: what makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ViewConfig(Config):
    """Augmentation of training images; evaluation and teachers see the centre view.

    crop_area: the least share of the image's area that a crop keeps; 1 keeps all.
    crop_aspect: crops are up to this much wider or higher than square.
    flip: the probability of a mirror image.
    brightness, contrast: the largest relative change of each.
    """

    crop_area: Share = 1.0
    crop_aspect: float = pydantic.Field(default=1.0, ge=1.0)
    flip: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0


@dataclass(frozen=True)
class Views:
    """Parameters of B views; the crop is centred at (x, y) as shares of the free room, 0.5 being the middle.

    Attributes:
        area, aspect, x, y, brightness, contrast: (B,) float64.
        flip: (B,) bool.
    """

    area: np.ndarray
    aspect: np.ndarray
    x: np.ndarray
    y: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray


def draw_views(config: ViewConfig, seed: int, epoch: int, ordinals: np.ndarray) -> Views:
    """The views of these samples in this epoch, whatever the batch, rank or worker that asks."""

    def uniform(purpose: int) -> np.ndarray:
        return uniforms(seed, purpose, epoch, ordinals)

    log_aspect = np.log(config.crop_aspect)
    return Views(
        area=config.crop_area + (1 - config.crop_area) * uniform(_CROP),
        aspect=np.exp(log_aspect * (2 * uniform(_ASPECT) - 1)),
        x=uniform(_LEFT),
        y=uniform(_TOP),
        flip=uniform(_FLIP) < config.flip,
        brightness=1 + config.brightness * (2 * uniform(_BRIGHTNESS) - 1),
        contrast=1 + config.contrast * (2 * uniform(_CONTRAST) - 1),
    )


def centre_views(count: int) -> Views:
    """The largest square in the middle of each image, unchanged otherwise."""
    ones, half = np.ones(count), np.full(count, 0.5)
    return Views(ones, ones, half, half, np.zeros(count, dtype=bool), ones, ones)


def open_image(content: bytes) -> Image.Image:
    """The image, of which only the header has been read.

    Raises:
        one of UNDECODABLE: it is no image of a format that we take.
    """
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def decode_view(content: bytes, views: Views, row: int, image_size: int) -> np.ndarray:
    """One view as uint8 (3, image_size, image_size).

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    image = open_image(content)
    if image.format == "JPEG":
        # Decodes large photographs at a half, quarter or eighth, as long as the crop keeps `image_size` pixels.
        left, top, right, bottom = _crop_box(image.size, views, row)
        shrink = min(right - left, bottom - top) / image_size
        image.draft("RGB", (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    if image.format != "PNG" or "exif" in image.info:
        image = _turn_upright(image)
    box = _crop_box(image.size, views, row)
    image = _reduce_to_8_bits(image)
    if image.size != (image_size, image_size) or box != (0, 0, image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    if views.flip[row]:
        pixels = pixels[:, ::-1]
    if views.brightness[row] != 1 or views.contrast[row] != 1:
        mean = pixels.mean()
        changed = ((pixels - mean) * views.contrast[row] + mean) * views.brightness[row]
        pixels = changed.clip(0, 255).astype(np.uint8)
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (3, image_size, image_size))
    return pixels.transpose(2, 0, 1)


def _turn_upright(image: Image.Image) -> Image.Image:
    """NOTE: not `ImageOps.exif_transpose`, which also writes the other EXIF tags anew, and fails where it cannot."""
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if method is None else image.transpose(method)


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey or RGB, 8 bits a channel."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # grey of 16 bits, all of which Pillow would turn white, but for the darkest
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _crop_box(size: tuple[int, int], views: Views, row: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels: at area 1 and aspect 1 the largest square in the middle."""
    width, height = size
    area = views.area[row] * min(width, height) ** 2
    crop_width = min(width, max(1, (area * views.aspect[row]) ** 0.5))
    crop_height = min(height, max(1, (area / views.aspect[row]) ** 0.5))
    left = (width - crop_width) * views.x[row]
    top = (height - crop_height) * views.y[row]
    return left, top, left + crop_width, top + crop_height
