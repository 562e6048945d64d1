"""The fused head for a GPU's matrix units: groups of verticals at a time, so that a step launches few kernels.

`fused_head` goes vertical by vertical and launches some thirty small kernels for each, so that a GPU waits for Python. Here the
verticals of a group share their kernels: three grouped products (torch's `grouped_mm`, in bf16) and the kernels of
`grouped_kernels`. The logits of a group lie side by side. Those of each vertical, like the features of a classifier, are padded
to a multiple of 16 bytes, as the products want them.

Shapes: B samples, M verticals of a group, S features of a classifier, V classes of a group, P of its columns with padding,
K listed classes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # see fused_head
from torch.nn.functional import grouped_mm, pad

from concentration.objectives.fused_block import HeadParameters, multiply_weights, refuse_second_derivatives
from concentration.objectives.vertical_groups import (
    ALIGNMENT,
    GROUP_ELEMENTS,
    Group,
    Layout,
    build_group,
    form_of,
    plan_groups,
)
from concentration.targets import SoftTargets

#: The type of the matrix products: the only one that torch's grouped products have.
PRODUCT_TYPE = torch.bfloat16


def can_group(hidden: Sequence[Tensor], parameters: Sequence[HeadParameters]) -> bool:
    """Whether this is a GPU with grouped products, under bf16 autocast, and all verticals have features of one width.

    For no samples a kernel cannot be launched.
    """
    device = hidden[0].device
    if device.type != "cuda" or type(hidden[0]) is not Tensor or not torch.is_autocast_enabled("cuda"):
        return False
    if torch.get_autocast_dtype("cuda") != PRODUCT_TYPE or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    widths = {vertical.weight.shape[1] for vertical in parameters}
    largest = max(len(vertical.weight) for vertical in parameters)
    return len(widths) == 1 and 0 < largest * len(hidden[0]) <= GROUP_ELEMENTS


@_disable_dynamo
def grouped_loss_by_vertical(
    hidden: Sequence[Tensor],
    parameters: Sequence[HeadParameters],
    targets: SoftTargets,
    class_weight_C: Tensor | None = None,
) -> Tensor:
    """As `fused_head.fused_loss_by_vertical` with gradients="forward", which has checked the arguments."""
    by_kind = itertools.chain.from_iterable(zip(*parameters, strict=True))
    return _GroupedLoss.apply(targets, class_weight_C, torch.is_grad_enabled(), *hidden, *by_kind)


class _Found(NamedTuple):
    """The gradients of the summed loss for one group; those of gamma and offset are shaped like these."""

    hidden_MBS: Tensor
    weight_PS: Tensor
    bias_V: Tensor
    gamma: Tensor | None
    offset: Tensor | None


class _GroupedLoss(torch.autograd.Function):
    """The loss (B, M) of all verticals.

    Its arguments: targets, class weights, whether gradients are wanted; then, vertical after vertical, what each classifier
    sees, the weights, the biases, the gammas and the offsets.
    """

    @staticmethod
    def forward(ctx, targets, class_weight_C, wants_gradients, *tensors) -> Tensor:
        num_verticals = len(tensors) // 5
        hidden, *kinds = (tensors[first : first + num_verticals] for first in range(0, len(tensors), num_verticals))
        ctx.forms = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.found = []
        losses = []
        with torch.autocast(hidden[0].device.type, enabled=False):
            for verticals, layout in plan_groups(len(hidden[0]), kinds[0]):
                here = [kind[verticals] for kind in kinds]
                group = build_group(layout, here, targets, class_weight_C, verticals)
                loss_BM, found = _compute_group(hidden[verticals], here[0], group, wants_gradients)
                losses.append(loss_BM)
                ctx.found.append((layout, found))
        return torch.cat(losses, dim=1)

    @staticmethod
    @refuse_second_derivatives
    def backward(ctx, gradient_BM: Tensor):
        if ctx.found is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass; compute the loss again")
        groups, ctx.found = ctx.found, None
        upstream = gradient_BM[0, 0]
        is_one_number = (gradient_BM == upstream).all() | gradient_BM.isnan().any()
        torch._assert_async(is_one_number)
        by_kind: list[list[Tensor | None]] = [[] for _ in range(5)]
        for layout, found in groups:
            _scale(found, upstream)
            for gradients, of_group in zip(by_kind, _take_apart(layout, found), strict=True):
                gradients.extend(of_group)
        gradients = []
        for gradient, form in zip(itertools.chain.from_iterable(by_kind), ctx.forms, strict=True):
            gradients.append(None if gradient is None else gradient.view(form[0]).to(form[1]))
        return None, None, None, *gradients


def _compute_group(
    hidden: Sequence[Tensor], weights: Sequence[Tensor], group: Group, wants_gradients: bool
) -> tuple[Tensor, _Found | None]:
    from concentration.objectives import grouped_kernels as kernels  # Triton comes with torch for CUDA alone

    layout = group.layout
    width = hidden[0].shape[1]
    hidden_MBS = torch.stack([hidden_BS.to(PRODUCT_TYPE) for hidden_BS in hidden])
    if width % ALIGNMENT:
        hidden_MBS = pad(hidden_MBS, (0, -width % ALIGNMENT))
    weight_PS = _join_weights(weights, layout)
    logits_BP = grouped_mm(hidden_MBS, weight_PS.t(), offs=layout.column_end_M)
    sums = kernels.sum_rows(logits_BP, group)
    loss_BM = sums.loss_BM if group.weight_BM is None else sums.loss_BM * group.weight_BM
    if not wants_gradients:
        return loss_BM, None
    weight_BM = multiply_weights(group.weight_BM, like=loss_BM)
    scale_BM = weight_BM * sums.inverse_norm_BM
    gamma, offset = None, None  # their gradients
    if group.gamma_form == 1:
        gamma = (sums.dot_BM * scale_BM).sum(0)
        scale_BM = scale_BM * group.gamma
    if group.offset_form == 1:
        offset = (sums.sum_BM * weight_BM).sum(0)
    by_class = kernels.replace_by_slopes(logits_BP, group, sums, weight_BM, scale_BM)
    scale_MB1 = scale_BM.t().unsqueeze(2)
    found_MBS = grouped_mm(logits_BP, weight_PS, offs=layout.column_end_M)[..., :width] * scale_MB1
    del weight_PS  # its memory is the next product's
    scaled_MBS = (hidden_MBS * scale_MB1).to(PRODUCT_TYPE)
    found_PS = grouped_mm(logits_BP.t(), scaled_MBS, offs=layout.column_end_M)[:, :width].float().contiguous()
    return loss_BM, _Found(
        found_MBS, found_PS, by_class.bias_V, by_class.gamma_V if gamma is None else gamma,
        by_class.offset_V if offset is None else offset,
    )  # fmt: skip


def _join_weights(weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """(P, S) in the type of the products; rows and columns are padded with zeros."""
    width = weights[0].shape[1]
    joined_PS = weights[0].new_empty(layout.num_columns, width + -width % ALIGNMENT, dtype=PRODUCT_TYPE)
    if width % ALIGNMENT:
        joined_PS[:, width:].zero_()
    parts = list(zip(joined_PS[:, :width].split(layout.padded), layout.sizes, strict=True))
    torch._foreach_copy_([part_PS[:size] for part_PS, size in parts], list(weights))
    if layout.padded != layout.sizes:
        torch._foreach_zero_([part_PS[size:] for part_PS, size in parts if len(part_PS) > size])
    return joined_PS


def _take_apart(layout: Layout, found: _Found) -> Iterator[Sequence[Tensor | None]]:
    """For each kind of tensor, in the order of `_GroupedLoss`, the gradients of each vertical."""
    yield found.hidden_MBS.unbind()
    yield [part[:size] for part, size in zip(found.weight_PS.split(layout.padded), layout.sizes, strict=True)]
    yield found.bias_V.split(layout.sizes)
    for pace in (found.gamma, found.offset):
        if pace is None:
            yield [None] * len(layout.sizes)
        else:
            yield pace.split(layout.sizes) if form_of(pace, layout) == 2 else pace.unbind()


def _scale(found: _Found, upstream: Tensor) -> None:
    from concentration.objectives.fused_block_triton import scale_in_place

    for gradient in found:
        if gradient is not None:
            scale_in_place(gradient, upstream)
