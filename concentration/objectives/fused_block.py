"""The loss and its gradient in closed form in a block of one vertical's logits: the arithmetic of the fused head.

For one sample and one vertical, with x the raw logits, n = sqrt(sum x^2 + N_v EPSILON), y = gamma x / n + offset, and
g = weight * class weight * (sigmoid(y) - z), the derivative of the loss by y:

    by x:        (h - x <h, x> / n^2) / n     where h = gamma g: the whole Jacobian of Equation 3
    by gamma:    <g, x> / n                   (per class: its terms)
    by offset:   sum g                        (per class: its terms)

Without pace y = x, and the derivative by x is g.

Shapes: R samples of a block (B of a batch), V classes of one vertical, S features of a classifier, C all classes, K listed
classes of a sample.

Source: Gao et al., Equations 1 to 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from concentration.targets import SoftTargets

#: Added under the root of the norm as N_v times this, so that its slope stays finite when all logits are 0.
EPSILON = 1e-6


class HeadParameters(NamedTuple):
    """Of one vertical.

    weight: (V, S), bias: (V,), of the classifier.
    gamma: (), or (V,) where every class has its own; None is no pace.
    offset: (), or (V,), added after the scaling; None adds nothing.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class ClassRange:
    """Which classes of a vertical are computed here: all, or a rank's share of a vertical that several ranks hold.

    start: number of its first class among all C outputs.
    vertical_size: N_v of the whole vertical.
    sum_over_shards: adds what the ranks of one vertical have; None where one rank has all of it.
    block_samples: of a block, the same on all ranks of a vertical, so that their sums meet; None chooses by the classes.
    """

    start: int
    vertical_size: int
    sum_over_shards: Callable[[Tensor], Tensor] | None = None
    block_samples: int | None = None


class VerticalTargets(NamedTuple):
    """The targets of a batch as one vertical's classes see them.

    index_BK: inside the vertical; 0 with probability 0 where a listed class is not of these.
    """

    index_BK: Tensor
    probability_BK: Tensor
    background_B1: Tensor | None
    weight_B: Tensor | None
    class_weight_V: Tensor | None

    @classmethod
    def of(cls, targets: SoftTargets, number: int, classes: slice, class_weight_C: Tensor | None) -> "VerticalTargets":
        """As the vertical of this number, or these classes of it, see a batch's targets."""
        is_here_BK = (targets.index_BK >= classes.start) & (targets.index_BK < classes.stop)
        return cls(
            torch.where(is_here_BK, targets.index_BK - classes.start, 0),
            torch.where(is_here_BK, targets.probability_BK, 0.0),
            background_B1=None if targets.background_BM is None else targets.background_BM[:, number, None],
            weight_B=None if targets.weight_BM is None else targets.weight_BM[:, number],
            class_weight_V=None if class_weight_C is None else class_weight_C[classes],
        )

    def rows(self, rows: slice) -> "VerticalTargets":
        by_sample = (None if tensor is None else tensor[rows] for tensor in self[:4])
        return VerticalTargets(*by_sample, self.class_weight_V)


class Block(NamedTuple):
    """What is known of a block of logits.

    loss_R: of each sample.
    slope_RV, scale_R: their product is the derivative of the loss by the raw logits.
    gamma, offset, bias_V: the derivatives by these, summed over the block.
    """

    loss_R: Tensor
    slope_RV: Tensor | None = None
    scale_R: Tensor | None = None
    gamma: Tensor | None = None
    offset: Tensor | None = None
    bias_V: Tensor | None = None


def compute_block(
    logits_RV: Tensor,
    vertical: HeadParameters,
    targets: VerticalTargets,
    classes: ClassRange,
    upstream_R: Tensor | None,
    wants_gradients: bool,
) -> Block:
    """The loss and its derivatives in one block of raw logits, which may be overwritten."""
    x = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    gamma, offset, class_weight_V = vertical.gamma, vertical.offset, targets.class_weight_V
    sum_over_shards = classes.sum_over_shards or _as_it_is
    if gamma is None:
        y = x if offset is None else x.add_(offset)
    else:
        square_R1 = sum_over_shards(torch.linalg.vector_norm(x, dim=1, keepdim=True).square_())
        inverse_norm_R1 = square_R1.add_(classes.vertical_size * EPSILON).rsqrt_()
        y = _pace(x, inverse_norm_R1, gamma, offset)

    probability_RK = targets.probability_BK.to(y.dtype)
    listed_RK = y.gather(1, targets.index_BK).mul_(probability_RK)
    if class_weight_V is not None:
        listed_RK.mul_(class_weight_V[targets.index_BK])
    linear_R = listed_RK.sum(1)  # the part of the loss that is linear in y
    if targets.background_B1 is not None:
        linear_R += targets.background_B1[:, 0] * _sum_classes(y, class_weight_V)
    loss_R = _sum_classes(y.clamp_min(0), class_weight_V) - linear_R
    g = torch.sigmoid(y, out=y)
    loss_R -= _sum_classes(_log_of_larger(g), class_weight_V)
    if targets.weight_B is not None:
        loss_R *= targets.weight_B
    if not wants_gradients:
        return Block(loss_R)

    if targets.background_B1 is not None:
        g.sub_(targets.background_B1)
    g.scatter_add_(1, targets.index_BK, probability_RK.neg())
    if class_weight_V is not None:
        g.mul_(class_weight_V)
    weight_R = multiply_weights(targets.weight_B, upstream_R, like=loss_R)
    offset_sum = None
    if offset is not None:
        offset_sum = torch.mv(g.T, weight_R) if offset.ndim else torch.dot(sum_over_shards(g.sum(1)), weight_R)
    if gamma is None:
        return Block(loss_R, g, weight_R, None, offset_sum, torch.mv(g.T, weight_R))
    inverse_norm_R = inverse_norm_R1[:, 0]
    gx = g * x
    if gamma.ndim:
        gamma_sum = torch.mv(gx.T, weight_R * inverse_norm_R)
        g.mul_(gamma)
        gx.mul_(gamma)
    dot_R = sum_over_shards(gx.sum(1))
    slope_RV = g.addcmul_(x, (dot_R * inverse_norm_R.square()).unsqueeze(1), value=-1)
    scale_R = weight_R * inverse_norm_R
    if not gamma.ndim:
        gamma_sum = torch.dot(dot_R, scale_R)
        scale_R = scale_R * gamma
    return Block(loss_R, slope_RV, scale_R, gamma_sum, offset_sum, torch.mv(slope_RV.T, scale_R))


def _pace(x: Tensor, inverse_norm_R1: Tensor, gamma: Tensor, offset: Tensor | None) -> Tensor:
    """y of Equation 3, in a new tensor."""
    if gamma.ndim:
        y = (x * inverse_norm_R1).mul_(gamma)
        return y if offset is None else y.add_(offset)
    scale_R1 = inverse_norm_R1 * gamma
    return x * scale_R1 if offset is None else torch.addcmul(offset, x, scale_R1)


def _log_of_larger(sigmoid: Tensor) -> Tensor:
    """log max(s, 1 - s), of which log(1 + exp(y)) = max(y, 0) - log max(s, 1 - s): half the time of softplus(y).

    It is log(1 - q) with q the smaller of the two. Where y is far below 0, q is the sigmoid itself, so that nothing is lost;
    where y is far above, what q loses is nothing beside y.
    """
    q = torch.rsub(sigmoid, 1)
    return torch.minimum(sigmoid, q, out=q).neg_().log1p_()


def _sum_classes(values_RV: Tensor, class_weight_V: Tensor | None) -> Tensor:
    return values_RV.sum(1) if class_weight_V is None else values_RV @ class_weight_V


def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor, a number that is 1 as a rule, which then costs nothing."""
    if not (has_values_at_hand(factor) and factor == 1):
        tensor.mul_(factor)


def has_values_at_hand(tensor: Tensor) -> bool:
    """Whether a look at a value costs nothing. On a GPU it waits for all that was asked of it; torch's fake tensors have none."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor


def multiply_weights(*factors: Tensor | None, like: Tensor) -> Tensor:
    """(R,) of those that are given; ones where none is."""
    product_R = torch.ones_like(like)
    for factor_R in factors:
        if factor_R is not None:
            product_R = product_R * factor_R
    return product_R


def _as_it_is(value: Tensor) -> Tensor:
    return value
