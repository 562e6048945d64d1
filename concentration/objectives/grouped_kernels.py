"""Triton kernels over the logits of several verticals side by side; the arithmetic is that of `fused_block`.

    rows         one program per sample and vertical: norm, loss, <h, x> and sum g, listed classes included
    slopes       one program per tile: writes the derivative over the logits, and sums over samples for every class
    listed       one program per sample: what the listed classes add to both

Sums over samples are added atomically, so equal inputs give equal results only up to rounding.

Shapes and symbols: as in `vertical_groups` and `fused_block`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from concentration.objectives.fused_block import EPSILON
from concentration.objectives.triton_functions import apply_pace, softplus, sum_same_class
from concentration.objectives.vertical_groups import TILE_CLASSES, Group

#: As in `fused_block_triton`, with the warps of a program: the fastest of those tried on an H200, as is `TILE_CLASSES`.
_ROW_BLOCK, _ROW_WARPS = 2048, 8
_TILE_ROWS, _TILES, _TILE_WARPS = 16, 4, 4


class RowSums(NamedTuple):
    """For every sample in every vertical, unweighted: 1 / norm, loss, <h, x> and sum g; and the raw logits of listed classes."""

    inverse_norm_BM: Tensor
    loss_BM: Tensor
    dot_BM: Tensor
    sum_BM: Tensor
    listed_BK: Tensor


class ClassSums(NamedTuple):
    """Derivatives with respect to what each class has of its own, summed over samples; None where it has none."""

    bias_V: Tensor
    gamma_V: Tensor | None
    offset_V: Tensor | None


def sum_rows(logits_BP: Tensor, group: Group) -> RowSums:
    """The sums of every sample in every vertical; `logits_BP` are the matrix products alone, biases are added here."""
    num_samples, num_listed = group.targets.index_BK.shape
    layout = group.layout
    found = [logits_BP.new_empty(num_samples, len(layout.sizes), dtype=torch.float32) for _ in range(4)]
    listed_BK = torch.empty_like(group.targets.probability_BK, dtype=torch.float32)
    _rows[(num_samples, len(layout.sizes))](
        logits_BP, layout.class_start_M, layout.column_start_M, layout.size_M, *_pace_of(group), _background_of(group),
        *_listed_of(group), *found, listed_BK, logits_BP.stride(0), num_listed, len(layout.sizes), layout.first_class,
        **_form_of(group), EPSILON=EPSILON, BLOCK=_ROW_BLOCK, BLOCK_K=triton.next_power_of_2(num_listed),
        num_warps=_ROW_WARPS,
    )  # fmt: skip
    return RowSums(*found, listed_BK)


def replace_by_slopes(logits_BP: Tensor, group: Group, sums: RowSums, weight_BM: Tensor, scale_BM: Tensor) -> ClassSums:
    """Overwrites the logits by the derivatives of the loss with respect to them, without the factor `scale_BM`."""
    layout = group.layout
    num_samples, num_listed = group.targets.index_BK.shape
    bias_V = torch.zeros_like(group.bias_V)
    gamma_V = torch.zeros_like(group.gamma) if group.gamma_form == 2 else None
    offset_V = torch.zeros_like(group.offset) if group.offset_form == 2 else None
    by_class = [bias_V if t is None else t for t in (gamma_V, offset_V, bias_V)]
    pull_BM = sums.dot_BM * sums.inverse_norm_BM.square()
    form = _form_of(group)
    grid = (len(layout.tile_vertical_T), triton.cdiv(num_samples, _TILE_ROWS * _TILES))
    _slopes[grid](
        logits_BP, layout.class_start_M, layout.column_start_M, layout.size_M, layout.tile_vertical_T, layout.tile_first_T,
        *_pace_of(group), _background_of(group), sums.inverse_norm_BM, pull_BM, weight_BM, scale_BM, *by_class,
        logits_BP.stride(0), num_samples, len(layout.sizes), **form, ROWS=_TILE_ROWS, CLASSES=TILE_CLASSES, TILES=_TILES,
        num_warps=_TILE_WARPS,
    )  # fmt: skip
    _, gamma, _, class_weight_V = _pace_of(group)
    _listed[(num_samples,)](
        logits_BP, layout.class_start_M, layout.column_start_M, layout.vertical_V, gamma, class_weight_V,
        *_listed_of(group), sums.listed_BK, sums.inverse_norm_BM, weight_BM, scale_BM, *by_class,
        logits_BP.stride(0), num_listed, len(layout.sizes), layout.first_class, layout.num_classes,
        GAMMA=form["GAMMA"], OFFSET=form["OFFSET"], HAS_CLASS_WEIGHT=form["HAS_CLASS_WEIGHT"],
        BLOCK_K=triton.next_power_of_2(num_listed),
    )  # fmt: skip
    return ClassSums(bias_V, gamma_V, offset_V)


def _pace_of(group: Group) -> tuple[Tensor, ...]:
    """Bias, gamma, offset and class weights; where there is none, the bias, whose pointer is then never followed."""
    bias_V = group.bias_V
    return bias_V, *(bias_V if t is None else t for t in (group.gamma, group.offset, group.class_weight_V))


def _background_of(group: Group) -> Tensor:
    return group.bias_V if group.background_BM is None else group.background_BM


def _listed_of(group: Group) -> tuple[Tensor, Tensor]:
    return group.targets.index_BK.contiguous(), group.targets.probability_BK.float().contiguous()


def _form_of(group: Group) -> dict[str, int | bool]:
    return {
        "GAMMA": group.gamma_form,
        "OFFSET": group.offset_form,
        "HAS_CLASS_WEIGHT": group.class_weight_V is not None,
        "HAS_BACKGROUND": group.background_BM is not None,
    }


@triton.jit
def _load_logits(x_ptr, bias_ptr, column, mask):
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return x + tl.load(bias_ptr + column, mask=mask, other=0.0)


@triton.jit
def _rows(
    x_ptr, class_start_ptr, column_start_ptr, size_ptr, bias_ptr, gamma_ptr, offset_ptr, class_weight_ptr, background_ptr,
    index_ptr, probability_ptr, inverse_norm_ptr, loss_ptr, dot_ptr, sum_ptr, listed_ptr, stride, num_listed, num_verticals,
    first_class, GAMMA: tl.constexpr, OFFSET: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
    EPSILON: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vertical = tl.program_id(1)
    class_start = tl.load(class_start_ptr + vertical)
    size = tl.load(size_ptr + vertical)
    x_ptr += row * stride + tl.load(column_start_ptr + vertical)
    bias_ptr += class_start
    class_weight_ptr += class_start
    gamma_ptr += class_start if GAMMA == 2 else vertical
    offset_ptr += class_start if OFFSET == 2 else vertical
    place_of_row = row * num_verticals + vertical
    background = 0.0
    if HAS_BACKGROUND:
        background = tl.load(background_ptr + place_of_row)
    inverse_norm = 1.0
    if GAMMA > 0:
        square = tl.zeros([BLOCK], tl.float32)
        for first in range(0, size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mask = column < size
            x = _load_logits(x_ptr, bias_ptr, column, mask)
            square += x * x
        inverse_norm = 1.0 / tl.sqrt(tl.sum(square) + size * EPSILON)
    loss = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < size
        x = _load_logits(x_ptr, bias_ptr, column, mask)
        y, gamma = apply_pace(x, inverse_norm, column, mask, gamma_ptr, offset_ptr, GAMMA, OFFSET)
        weight = tl.where(mask, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            weight = tl.load(class_weight_ptr + column, mask=mask, other=0.0)
        loss += weight * (softplus(y) - background * y)
        g = weight * (tl.sigmoid(y) - background)
        dot += g * gamma * x
        total += g
    place = tl.arange(0, BLOCK_K)
    first_listed = row * num_listed
    index = tl.load(index_ptr + first_listed + place, mask=place < num_listed, other=-1) - (first_class + class_start)
    is_here = (index >= 0) & (index < size)
    z = tl.load(probability_ptr + first_listed + place, mask=is_here, other=0.0)
    x = _load_logits(x_ptr, bias_ptr, index, is_here)
    y, gamma = apply_pace(x, inverse_norm, index, is_here, gamma_ptr, offset_ptr, GAMMA, OFFSET)
    if HAS_CLASS_WEIGHT:
        z *= tl.load(class_weight_ptr + index, mask=is_here, other=0.0)
    tl.store(listed_ptr + first_listed + place, x, mask=is_here)
    tl.store(inverse_norm_ptr + place_of_row, inverse_norm)
    tl.store(loss_ptr + place_of_row, tl.sum(loss) - tl.sum(z * y))
    tl.store(dot_ptr + place_of_row, tl.sum(dot) - tl.sum(z * gamma * x))
    tl.store(sum_ptr + place_of_row, tl.sum(total) - tl.sum(z))


@triton.jit
def _slopes(
    x_ptr, class_start_ptr, column_start_ptr, size_ptr, tile_vertical_ptr, tile_first_ptr, bias_ptr, gamma_ptr, offset_ptr,
    class_weight_ptr, background_ptr, inverse_norm_ptr, pull_ptr, weight_ptr, scale_ptr, gamma_sum_ptr, offset_sum_ptr,
    bias_sum_ptr, stride, num_rows, num_verticals, GAMMA: tl.constexpr, OFFSET: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_BACKGROUND: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    vertical = tl.load(tile_vertical_ptr + tl.program_id(0))
    class_start = tl.load(class_start_ptr + vertical)
    column = (tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, CLASSES))[None, :]
    is_class = column < tl.load(size_ptr + vertical)
    x_ptr += tl.load(column_start_ptr + vertical)
    class_weight_ptr += class_start
    gamma_ptr += class_start if GAMMA == 2 else vertical
    offset_ptr += class_start if OFFSET == 2 else vertical
    bias = tl.load(bias_ptr + class_start + column, mask=is_class, other=0.0)
    gamma_sum = tl.zeros([1, CLASSES], tl.float32)
    offset_sum = tl.zeros([1, CLASSES], tl.float32)
    bias_sum = tl.zeros([1, CLASSES], tl.float32)
    for tile in range(TILES):
        row = ((tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        is_row = row < num_rows
        mask = is_row & is_class
        place_of_row = row * num_verticals + vertical
        inverse_norm = tl.load(inverse_norm_ptr + place_of_row, mask=is_row, other=0.0)
        weight = tl.load(weight_ptr + place_of_row, mask=is_row, other=0.0)
        x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32) + bias
        y, gamma = apply_pace(x, inverse_norm, column, is_class, gamma_ptr, offset_ptr, GAMMA, OFFSET)
        g = tl.sigmoid(y)
        if HAS_BACKGROUND:
            g -= tl.load(background_ptr + place_of_row, mask=is_row, other=0.0)
        if HAS_CLASS_WEIGHT:
            g *= tl.load(class_weight_ptr + column, mask=is_class, other=0.0)
        slope = g * gamma
        if GAMMA > 0:
            slope -= x * tl.load(pull_ptr + place_of_row, mask=is_row, other=0.0)
        tl.store(x_ptr + row * stride + column, slope, mask=mask)
        if GAMMA == 2:
            gamma_sum += tl.sum(weight * inverse_norm * g * x, 0, keep_dims=True)
        if OFFSET == 2:
            offset_sum += tl.sum(weight * g, 0, keep_dims=True)
        bias_sum += tl.sum(tl.load(scale_ptr + place_of_row, mask=is_row, other=0.0) * slope, 0, keep_dims=True)
    if GAMMA == 2:
        tl.atomic_add(gamma_sum_ptr + class_start + column, gamma_sum, mask=is_class, sem="relaxed")
    if OFFSET == 2:
        tl.atomic_add(offset_sum_ptr + class_start + column, offset_sum, mask=is_class, sem="relaxed")
    tl.atomic_add(bias_sum_ptr + class_start + column, bias_sum, mask=is_class, sem="relaxed")


@triton.jit
def _listed(
    slope_ptr, class_start_ptr, column_start_ptr, vertical_ptr, gamma_ptr, class_weight_ptr, index_ptr, probability_ptr,
    listed_ptr, inverse_norm_ptr, weight_ptr, scale_ptr, gamma_sum_ptr, offset_sum_ptr, bias_sum_ptr, stride, num_listed,
    num_verticals, first_class, num_classes, GAMMA: tl.constexpr, OFFSET: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    first = row * num_listed
    listed_index = tl.load(index_ptr + first + place, mask=place < num_listed, other=-1)
    index = listed_index - first_class
    z = tl.load(probability_ptr + first + place, mask=place < num_listed, other=0.0)
    mask = (index >= 0) & (index < num_classes) & (z != 0.0)
    vertical = tl.load(vertical_ptr + index, mask=mask, other=0)
    place_of_row = row * num_verticals + vertical
    together = sum_same_class(listed_index, index_ptr + first, probability_ptr + first, num_listed)
    gamma = tl.full([BLOCK_K], 1.0, tl.float32)
    if HAS_CLASS_WEIGHT:
        class_weight = tl.load(class_weight_ptr + index, mask=mask, other=0.0)
        z *= class_weight
        together *= class_weight
    weight = tl.load(weight_ptr + place_of_row, mask=mask, other=0.0)
    if GAMMA == 2:
        gamma = tl.load(gamma_ptr + index, mask=mask, other=0.0)
        x = tl.load(listed_ptr + first + place, mask=mask, other=0.0)
        factor = weight * tl.load(inverse_norm_ptr + place_of_row, mask=mask, other=0.0)
        tl.atomic_add(gamma_sum_ptr + index, -factor * z * x, mask=mask, sem="relaxed")
    if OFFSET == 2:
        tl.atomic_add(offset_sum_ptr + index, -weight * z, mask=mask, sem="relaxed")
    scale = tl.load(scale_ptr + place_of_row, mask=mask, other=0.0)
    tl.atomic_add(bias_sum_ptr + index, -scale * z * gamma, mask=mask, sem="relaxed")
    start = tl.load(column_start_ptr + vertical, mask=mask, other=0)
    inside = index - tl.load(class_start_ptr + vertical, mask=mask, other=0)
    address = slope_ptr + row * stride + start + inside
    slope = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all places of a class read before one writes
    tl.store(address, slope - together * gamma, mask=mask)
