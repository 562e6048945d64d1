"""Views: what a network sees of an image. The parameters of a view are drawn from (seed, epoch, sample) alone.

Shapes: B batch.
"""

import io
from dataclasses import dataclass

import numpy as np
import pydantic
from PIL import Image, ImageOps

from concentration.data.order import uniforms
from concentration.schema import Config

_CROP, _ASPECT, _LEFT, _TOP, _FLIP, _BRIGHTNESS, _CONTRAST = range(100, 107)

Share = pydantic.confloat(ge=0, le=1)

#: What Pillow raises for a damaged or hostile image; DecompressionBombError guards against absurd sizes.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError)


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


def decode_view(content: bytes, views: Views, row: int, image_size: int) -> np.ndarray:
    """One view as uint8 (3, image_size, image_size).

    Raises:
        one of UNDECODABLE: the image cannot be decoded.
    """
    image = Image.open(io.BytesIO(content))
    if image.format == "JPEG":
        image.draft("RGB", (image_size, image_size))  # decodes large photographs at a half, quarter or eighth
    if image.format != "PNG" or "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    box = _crop_box(image.size, views, row)
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
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


def _crop_box(size: tuple[int, int], views: Views, row: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels: at area 1 and aspect 1 the largest square in the middle."""
    width, height = size
    area = views.area[row] * min(width, height) ** 2
    crop_width = min(width, (area * views.aspect[row]) ** 0.5)
    crop_height = min(height, (area / views.aspect[row]) ** 0.5)
    left = (width - crop_width) * views.x[row]
    top = (height - crop_height) * views.y[row]
    return left, top, left + crop_width, top + crop_height
