"""The loss of a block of one vertical's logits and its gradient in closed form: the arithmetic of the fused head.

For one sample and one vertical, let x be the raw logits, n = sqrt(sum x^2 + N_v EPSILON) their norm, y = gamma x / n + offset
the paced logits, and g = weight * class weight * (sigmoid(y) - z) the derivative of the loss with respect to y. Then the
derivative with respect to

    x        is  (h - x <h, x> / n^2) / n    with h = gamma g: the whole Jacobian of Equation 3
    gamma    is  <g, x> / n                  (with one gamma per class: its terms)
    offset   is  sum g                       (with one offset per class: its terms)

Without pace y = x, and the derivative with respect to x is g.

Shapes: R samples of a block (B of a batch), V classes of one vertical, S features of a classifier, C all classes, K listed
classes of a sample.

Source: Gao et al., Equations 1 to 4.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from concentration.objectives.target_checks import has_values_at_hand
from concentration.targets import SoftTargets

#: Logits that a CPU works on at a time: few enough for what is computed from them to stay in a core's own cache.
PIECE_ELEMENTS = 1 << 18

#: N_v times this is added under the root of the norm, whose slope so stays finite when all logits are 0.
EPSILON = 1e-6


class HeadParameters(NamedTuple):
    """Classifier and pace of one vertical.

    weight, bias: (V, S) and (V,), of the classifier.
    gamma: (), or (V,) where every class has its own; None without pace.
    offset: () or (V,), added after the scaling; None adds nothing.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class ClassRange:
    """Which classes of a vertical are computed here: all, or this rank's share of a vertical that several ranks hold.

    start: the output index of the first of them.
    vertical_size: N_v of the whole vertical.
    sum_over_shards: adds up what the ranks of the vertical have; None where one rank holds all of it.
    block_samples: R, equal on all ranks of the vertical so that they sum over the same samples; None chooses it by V.
    """

    start: int
    vertical_size: int
    sum_over_shards: Callable[[Tensor], Tensor] | None = None
    block_samples: int | None = None


class VerticalTargets(NamedTuple):
    """The targets of a batch as far as they concern one vertical's classes.

    index_BK: counted inside these classes; 0, with probability 0, where a listed class is none of them.
    """

    index_BK: Tensor
    probability_BK: Tensor
    background_B1: Tensor | None
    weight_B: Tensor | None
    class_weight_V: Tensor | None

    @classmethod
    def of(cls, targets: SoftTargets, number: int, classes: slice, class_weight_C: Tensor | None) -> "VerticalTargets":
        """The part of a batch's targets that concerns `classes`, which belong to vertical `number`."""
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
    """The loss of a block of logits, and its derivatives where they are asked for.

    loss_R: of each sample.
    slope_RV, scale_R: their product is the derivative of the loss with respect to the raw logits.
    gamma, offset, bias_V: the derivatives with respect to these, summed over the block's samples.
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
    """The loss and its derivatives in one block of raw logits, which may be overwritten.

    Args:
        upstream_R: weights of the samples in the derivatives, beside those of the targets; None means 1.

    Returns:
        The slope has the type of the logits, but bfloat16 for float16, in which small gradients would vanish.
    """
    num_samples, num_classes = logits_RV.shape
    # NOTE: ranks that share a vertical must sum over the same samples, however many of its classes each has.
    is_divided = logits_RV.device.type == "cpu" and classes.sum_over_shards is None
    num_rows = max(1, PIECE_ELEMENTS // num_classes if is_divided else num_samples)
    slope_RV = torch.empty_like(logits_RV, dtype=torch.bfloat16) if logits_RV.dtype == torch.float16 else logits_RV
    pieces = []
    for first in range(0, max(1, num_samples), num_rows):
        rows = slice(first, first + num_rows)
        upstream = None if upstream_R is None else upstream_R[rows]
        piece = _compute_piece(logits_RV[rows], vertical, targets.rows(rows), classes, upstream, wants_gradients)
        if piece.slope_RV is not None and piece.slope_RV.dtype != logits_RV.dtype:
            slope_RV[rows] = piece.slope_RV
        pieces.append(piece._replace(slope_RV=None))
    return _join(pieces, slope_RV) if wants_gradients else Block(torch.cat([piece.loss_R for piece in pieces]))


def _join(pieces: Sequence[Block], slope_RV: Tensor) -> Block:
    def add(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        return None if found[0] is None else functools.reduce(Tensor.add_, found)

    loss_R, scale_R = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("loss_R", "scale_R"))
    return Block(loss_R, slope_RV, scale_R, *map(add, ("gamma", "offset", "bias_V")))


def _compute_piece(
    logits_RV: Tensor,
    vertical: HeadParameters,
    targets: VerticalTargets,
    classes: ClassRange,
    upstream_R: Tensor | None,
    wants_gradients: bool,
) -> Block:
    """As `compute_block`, with a slope in float32 at least: in the place of the logits, if they have its type."""
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
    loss_R -= _sum_log_of_larger(g, class_weight_V)
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
    slope_RV = torch.addcmul(g, x, (dot_R * inverse_norm_R.square()).unsqueeze(1), value=-1, out=x)
    scale_R = weight_R * inverse_norm_R
    if not gamma.ndim:
        gamma_sum = torch.dot(dot_R, scale_R)
        scale_R = scale_R * gamma
    return Block(loss_R, slope_RV, scale_R, gamma_sum, offset_sum, torch.mv(slope_RV.T, scale_R))


def _pace(x: Tensor, inverse_norm_R1: Tensor, gamma: Tensor, offset: Tensor | None) -> Tensor:
    """y, by Equations 3 and 4 and with the offset, in a new tensor."""
    if gamma.ndim:
        y = (x * inverse_norm_R1).mul_(gamma)
        return y if offset is None else y.add_(offset)
    scale_R1 = inverse_norm_R1 * gamma
    return x * scale_R1 if offset is None else torch.addcmul(offset, x, scale_R1)


def _sum_log_of_larger(sigmoid_RV: Tensor, class_weight_V: Tensor | None) -> Tensor:
    """The sum over classes of log max(s, 1 - s), for softplus(y) = max(y, 0) - log max(s, 1 - s).

    It is the sum of log(1 - q) with q the smaller of s and 1 - s. Where y is far below 0, q is the sigmoid itself and exact;
    where y is far above 0, the rounding of q is nothing beside y. Logarithms are slow, so one is taken of eight factors, without
    rounding small q away: (1 - a)(1 - b) = 1 - (a + b (1 - a)).
    """
    q = torch.rsub(sigmoid_RV, 1)
    torch.minimum(sigmoid_RV, q, out=q)
    if class_weight_V is not None:
        return _sum_classes(q.neg_().log1p_(), class_weight_V)
    one = torch.ones((), dtype=q.dtype, device=q.device)
    for _ in range(3):  # eight factors are 2^-8 at least, so 1 - q of them still has the bits that count
        half, width = q.shape[1] // 2, -(-q.shape[1] // 2)
        q[:, :half].lerp_(one, q[:, width:])  # an odd class in the middle stays as it is
        q = q[:, :width]
    return torch.log1p(-q).sum(1)


def _sum_classes(values_RV: Tensor, class_weight_V: Tensor | None) -> Tensor:
    return values_RV.sum(1) if class_weight_V is None else values_RV @ class_weight_V


def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor. As a rule the factor is 1, and then this costs nothing."""
    if not (has_values_at_hand(factor) and factor == 1):
        tensor.mul_(factor)


def refuse_second_derivatives(backward: Callable[..., object]) -> Callable[..., object]:
    """The backward function of a loss whose gradients are numbers, of which no derivative can be taken.

    NOTE: torch's once_differentiable does not refuse where the gradient of the loss is a constant, as that of a sum or mean
    is: the second derivative would be 0 without a word.
    """

    @functools.wraps(backward)
    def compute(ctx, gradient: Tensor):
        if torch.is_grad_enabled():  # in a backward pass: create_graph=True
            raise RuntimeError("the fused loss has no second derivative; take it of `sigmoid_cross_entropy`")
        return backward(ctx, gradient)

    return compute


def multiply_weights(*factors: Tensor | None, like: Tensor) -> Tensor:
    """The product of the factors that are not None, in the shape of `like`; ones where all are."""
    product_R = torch.ones_like(like)
    for factor_R in factors:
        if factor_R is not None:
            product_R = product_R * factor_R
    return product_R


def _as_it_is(value: Tensor) -> Tensor:
    return value
