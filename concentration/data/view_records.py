"""Encodes the views of a batch of square images at once, as `View.encode` does image by image.

Shapes: B batch.
"""

import numpy as np

from concentration.data.distortions import WIDE_STEPS, DrawnDistortions, are_distorted
from concentration.data.views import FACTOR_STEPS, CentreView, DrawnViews, StoredViews
from concentration.errors import ConfigError
from concentration.packed_targets import VIEW_BYTES

_CENTRE = np.frombuffer(CentreView().at(0, (1, 1)).encode(), dtype=np.uint8)


def encode_views(views: DrawnViews | StoredViews | CentreView, num_samples: int) -> np.ndarray:
    """The records of a batch of views that show the whole of square images, (B, 13) uint8.

    A stored record of zeros, which stands for an image that could not be decoded, stays so.

    Raises:
        ConfigError: a view is a crop, or resized in another way than bilinear.
    """
    if isinstance(views, CentreView):
        return np.tile(_CENTRE, (num_samples, 1))
    if isinstance(views, StoredViews):
        record_BV = views.record_BV
        is_crop_B = ~are_distorted(record_BV) & (record_BV[:, :8] != _CENTRE[:8]).any(axis=1) & record_BV.any(axis=1)
        _check_whole(is_crop_B | record_BV[:, 12].astype(bool), "stored with the targets")
        return record_BV
    _check_whole((views.area != 1) | (views.aspect != 1) | views.interpolation.astype(bool), "drawn by data.view")
    record_BV = np.empty((num_samples, VIEW_BYTES), dtype=np.uint8)
    is_distorted = views.distortions is not None
    record_BV[:, :8] = _encode_distortions(views.distortions) if is_distorted else _CENTRE[:8]
    record_BV[:, 8] = views.flip.astype(int) << 7 | _count_steps(views.brightness)
    record_BV[:, 9] = is_distorted << 7 | _count_steps(views.contrast)
    saturation_B = _count_steps(views.saturation, at_most=127 + FACTOR_STEPS) - FACTOR_STEPS
    record_BV[:, 10] = saturation_B.astype(np.int8).view(np.uint8)
    record_BV[:, 11], record_BV[:, 12] = views.light, views.interpolation
    return record_BV


def _encode_distortions(distortions: DrawnDistortions) -> np.ndarray:
    """(B, 8) uint8: each distortion as `Distortion.encode` writes it."""
    amounts = distortions.amounts
    wide = [128 + np.rint(amounts[name] * steps).astype(int) for name, steps in WIDE_STEPS.items()]
    stroke, blur = 8 + np.rint(amounts["stroke"] * 8).astype(int), np.rint(amounts["blur"] * 8).astype(int)
    erase, noise = (np.rint(amounts[name] * 32).astype(int) for name in ("erase", "noise"))
    return np.stack([*wide, stroke << 4 | blur, erase << 4 | noise], axis=1).astype(np.uint8)


def _count_steps(factor_B: np.ndarray, at_most: int = 127) -> np.ndarray:
    """(B,) int64: factors in steps of 1/64."""
    return np.minimum(at_most, np.rint(factor_B * FACTOR_STEPS).astype(int))


def _check_whole(is_other_B: np.ndarray, origin: str) -> None:
    """Raises: ConfigError if any of these views does not show a whole image; `origin` says where they come from."""
    if is_other_B.any():
        raise ConfigError(
            f"{is_other_B.sum()} of {len(is_other_B)} views {origin} are crops or resized in other ways than bilinear, and with "
            "trainer.resident=true images are seen whole; set the view's crop_area, crop_aspect and interpolation to 1, 1 and "
            "bilinear, or trainer.resident=false"
        )
