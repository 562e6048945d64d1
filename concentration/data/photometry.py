"""Photometric distortions: brightness, contrast, saturation, and the colour of the light.

Shapes: H, W height and width of an image, which has 3 channels or, if it is grey, no channel axis.

Sources: Howard, "Some improvements on deep convolutional neural network based image classification", arXiv 1312.5402, section 2
(contrast, brightness and colour between 0.5 and 1.5, then light); Krizhevsky et al. 2012, section 4.1 (light).
"""

import functools

import numpy as np

from concentration.data.order import uniforms

#: The weights of red, green and blue in a pixel's brightness (ITU-R BT.601; Pillow has the same).
LUMA = np.array([0.299, 0.587, 0.114])

# The principal directions of the colours of ImageNet's pixels in [0, 1], as columns, and the standard deviation along each. Since
# Krizhevsky et al. do not print theirs, these are from Facebook's fb.resnet.torch.
_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
#: The standard deviation of alpha_i in Krizhevsky et al., by which each direction is added in units of its own deviation.
_LIGHT = 0.1

#: How many lights can be drawn; light 0 adds nothing.
NUM_LIGHTS = 256


def change_colours(pixels: np.ndarray, brightness: float, contrast: float, saturation: float, light: int) -> np.ndarray:
    """The changed image, (H, W, 3) uint8; a grey image stays (H, W) unless a light colours it.

    The steps are: saturation about each pixel's own brightness, contrast about the image's mean, brightness, light. Howard
    applies the first three in random order. Here the order would hardly matter, since pixels become 8 bits only at the end.

    Args:
        pixels: uint8, (H, W, 3) or (H, W).
        brightness, contrast, saturation: factors; 1 changes nothing.
        light: the number of a light, below NUM_LIGHTS; 0 changes nothing.
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
    """(NUM_LIGHTS, 3) float64: what each light adds to red, green and blue in [0, 255].

    The lights are normally distributed, and the same in every run, so that a stored view can be repeated.
    """
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
