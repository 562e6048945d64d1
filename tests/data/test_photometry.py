"""Colours changed as Pillow's ImageEnhance changes them, and lights that are distributed as they should be."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from concentration.data.photometry import NUM_LIGHTS, change_colours


@pytest.fixture
def pixels() -> np.ndarray:
    """Middle greys and colours, which no factor of these tests takes out of range."""
    return np.random.default_rng(0).integers(90, 150, (12, 10, 3)).astype(np.uint8)


def test_nothing_changes_nothing(pixels):
    assert change_colours(pixels, 1, 1, 1, 0) is pixels


@pytest.mark.parametrize("factor", [0.5, 1.5])
@pytest.mark.parametrize("name", ["Brightness", "Color"])
def test_brightness_and_saturation_are_pillows(pixels, name, factor):
    expected = np.asarray(getattr(ImageEnhance, name)(Image.fromarray(pixels)).enhance(factor)).astype(int)
    factors = {"Brightness": (factor, 1, 1), "Color": (1, 1, factor)}[name]
    np.testing.assert_allclose(change_colours(pixels, *factors, 0), expected, atol=1)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_contrast_is_pillows_of_a_grey_image(pixels, factor):
    """Of colours it is about the mean of all channels here, and about the mean brightness there."""
    grey = pixels[..., 0]
    expected = np.asarray(ImageEnhance.Contrast(Image.fromarray(grey)).enhance(factor)).astype(int)
    np.testing.assert_allclose(change_colours(grey, 1, factor, 1, 0), expected, atol=1)


def test_saturation_0_is_grey_and_does_not_change_grey(pixels):
    grey = change_colours(pixels, 1, 1, 0, 0)
    assert np.ptp(grey.astype(int), axis=2).max() <= 1
    np.testing.assert_array_equal(change_colours(pixels[..., 0], 1, 1, 0.3, 0), pixels[..., 0])


def test_a_light_adds_one_colour_to_all_pixels(pixels):
    added = change_colours(pixels, 1, 1, 1, 17).astype(float) - pixels
    assert np.ptp(added, axis=(0, 1)).max() <= 1
    assert change_colours(pixels[..., 0], 1, 1, 1, 17).shape == (12, 10, 3), "a grey image under a coloured light"


def test_lights_are_krizhevskys_in_distribution():
    """Deviations of 0.1 times those of ImageNet's colours, along their principal directions."""
    black = np.full((1, 1, 3), 100, dtype=np.uint8)
    lights = np.array([change_colours(black, 1, 1, 1, light)[0, 0] - 100.0 for light in range(1, NUM_LIGHTS)])
    directions = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    amounts = lights @ directions
    assert amounts[:, 0].std() == pytest.approx(255 * 0.1 * 0.2175, rel=0.12)
    assert amounts[:, 1].std() == pytest.approx(255 * 0.1 * 0.0188, abs=0.4)  # whole grey levels
    assert len({tuple(light) for light in lights.tolist()}) > 60


def test_lights_are_the_same_for_ever():
    grey = np.full((1, 1), 128, dtype=np.uint8)
    assert [change_colours(grey, 1, 1, 1, light)[0, 0].tolist() for light in (1, 2, 255)] == [
        [133, 134, 134],
        [126, 126, 126],
        [127, 127, 126],
    ]
