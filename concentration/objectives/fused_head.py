"""Classifier, pace and sigmoid cross-entropy of every vertical in one pass: no (B, C) tensor is ever held.

The readable form is `sigmoid_cross_entropy_by_vertical(pace(top(features)), targets)`; this is the same function of the same
parameters. It goes vertical by vertical and, inside a large vertical, some samples at a time. While such a block of logits is
in the cache, it takes the loss from it and, in closed form, the gradient.

Shapes: B samples, R samples of a block, S features of a classifier (s2), V classes of one vertical, M verticals, C all
classes.

Source: Gao et al., Equations 1 to 4. Taking the classifier's gradient in the forward pass is the idea of Liger-Kernel's fused
linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# NOTE: torch.compiler.disable is this with an import of the compiler, which is seconds of every process's start.
from torch._compile import _disable_dynamo

from concentration.errors import DataError
from concentration.objectives import fused_block, grouped_head
from concentration.objectives.fused_block import (
    Block,
    ClassRange,
    HeadParameters,
    VerticalTargets,
    refuse_second_derivatives,
)
from concentration.objectives.target_checks import check_targets, has_values_at_hand
from concentration.schema import check_choice
from concentration.targets import SoftTargets

#: Logits of a block: few enough to stay in a cache (a GPU's second-level one) together with what is computed from them, many
#: enough for a fast matrix product.
BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}

#: When the gradients are computed; see `fused_loss_by_vertical`.
GradientTime = Literal["forward", "backward"]


def fused_loss_by_vertical(
    hidden: Sequence[Tensor],
    parameters: Sequence[HeadParameters],
    targets: SoftTargets,
    class_weight_C: Tensor | None = None,
    gradients: GradientTime = "forward",
) -> Tensor:
    """What each vertical's classes add to the loss of each sample, (B, M).

    Args:
        hidden: (B, S) per vertical, what its classifier sees.
        parameters: classifier and pace of each vertical, in the order of the outputs.
        targets: as in the readable form.
        class_weight_C: multiplies both terms of a class.
        gradients: `forward` computes them together with the loss and saves one matrix product. The loss may then only be
            multiplied by ONE number for all samples and verticals, as sum and mean do; weights of samples belong into
            `targets.weight_BM`. `backward` computes the logits again, keeps nothing in between, and allows any weights; a hook
            on a classifier's weight sees its gradient before that of the next vertical exists.

    Raises:
        DataError: shapes, types or devices do not fit, or targets or class weights require a gradient, which the readable form
            alone gives. On a CPU also: targets name a class that does not exist, or are not finite.
        ConfigError: `gradients` is another word.
    """
    _check(hidden, parameters, targets, class_weight_C, gradients)
    if gradients == "forward" and grouped_head.can_group(hidden, parameters):
        return grouped_head.grouped_loss_by_vertical(hidden, parameters, targets, class_weight_C)
    ranges, start = [], 0
    for vertical in parameters:
        ranges.append(ClassRange(start, len(vertical.weight)))
        start += len(vertical.weight)
    losses = [
        fused_vertical_loss(hidden_BS, vertical, classes, targets, number, class_weight_C, gradients)
        for number, (hidden_BS, vertical, classes) in enumerate(zip(hidden, parameters, ranges, strict=True))
    ]
    return torch.stack(losses, dim=1)


@_disable_dynamo
def fused_vertical_loss(
    hidden_BS: Tensor,
    vertical: HeadParameters,
    classes: ClassRange,
    targets: SoftTargets,
    number: int,
    class_weight_C: Tensor | None = None,
    gradients: GradientTime = "forward",
) -> Tensor:
    """The loss of each sample, (B,), in the classes of vertical `number`, or in this rank's share of them."""
    here = slice(classes.start, classes.start + len(vertical.weight))
    vertical_targets = VerticalTargets.of(targets, number, here, class_weight_C)
    time = gradients if torch.is_grad_enabled() else None
    return _VerticalLoss.apply(hidden_BS, *vertical, vertical_targets, classes, time, _product_types(hidden_BS))


class _ProductTypes(NamedTuple):
    """The types in which the matrix products are computed; None means the parameters' own type.

    NOTE: the gradients' products are never float16: the loss scale that keeps small float16 gradients from vanishing is not
    known before the backward pass.
    """

    logits: torch.dtype | None
    gradients: torch.dtype | None


class _Gradients(NamedTuple):
    """The gradients of the loss summed over samples; None where one is not asked for."""

    hidden_BS: Tensor | None
    weight_VS: Tensor | None
    bias_V: Tensor | None
    gamma: Tensor | None
    offset: Tensor | None


class _VerticalLoss(torch.autograd.Function):
    """The loss (B,) of one vertical, as a function of hidden_BS, weight_VS, bias_V, gamma, offset, and of constants."""

    @staticmethod
    def forward(ctx, hidden_BS, weight_VS, bias_V, gamma, offset, targets, classes, gradients, types) -> Tensor:
        vertical = HeadParameters(weight_VS, bias_V, gamma, offset)
        needed = _Needed(*ctx.needs_input_grad[:5]) if gradients == "forward" else _Needed()
        loss_B, found = _compute(hidden_BS, vertical, targets, classes, needed, types, upstream_B=None)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (hidden_BS, *vertical)]
        # NOTE: in float16 small gradients would vanish before the loss scale that should save them is known.
        ctx.gradients = found if hidden_BS.dtype == torch.float16 else _hand_over(found, ctx.types)
        if gradients == "backward":
            ctx.save_for_backward(hidden_BS, *vertical)
            ctx.recompute = targets, classes, types
        ctx.time = gradients
        return loss_B

    @staticmethod
    @refuse_second_derivatives
    def backward(ctx, gradient_B: Tensor):
        if ctx.time == "backward":
            hidden_BS, *vertical = ctx.saved_tensors
            targets, classes, types = ctx.recompute
            needed = _Needed(*ctx.needs_input_grad[:5])
            _, found = _compute(hidden_BS, HeadParameters(*vertical), targets, classes, needed, types, gradient_B)
        else:
            if ctx.gradients is None:
                raise RuntimeError("the fused loss keeps its gradients for one backward pass; compute the loss again")
            found, ctx.gradients = ctx.gradients, None  # autograd does not copy what nobody else refers to
            _scale(found, gradient_B)
        return *_hand_over(found, ctx.types), None, None, None, None


class _Needed(NamedTuple):
    """Which gradients autograd asks for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    gamma: bool = False
    offset: bool = False


def _compute(
    hidden_BS: Tensor,
    vertical: HeadParameters,
    targets: VerticalTargets,
    classes: ClassRange,
    needed: _Needed,
    types: _ProductTypes,
    upstream_B: Tensor | None,
) -> tuple[Tensor, _Gradients]:
    """The loss (B,), and the gradients of its sum over samples, each sample weighted by `upstream_B` (None means 1).

    Sums are computed and returned in float32 at least.
    """
    num_samples = len(hidden_BS)
    block_elements = BLOCK_ELEMENTS.get(hidden_BS.device.type, 1 << 24)
    num_rows = classes.block_samples or max(1, min(num_samples, block_elements // len(vertical.weight)))
    found = _allocate(hidden_BS, vertical, needed)
    weight_VS, bias_V = _cast(vertical.weight, types.logits), _cast(vertical.bias, types.logits)
    again_VS = weight_VS if types.gradients == types.logits else vertical.weight  # shares the narrow copy where it can
    exact = torch.promote_types(hidden_BS.dtype, torch.float32)
    kernels = _choose_kernels(hidden_BS.device, exact)
    loss_B = torch.empty(num_samples, dtype=exact, device=hidden_BS.device)
    with torch.autocast(hidden_BS.device.type, enabled=False):
        for first in range(0, num_samples, num_rows):
            rows = slice(first, first + num_rows)
            logits_RV = torch.addmm(bias_V, _cast(hidden_BS[rows], types.logits), weight_VS.T)
            upstream_R = None if upstream_B is None else upstream_B[rows].to(exact)
            block = kernels.compute_block(logits_RV, vertical, targets.rows(rows), classes, upstream_R, any(needed))
            loss_B[rows] = block.loss_R
            _accumulate(found, rows, block, hidden_BS, again_VS, types.gradients)
    return loss_B, found


def _hand_over(found: _Gradients, types: Sequence[torch.dtype | None]) -> _Gradients:
    """Casts each gradient to the type of its tensor."""
    return _Gradients(*(f if f is None else f.to(dtype) for f, dtype in zip(found, types, strict=True)))


def _choose_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module whose `compute_block` and `scale_in_place` compute in this type on this device."""
    if device.type != "cuda" or dtype == torch.float64:
        return fused_block
    from concentration.objectives import fused_block_triton  # Triton comes with torch for CUDA alone

    return fused_block_triton


def _allocate(hidden_BS: Tensor, vertical: HeadParameters, needed: _Needed) -> _Gradients:
    def allocate(tensor: Tensor | None, is_needed: bool, value: float | None) -> Tensor | None:
        if not is_needed:
            return None
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        like = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        return like if value is None else like.fill_(value)

    # hidden and weight need no zeros where there are samples: the first block overwrites them.
    return _Gradients(
        allocate(hidden_BS, needed.hidden, None),
        allocate(vertical.weight, needed.weight, None if len(hidden_BS) else 0.0),
        allocate(vertical.bias, needed.bias, 0.0),
        allocate(vertical.gamma, needed.gamma, 0.0),
        allocate(vertical.offset, needed.offset, 0.0),
    )


def _accumulate(
    found: _Gradients, rows: slice, block: Block, hidden_BS: Tensor, weight_VS: Tensor, dtype: torch.dtype | None
) -> None:
    """Adds a block's part of the gradients."""
    if block.slope_RV is None:
        return
    slope_RV = _cast(block.slope_RV, dtype or hidden_BS.dtype)
    scale_R1 = block.scale_R.unsqueeze(1)
    if found.hidden_BS is not None:
        torch.mul(slope_RV @ _cast(weight_VS, dtype), scale_R1, out=found.hidden_BS[rows])
    if found.weight_VS is not None:
        scaled_RS = (hidden_BS[rows] * scale_R1).to(slope_RV.dtype)
        _add_product(found.weight_VS, slope_RV.T, scaled_RS, is_first=rows.start == 0)
    if found.bias_V is not None:
        found.bias_V.add_(block.bias_V)
    if found.gamma is not None:
        found.gamma.add_(block.gamma)
    if found.offset is not None:
        found.offset.add_(block.offset)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if is_first else 1)
    elif total.device.type == "cuda":  # CUDA's products of narrow types can write float32 directly
        if is_first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif is_first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _scale(found: _Gradients, upstream_B: Tensor) -> None:
    """Multiplies the gradients by the gradient of the loss, which must be one number for all samples.

    Raises:
        DataError: samples were weighted after the loss. On a GPU that is an assertion of the device instead.
    """
    if not len(upstream_B):
        return  # without samples all gradients are 0
    upstream = upstream_B[0]
    is_one_number = (upstream_B == upstream).all() | upstream_B.isnan().any()
    if not has_values_at_hand(is_one_number):
        torch._assert_async(is_one_number)
    elif not is_one_number:
        raise DataError(
            "the fused loss computed its gradients with the loss, but its samples are weighted afterwards; expected one weight "
            'for all: give weights as `targets.weight_BM`, or use gradients="backward"'
        )
    kernels = _choose_kernels(upstream.device, upstream.dtype)
    for gradient in found:
        if gradient is not None:
            kernels.scale_in_place(gradient, upstream)


def _product_types(hidden_BS: Tensor) -> _ProductTypes:
    device = hidden_BS.device.type
    if not torch.is_autocast_enabled(device):
        return _ProductTypes(None, None)
    dtype = torch.get_autocast_dtype(device)
    return _ProductTypes(dtype, torch.bfloat16 if dtype == torch.float16 else dtype)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


@_disable_dynamo
def _check(
    hidden: Sequence[Tensor],
    parameters: Sequence[HeadParameters],
    targets: SoftTargets,
    class_weight_C: Tensor | None,
    gradients: GradientTime,
) -> None:
    check_choice("gradients", gradients, GradientTime)
    if len(hidden) != len(parameters) or not hidden:
        raise DataError(f"fused loss: {len(hidden)} verticals of features for {len(parameters)} verticals of classes")
    num_samples, num_classes = len(hidden[0]), sum(len(vertical.weight) for vertical in parameters)
    for number, (hidden_BS, vertical) in enumerate(zip(hidden, parameters, strict=True)):
        size, width = vertical.weight.shape
        expected = {"features": (num_samples, width), "bias": (size,)}
        found = {"features": tuple(hidden_BS.shape), "bias": tuple(vertical.bias.shape)}
        for name, tensor in (("gamma", vertical.gamma), ("offset", vertical.offset)):
            if tensor is not None and tensor.ndim:
                expected[name], found[name] = (size,), tuple(tensor.shape)
        if found != expected:
            raise DataError(f"fused loss: vertical {number} has the shapes {found}, expected {expected}")
        places = {tensor.device for tensor in (hidden_BS, *vertical, targets.index_BK) if tensor is not None}
        if len(places) > 1:
            raise DataError(f"fused loss: vertical {number} lies on {sorted(map(str, places))}; expected one device")
        is_mixed = torch.is_autocast_enabled(hidden_BS.device.type)
        if not is_mixed and hidden_BS.dtype != vertical.weight.dtype:
            raise DataError(
                f"fused loss: vertical {number} has features of {hidden_BS.dtype} and weights of {vertical.weight.dtype}; "
                "expected one type, or autocast"
            )
    check_targets(targets, num_samples, num_classes, len(parameters))
    constants = (targets.probability_BK, targets.background_BM, targets.weight_BM, class_weight_C)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in constants):
        raise DataError(
            "fused loss: targets or class weights require a gradient, and would get none; detach them, or take "
            "`sigmoid_cross_entropy`, which gives it"
        )
    if class_weight_C is not None and class_weight_C.shape != (num_classes,):
        raise DataError(f"fused loss: class weights {tuple(class_weight_C.shape)}, expected {(num_classes,)}")
