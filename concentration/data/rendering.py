"""Makes views of many square images at once, with torch on any device.

The result is what `views.decode_view` makes of each image with Pillow, up to rounding. The steps and their order are those of
`distortions.distort` and `photometry.change_colours`, and depend on nothing but the views' records and random bytes.

Shapes: B batch; C channels (1 if all images are grey, otherwise 3); S the side of an image; R random bytes of a view: none, or 4
that say what is erased and then those of the noise, S*S if all images' files are grey and otherwise 3*S*S.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, max_pool2d

from concentration.data.distortions import DISTORTION_BYTES, ERASE_BYTES, WIDE_STEPS, are_distorted, draw_bytes
from concentration.data.photometry import LUMA, list_lights
from concentration.data.views import FACTOR_STEPS

#: Pillow approximates a Gaussian by so many box filters in turn; beyond an edge they read the pixels of the edge.
_NUM_BOXES = 3


class _Amounts(NamedTuple):
    """The decoded records of a batch, each amount (B,): see `distortions.Distortion` and `views.View`."""

    rotate: Tensor
    shear: Tensor
    scale_x: Tensor
    scale_y: Tensor
    shift_x: Tensor
    shift_y: Tensor
    stroke: Tensor
    blur: Tensor
    erase: Tensor
    noise: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    light: Tensor


def render(pixel_BCSS: Tensor, record_BV: Tensor, random_BR: Tensor) -> Tensor:
    """The views of a batch, (B, 3, S, S) uint8.

    Args:
        pixel_BCSS: uint8, the images.
        record_BV: (B, 13) uint8, the views' records, which must show whole images (`view_records.encode_views`).
        random_BR: uint8, from `draw_random`; (B, 0) if no view erases anything or adds noise.
    """
    amounts = _decode(record_BV)
    view = _move(pixel_BCSS.float(), amounts)
    view = _change_strokes(view, amounts.stroke)
    view = _blur(view, amounts.blur)
    if random_BR.shape[1]:
        view = _erase(view, amounts.erase, random_BR[:, :ERASE_BYTES])
        view = _add_noise(view, amounts.noise, random_BR[:, ERASE_BYTES:])
    view = torch.where(_wide(amounts.flip), view.flip(-1), view)
    view = _change_colours(view, amounts)
    return view.to(torch.uint8).expand(-1, 3, -1, -1)


def draw_random(record_BV: np.ndarray, is_grey_B: np.ndarray, size: int) -> np.ndarray:
    """The random bytes of each record, (B, R) uint8; zeros if a record has no distortion.

    Args:
        record_BV: (B, 13) uint8, the views' records.
        is_grey_B: bool, whether the image's file is grey (`views.decode_view`). The noise of a grey file is grey, also in a batch
            with files in colour.
        size: S.
    """
    num_channels = 1 if is_grey_B.all() else 3
    none = bytes(ERASE_BYTES + num_channels * size**2)
    drawn = []
    for record, is_distorted, is_grey in zip(record_BV, are_distorted(record_BV), is_grey_B, strict=True):
        if not is_distorted:
            drawn.append(none)
            continue
        random_bytes = draw_bytes(bytes(record[:DISTORTION_BYTES]), size**2 * (1 if is_grey else 3))
        if is_grey and num_channels == 3:
            grey = np.frombuffer(random_bytes[ERASE_BYTES:], dtype=np.uint8)
            random_bytes = random_bytes[:ERASE_BYTES] + grey.repeat(num_channels).tobytes()
        drawn.append(random_bytes)
    return np.frombuffer(bytearray(b"".join(drawn)), dtype=np.uint8).reshape(len(drawn), len(none))


def _decode(record_BV: Tensor) -> _Amounts:
    """Decodes the records of a batch, as `View.decode` and `Distortion.decode` do one by one."""
    byte_BV = record_BV.float()
    is_distorted_B = are_distorted(record_BV)
    steps = _load_constants(record_BV.device).wide_steps
    wide_BA = torch.where(is_distorted_B[:, None], (byte_BV[:, : len(steps)] - 128) / steps, 0)
    stroke_blur_B, erase_noise_B = record_BV[:, len(steps) : DISTORTION_BYTES].unbind(1)
    stroke_B, blur_B = (stroke_blur_B >> 4).float() - 8, stroke_blur_B & 15
    narrow = (stroke_B / 8, blur_B / 8, (erase_noise_B >> 4) / 32, (erase_noise_B & 15) / 32)
    flip_brightness_B, contrast_B, saturation_B, light_B, _ = record_BV[:, DISTORTION_BYTES:].unbind(1)
    return _Amounts(
        *wide_BA.unbind(1),
        *(torch.where(is_distorted_B, amount, 0) for amount in narrow),
        flip=flip_brightness_B >= 128,
        brightness=(flip_brightness_B & 127) / FACTOR_STEPS,
        contrast=(contrast_B & 127) / FACTOR_STEPS,
        saturation=1 + saturation_B.view(torch.int8) / FACTOR_STEPS,
        light=light_B.long(),
    )


class _Constants(NamedTuple):
    """`WIDE_STEPS`, `LUMA` and the lights as float32 tensors on a device."""

    wide_steps: Tensor
    luma: Tensor
    lights: Tensor


@functools.cache  # copying them to a GPU in every step would wait until the GPU has done all that it was given
def _load_constants(device: torch.device) -> _Constants:
    values = (list(WIDE_STEPS.values()), LUMA, list_lights())
    return _Constants(*(torch.tensor(value, dtype=torch.float32, device=device) for value in values))


def _wide(amount_B: Tensor) -> Tensor:
    """(B, 1, 1, 1), which broadcasts against images (B, C, S, S)."""
    return amount_B[:, None, None, None]


def _move(view: Tensor, amounts: _Amounts) -> Tensor:
    """Applies rotation, shear, scale and shift with bilinear interpolation, black outside: see `distortions._build_matrix`."""
    size = view.shape[-1]
    angle = amounts.rotate.deg2rad()
    cosine, sine = angle.cos(), angle.sin()
    shrink_x, shrink_y = (-amounts.scale_x).exp(), (-amounts.scale_y).exp()
    to_x = torch.stack([shrink_x * (cosine + amounts.shear * sine), shrink_x * (-sine + amounts.shear * cosine)], 1)
    to_y = torch.stack([shrink_y * sine, shrink_y * cosine], 1)
    matrix_B22 = torch.stack([to_x, to_y], 1)
    shift_B2 = torch.stack([amounts.shift_x, amounts.shift_y], 1)
    # Coordinates as `grid_sample` takes them: from -1 at one edge to 1 at the other.
    along = (torch.arange(size, device=view.device) + 0.5) * (2 / size) - 1
    place_PP2 = torch.stack(torch.meshgrid(along, along, indexing="xy"), -1)
    from_BPP2 = torch.einsum("bij,yxbj->byxi", matrix_B22, place_PP2[:, :, None] - 2 * shift_B2)
    moved = grid_sample(view, from_BPP2, mode="bilinear", padding_mode="border", align_corners=False)
    is_inside = ((from_BPP2 >= -1) & (from_BPP2 < 1)).all(-1)
    return _cut(moved) * is_inside[:, None]


def _change_strokes(view: Tensor, stroke_B: Tensor) -> Tensor:
    """Makes strokes of light ink bolder where `stroke_B` is positive, and thinner where it is negative."""
    grown = max_pool2d(view, 3, stride=1, padding=1)
    shrunk = -max_pool2d(-view, 3, stride=1, padding=1)
    towards = torch.where(_wide(stroke_B > 0), grown, shrunk)
    return _cut(torch.lerp(view, towards, _wide(stroke_B.abs())))


def _blur(view: Tensor, sigma_B: Tensor) -> Tensor:
    """Blurs as Pillow's GaussianBlur does: by three box filters along each axis, whose variances add up to that of the Gaussian.

    A box has `whole` full pixels on each side of its centre (weight `inner`), and one more on either side (weight `outer`).
    """
    size = view.shape[-1]
    variance = sigma_B.square() / _NUM_BOXES
    whole = (((12 * variance + 1).sqrt() - 1) / 2 + 1e-6).floor()
    above = whole + 1
    part = (2 * whole + 1) * (whole * above - 3 * variance) / (6 * (variance - above.square()))
    inner = 1 / (2 * (whole + part) + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    distance = torch.arange(-size, 2 * size, device=view.device) - torch.arange(size, device=view.device)[:, None]
    distance = distance.abs()  # from each pixel to all of its row, which goes on for a side's length beyond both edges
    inner, outer, whole = (amount[:, None, None] for amount in (inner, outer, whole))
    box_B = torch.where(distance <= whole, inner, 0) + torch.where(distance == whole + 1, outer, 0)
    before, inside, after = box_B.split(size, dim=2)
    box_BSS = inside.clone()
    box_BSS[:, :, 0] += before.sum(2)
    box_BSS[:, :, -1] += after.sum(2)
    blur_B1SS = (box_BSS @ box_BSS @ box_BSS)[:, None]
    return (blur_B1SS @ view @ blur_B1SS.mT).round()


def _erase(view: Tensor, share_B: Tensor, random_B4: Tensor) -> Tensor:
    """Overwrites a rectangle of each image with one grey, as `distortions._erase` does."""
    size = view.shape[-1]
    aspect, x, y, grey = random_B4.double().unbind(1)
    stretch, side = 2 ** (aspect / 255 - 0.5), size * share_B.double().sqrt()
    width, height = ((side * factor).round().clamp(max=size) for factor in (stretch, 1 / stretch))
    left, top = ((size - width) * x / 255).round(), ((size - height) * y / 255).round()
    place = torch.arange(size, device=view.device)
    is_column = (place >= left[:, None]) & (place < (left + width)[:, None])
    is_row = (place >= top[:, None]) & (place < (top + height)[:, None])
    is_erased = (is_row[:, :, None] & is_column[:, None, :])[:, None]
    return torch.where(is_erased, _wide(grey.float()), view)


def _add_noise(view: Tensor, noise_B: Tensor, random_BP: Tensor) -> Tensor:
    """Adds noise. Grey noise is added to every channel; noise in three channels gives a grey view three channels."""
    noise = (random_BP.float() / 127.5 - 1).view(len(view), *view.shape[2:], -1).permute(0, 3, 1, 2)
    return _cut(view + noise * _wide(255 * noise_B)).clamp(0, 255)


def _change_colours(view: Tensor, amounts: _Amounts) -> Tensor:
    """Changes saturation, contrast, brightness and light as `photometry.change_colours` does; gives (B, 3, S, S)."""
    constants = _load_constants(view.device)
    changed = view
    if view.shape[1] == 3:
        luma = torch.einsum("bchw,c->bhw", view, constants.luma)[:, None]
        changed = (view - luma) * _wide(amounts.saturation) + luma
    mean = changed.mean((1, 2, 3), keepdim=True)
    changed = ((changed - mean) * _wide(amounts.contrast) + mean) * _wide(amounts.brightness)
    changed = changed + constants.lights[amounts.light][:, :, None, None]
    factors = torch.stack([amounts.brightness, amounts.contrast, amounts.saturation])
    is_changed = (factors != 1).any(0) | (amounts.light != 0)
    return torch.where(_wide(is_changed), _cut(changed).clamp(0, 255), view)


def _cut(view: Tensor) -> Tensor:
    """Rounds down to whole levels, as a conversion to 8 bits does.

    The small addition keeps a level that float32 rounded to just below a whole number from losing one.
    """
    return (view + 1e-3).floor()
