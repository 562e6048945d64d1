"""Distortions: what each amount does to a picture, against numpy; records; and the distribution of drawn ones."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concentration.data.distortions import (
    DISTORTION_BYTES,
    Distortion,
    DistortionConfig,
    distort,
    draw_distortions,
)

SIZE = 40
NONE = Distortion(**{field.name: 0.0 for field in fields(Distortion)})
FAR = DistortionConfig(rotate=20, shear=0.2, scale=0.3, shift=0.1, stroke=0.5, blur=1.0, erase=0.2, noise=0.25)


@pytest.fixture(scope="module")
def blob() -> Image.Image:
    """An oblong spot, light on dark, nowhere near the edges."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    spot = np.exp(-(((x - 22) / 5) ** 2) - ((y - 18) / 2.5) ** 2)
    return Image.fromarray(np.round(255 * spot).astype(np.uint8))


def moments(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Centre (x, y) and covariance (2, 2) of the ink, in pixels."""
    ink = np.asarray(image, dtype=float)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    places = np.stack([x.ravel(), y.ravel()])
    weights = ink.ravel() / ink.sum()
    centre = places @ weights
    spread = places - centre[:, None]
    return centre, (spread * weights) @ spread.T


def test_no_distortion_changes_no_pixel(blob):
    for image in (blob, blob.convert("RGB")):
        np.testing.assert_array_equal(np.asarray(distort(image, NONE)), np.asarray(image))


@pytest.mark.parametrize(
    ("amounts", "matrix"),
    [
        ({"rotate": 30}, [[np.cos(np.pi / 6), np.sin(np.pi / 6)], [-np.sin(np.pi / 6), np.cos(np.pi / 6)]]),
        ({"shear": 0.3}, [[1, -0.3], [0, 1]]),
        ({"scale_x": 0.25}, [[np.exp(0.25), 0], [0, 1]]),
        ({"scale_y": -0.3}, [[1, 0], [0, np.exp(-0.3)]]),
    ],
)
def test_the_spot_moves_and_stretches_as_the_linear_map_says(amounts, matrix, blob):
    centre, covariance = moments(blob)
    moved, stretched = moments(distort(blob, replace(NONE, **amounts)))
    matrix = np.array(matrix)
    np.testing.assert_allclose(moved, SIZE / 2 + matrix @ (centre - SIZE / 2), atol=0.1)
    np.testing.assert_allclose(stretched, matrix @ covariance @ matrix.T, atol=0.6)


def test_shifts_are_shares_of_the_side(blob):
    moved = distort(blob, replace(NONE, shift_x=0.1, shift_y=-0.05))
    np.testing.assert_array_equal(np.asarray(moved), np.roll(np.asarray(blob), (-2, 4), axis=(0, 1)))


def test_strokes_grow_and_shrink_by_a_pixel(blob):
    line = np.zeros((SIZE, SIZE), np.uint8)
    line[10:30, 15:20] = 255
    bolder = np.asarray(distort(Image.fromarray(line), replace(NONE, stroke=0.5)))
    lighter = np.asarray(distort(Image.fromarray(line), replace(NONE, stroke=-0.5)))
    assert bolder[20].tolist() == [0] * 14 + [127] + [255] * 5 + [127] + [0] * 19
    assert lighter[20].tolist() == [0] * 15 + [127] + [255] * 3 + [127] + [0] * 20


def test_blur_keeps_the_ink_and_spreads_it(blob):
    ink = np.asarray(blob, float).sum()
    blurred = distort(blob, replace(NONE, blur=1.5))
    assert abs(np.asarray(blurred, float).sum() / ink - 1) < 0.02
    assert (np.diag(moments(blurred)[1]) > np.diag(moments(blob)[1]) + 1).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_rectangle_of_the_given_area_is_erased(mode):
    image = Image.new(mode, (SIZE, SIZE))
    for share in (0.125, 0.25):
        pixels = np.asarray(distort(image, replace(NONE, erase=share, shift_x=0.25)))
        assert pixels.shape == np.asarray(image).shape
        covered = (pixels.reshape(SIZE, SIZE, -1) != 0).all(axis=2)
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "a rectangle"
        assert abs(covered.mean() - share) < 0.04
        assert len(np.unique(pixels)) == 2, "one grey"


def test_noise_is_even_around_the_image_and_no_wider_than_it_says():
    image = Image.new("L", (SIZE, SIZE), 128)
    noise = np.asarray(distort(image, replace(NONE, noise=0.25)), float) - 128
    assert np.abs(noise).max() <= 64
    assert np.abs(noise.mean()) < 5
    assert np.abs(noise.std() - 0.25 * 255 / 3**0.5) < 2


def test_the_record_says_all(blob):
    drawn = draw_distortions(FAR, 0, 0, np.arange(50))
    for row in range(50):
        distortion = Distortion.decode(drawn.at(row).encode())
        assert len(distortion.encode()) == DISTORTION_BYTES
        assert Distortion.decode(distortion.encode()) == distortion
        again = distort(blob, Distortion.decode(distortion.encode()))
        np.testing.assert_array_equal(np.asarray(again), np.asarray(distort(blob, distortion)))


def test_the_record_is_fixed_for_ever():
    distortion = Distortion(-10.5, 0.125, 0.2, -0.2, 0.0, 0.25, -0.5, 0.75, 0.125, 0.25)
    assert distortion.encode().hex(" ") == "6b a0 94 6c 80 c0 46 48"


@given(st.builds(lambda values: Distortion(*values), st.tuples(*[st.floats(-1, 1)] * 6, *[st.floats(0, 1)] * 4)))
def test_what_is_within_the_limits_of_the_config_fits_into_the_record(shares):
    limits = DistortionConfig(rotate=45, shear=0.49, scale=1, shift=0.49, stroke=0.85, blur=1.8, erase=0.45, noise=0.45)
    amounts = {f.name: getattr(shares, f.name) * getattr(limits, f.name.split("_")[0]) for f in fields(Distortion)}
    exact = Distortion(**amounts)
    rounded = Distortion.decode(exact.encode())
    steps = {"rotate": 2, "shear": 256, "scale": 100, "shift": 256, "stroke": 8, "blur": 8, "erase": 32, "noise": 32}
    for name, amount in amounts.items():
        assert abs(getattr(rounded, name) - amount) <= 0.5 / steps[name.split("_")[0]] + 1e-12


def test_drawn_amounts_fill_the_ranges_of_the_config_and_are_independent():
    drawn = draw_distortions(FAR, seed=3, epoch=1, ordinals=np.arange(20_000)).amounts
    for name, values in drawn.items():
        limit = getattr(FAR, name.split("_")[0])
        low = 0 if name in ("blur", "erase", "noise") else -limit
        assert low <= values.min() < low + 0.01 * (limit - low)
        assert limit - 0.01 * (limit - low) < values.max() <= limit
    correlation = np.corrcoef(np.stack(list(drawn.values()))) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 5 / 20_000**0.5


def test_a_distortion_depends_on_seed_epoch_and_sample_and_not_on_its_batch():
    together = draw_distortions(FAR, 1, 2, np.arange(9))
    assert together.at(4) == draw_distortions(FAR, 1, 2, np.array([4])).at(0)
    others = [draw_distortions(FAR, seed, epoch, np.array([4])).at(0) for seed, epoch in ((2, 2), (1, 3))]
    assert together.at(4) not in others


@pytest.mark.parametrize("values", [{"rotate": 50}, {"stroke": 0.9}, {"erase": -0.1}, {"turn": 3}])
def test_ranges_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        DistortionConfig(**values)
