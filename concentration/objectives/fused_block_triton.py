"""The arithmetic of `fused_block` as Triton kernels, for CUDA: logits are read from and written to the GPU's memory once.

A block's logits come from a matrix product and are still in the second-level cache when these kernels read them again:

    norms        one program per sample: the sum of squares
    rows         one program per sample: the loss, <h, x> and sum g, listed classes included
    slopes       one program per tile: writes the derivative over the logits, and sums over samples for every class
    listed       one program per sample: what the listed classes add to both

Sums over samples are added atomically, so on a GPU equal inputs give equal results only up to rounding.

Shapes and symbols: as in `fused_block`; R samples of a block, V classes, K listed classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from concentration.objectives.fused_block import (
    EPSILON,
    Block,
    ClassRange,
    HeadParameters,
    VerticalTargets,
    multiply_weights,
)
from concentration.objectives.triton_functions import apply_pace, softplus, sum_same_class

#: Classes that a program of `norms` and `rows` takes at a time.
_ROW_BLOCK = 2048
#: Samples and classes of a tile, and the tiles (of the same classes) that one program of `slopes` takes.
_TILE_ROWS, _TILE_CLASSES, _TILES = 16, 128, 4


def compute_block(
    logits_RV: Tensor,
    vertical: HeadParameters,
    targets: VerticalTargets,
    classes: ClassRange,
    upstream_R: Tensor | None,
    wants_gradients: bool,
) -> Block:
    """As `fused_block.compute_block`, for logits of 32 bits or less."""
    num_rows, num_classes = logits_RV.shape
    gamma, offset = vertical.gamma, vertical.offset
    form = {
        "GAMMA": 0 if gamma is None else 1 + gamma.ndim,  # see `triton_functions`
        "OFFSET": 0 if offset is None else 1 + offset.ndim,
        "HAS_CLASS_WEIGHT": targets.class_weight_V is not None,
        "HAS_BACKGROUND": targets.background_B1 is not None,
    }
    nothing = logits_RV.new_empty(0, dtype=torch.float32)  # its pointer is never followed
    pace = [nothing if t is None else t.float().contiguous() for t in (gamma, offset, targets.class_weight_V)]
    background_R = nothing if targets.background_B1 is None else targets.background_B1[:, 0].float().contiguous()
    index_RK, probability_RK = targets.index_BK.contiguous(), targets.probability_BK.float().contiguous()
    num_listed = index_RK.shape[1]
    row_grid, listed_block = (num_rows,), triton.next_power_of_2(num_listed)

    inverse_norm_R = logits_RV.new_ones(num_rows, dtype=torch.float32)
    if gamma is not None:
        square_R = torch.empty_like(inverse_norm_R)
        _norms[row_grid](logits_RV, square_R, logits_RV.stride(0), num_classes, BLOCK=_ROW_BLOCK)
        if classes.sum_over_shards is not None:
            square_R = classes.sum_over_shards(square_R)
        inverse_norm_R = square_R.add_(classes.vertical_size * EPSILON).rsqrt_()

    loss_R, dot_R, sum_R = (torch.empty_like(inverse_norm_R) for _ in range(3))
    listed_RK = torch.empty_like(probability_RK)
    common = (logits_RV, inverse_norm_R, *pace, background_R)
    _rows[row_grid](
        *common, index_RK, probability_RK, loss_R, dot_R, sum_R, listed_RK, logits_RV.stride(0), num_classes, num_listed,
        **form, BLOCK=_ROW_BLOCK, BLOCK_K=listed_block,
    )  # fmt: skip
    if targets.weight_B is not None:
        loss_R = loss_R * targets.weight_B
    if not wants_gradients:
        return Block(loss_R)

    weight_R = multiply_weights(targets.weight_B, upstream_R, like=loss_R)
    if classes.sum_over_shards is not None:
        dot_R, sum_R = classes.sum_over_shards(torch.stack([dot_R, sum_R])).unbind()
    scale_R = weight_R * inverse_norm_R
    gamma_sum = None if gamma is None else torch.zeros_like(pace[0]) if gamma.ndim else torch.dot(dot_R, scale_R)
    offset_sum = None if offset is None else torch.zeros_like(pace[1]) if offset.ndim else torch.dot(sum_R, weight_R)
    if gamma is not None and not gamma.ndim:
        scale_R = scale_R * pace[0]
    pull_R = dot_R * inverse_norm_R.square()
    bias_V = torch.zeros(num_classes, dtype=torch.float32, device=logits_RV.device)
    # NOTE: a slope may be far below what float16 can hold.
    slope_RV = torch.empty_like(logits_RV, dtype=torch.bfloat16) if logits_RV.dtype == torch.float16 else logits_RV
    by_sample = (pull_R, weight_R, scale_R)
    sums = (nothing if gamma_sum is None else gamma_sum, nothing if offset_sum is None else offset_sum, bias_V)
    grid = (triton.cdiv(num_classes, _TILE_CLASSES), triton.cdiv(num_rows, _TILE_ROWS * _TILES))
    _slopes[grid](
        *common, *by_sample, slope_RV, *sums, logits_RV.stride(0), num_rows, num_classes,
        **form, ROWS=_TILE_ROWS, CLASSES=_TILE_CLASSES, TILES=_TILES,
    )  # fmt: skip
    _listed[row_grid](
        inverse_norm_R, pace[0], pace[2], index_RK, probability_RK, listed_RK, weight_R, scale_R, slope_RV, *sums,
        logits_RV.stride(0), num_listed,
        GAMMA=form["GAMMA"], OFFSET=form["OFFSET"], HAS_CLASS_WEIGHT=form["HAS_CLASS_WEIGHT"], BLOCK_K=listed_block,
    )  # fmt: skip
    return Block(loss_R, slope_RV, scale_R, gamma_sum, offset_sum, bias_V)


def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """As `fused_block.scale_in_place`; only the device knows whether the factor is 1."""
    flat = tensor.view(-1)
    _scale[(triton.cdiv(len(flat), 4096),)](flat, factor, len(flat), BLOCK=4096)


@triton.jit
def _norms(x_ptr, square_ptr, stride, num_classes, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + column, mask=column < num_classes, other=0.0).to(tl.float32)
        square += x * x
    tl.store(square_ptr + row, tl.sum(square))


@triton.jit
def _rows(
    x_ptr, inverse_norm_ptr, gamma_ptr, offset_ptr, class_weight_ptr, background_ptr, index_ptr, probability_ptr,
    loss_ptr, dot_ptr, sum_ptr, listed_ptr, stride, num_classes, num_listed,
    GAMMA: tl.constexpr, OFFSET: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse_norm = tl.load(inverse_norm_ptr + row)
    background = 0.0
    if HAS_BACKGROUND:
        background = tl.load(background_ptr + row)
    loss = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < num_classes
        x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        y, gamma = apply_pace(x, inverse_norm, column, mask, gamma_ptr, offset_ptr, GAMMA, OFFSET)
        weight = tl.where(mask, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            weight = tl.load(class_weight_ptr + column, mask=mask, other=0.0)
        loss += weight * (softplus(y) - background * y)
        g = weight * (tl.sigmoid(y) - background)
        dot += g * gamma * x
        total += g
    place = tl.arange(0, BLOCK_K)
    is_listed = place < num_listed
    index = tl.load(index_ptr + row * num_listed + place, mask=is_listed, other=0)
    z = tl.load(probability_ptr + row * num_listed + place, mask=is_listed, other=0.0)
    is_listed = z != 0.0  # classes of other verticals have z = 0, and cost nothing
    x = tl.load(x_ptr + row * stride + index, mask=is_listed, other=0.0).to(tl.float32)
    y, gamma = apply_pace(x, inverse_norm, index, is_listed, gamma_ptr, offset_ptr, GAMMA, OFFSET)
    if HAS_CLASS_WEIGHT:
        z *= tl.load(class_weight_ptr + index, mask=is_listed, other=0.0)
    tl.store(listed_ptr + row * num_listed + place, x, mask=place < num_listed)
    tl.store(loss_ptr + row, tl.sum(loss) - tl.sum(z * y))
    tl.store(dot_ptr + row, tl.sum(dot) - tl.sum(z * gamma * x))
    tl.store(sum_ptr + row, tl.sum(total) - tl.sum(z))


@triton.jit
def _slopes(
    x_ptr, inverse_norm_ptr, gamma_ptr, offset_ptr, class_weight_ptr, background_ptr, pull_ptr, weight_ptr, scale_ptr,
    slope_ptr, gamma_sum_ptr, offset_sum_ptr, bias_ptr, stride, num_rows, num_classes,
    GAMMA: tl.constexpr, OFFSET: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * CLASSES + tl.arange(0, CLASSES))[None, :]
    is_class = column < num_classes
    gamma_sum = tl.zeros([1, CLASSES], tl.float32)
    offset_sum = tl.zeros([1, CLASSES], tl.float32)
    bias = tl.zeros([1, CLASSES], tl.float32)
    for tile in range(TILES):
        row = ((tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        is_row = row < num_rows
        mask = is_row & is_class
        inverse_norm = tl.load(inverse_norm_ptr + row, mask=is_row, other=0.0)
        weight = tl.load(weight_ptr + row, mask=is_row, other=0.0)
        x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        y, gamma = apply_pace(x, inverse_norm, column, is_class, gamma_ptr, offset_ptr, GAMMA, OFFSET)
        g = tl.sigmoid(y)
        if HAS_BACKGROUND:
            g -= tl.load(background_ptr + row, mask=is_row, other=0.0)
        if HAS_CLASS_WEIGHT:
            g *= tl.load(class_weight_ptr + column, mask=is_class, other=0.0)
        slope = g * gamma
        if GAMMA > 0:
            slope -= x * tl.load(pull_ptr + row, mask=is_row, other=0.0)
        tl.store(slope_ptr + row * stride + column, slope, mask=mask)
        if GAMMA == 2:
            gamma_sum += tl.sum(weight * inverse_norm * g * x, 0, keep_dims=True)
        if OFFSET == 2:
            offset_sum += tl.sum(weight * g, 0, keep_dims=True)
        bias += tl.sum(tl.load(scale_ptr + row, mask=is_row, other=0.0) * slope, 0, keep_dims=True)
    if GAMMA == 2:
        tl.atomic_add(gamma_sum_ptr + column, gamma_sum, mask=is_class)
    if OFFSET == 2:
        tl.atomic_add(offset_sum_ptr + column, offset_sum, mask=is_class)
    tl.atomic_add(bias_ptr + column, bias, mask=is_class)


@triton.jit
def _listed(
    inverse_norm_ptr, gamma_ptr, class_weight_ptr, index_ptr, probability_ptr, listed_ptr, weight_ptr, scale_ptr,
    slope_ptr, gamma_sum_ptr, offset_sum_ptr, bias_ptr, stride, num_listed,
    GAMMA: tl.constexpr, OFFSET: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    first = row * num_listed
    index = tl.load(index_ptr + first + place, mask=place < num_listed, other=0)
    z = tl.load(probability_ptr + first + place, mask=place < num_listed, other=0.0)
    mask = z != 0.0
    together = sum_same_class(index, index_ptr + first, probability_ptr + first, num_listed)
    gamma = tl.full([BLOCK_K], 1.0, tl.float32)
    if HAS_CLASS_WEIGHT:
        class_weight = tl.load(class_weight_ptr + index, mask=mask, other=0.0)
        z *= class_weight
        together *= class_weight
    if GAMMA == 2:
        gamma = tl.load(gamma_ptr + index, mask=mask, other=0.0)
        x = tl.load(listed_ptr + first + place, mask=mask, other=0.0)
        factor = tl.load(weight_ptr + row) * tl.load(inverse_norm_ptr + row)
        tl.atomic_add(gamma_sum_ptr + index, -factor * z * x, mask=mask)
    if OFFSET == 2:
        tl.atomic_add(offset_sum_ptr + index, -tl.load(weight_ptr + row) * z, mask=mask)
    tl.atomic_add(bias_ptr + index, -tl.load(scale_ptr + row) * z * gamma, mask=mask)
    address = slope_ptr + row * stride + index
    slope = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all places of a class read before one writes
    tl.store(address, slope - together * gamma, mask=mask)


@triton.jit
def _scale(x_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < num_elements)
        tl.store(x_ptr + place, x * factor, mask=place < num_elements)
