"""Photometric distortions: brightness, contrast, saturation and the light of an image.

Shapes: H, W of an image, 3 channels or none (grey).

Sources: Howard, "Some improvements on deep convolutional neural network based image classification", arXiv 1312.5402, section 2
(contrast, brightness and colour between 0.5 and 1.5, then light); Krizhevsky et al. 2012, section 4.1 (light).
"""

import functools

import numpy as np

from concentration.data.order import uniforms

#: Brightness of red, green and blue, as television has it (ITU-R 601), and Pillow.
LUMA = np.array([0.299, 0.587, 0.114])

# The principal directions of the colours of ImageNet's pixels in [0, 1], as columns, and their standard deviations; of
# facebook's fb.resnet.torch, since Krizhevsky et al. print none.
_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
#: Of the amounts of the three directions that are added.
_LIGHT = 0.1

#: Lights that can be drawn: light 0 adds nothing.
NUM_LIGHTS = 256


def change_colours(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, light: int) -> np.ndarray:
    """The changed image, uint8 and (H, W, 3), or (H, W) where a grey one stays grey.

    Saturation about each pixel's own brightness, then contrast about the mean, brightness, and the light. Howard draws the
    order of the first three; they are not cut to 8 bits in between here, so it would hardly matter.

    Args:
        pixels: uint8, (H, W, 3) or (H, W).
        brightness, contrast, saturation: factors; 1 changes nothing.
        light: a number below NUM_LIGHTS.
    """
    if (brightness, contrast, saturation, light) == (1, 1, 1, 0):
        return pixels
    changed = pixels
    if saturation != 1 and pixels.ndim == 3:
        luma = (pixels @ LUMA)[..., None]
        changed = (pixels - luma) * saturation + luma
    mean = changed.mean()
    changed = ((changed - mean) * contrast + mean) * brightness
    if light:
        changed = (changed if pixels.ndim == 3 else changed[..., None]) + list_lights()[light]
    return changed.clip(0, 255).astype(np.uint8)


@functools.cache
def list_lights() -> np.ndarray:
    """(NUM_LIGHTS, 3): what each adds to red, green and blue; normally distributed, and the same for ever."""
    numbers = np.arange(NUM_LIGHTS)
    first, second, third, fourth = (1 - uniforms(0, purpose, numbers) for purpose in range(4))  # above 0
    normal = np.stack(
        [
            np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second),
            np.sqrt(-2 * np.log(first)) * np.sin(2 * np.pi * second),
            np.sqrt(-2 * np.log(third)) * np.cos(2 * np.pi * fourth),
        ],
        axis=1,
    )
    normal[0] = 0
    return 255 * (_LIGHT * normal * _DEVIATIONS) @ _DIRECTIONS.T
