"""Sigmoid cross-entropy against sparse soft targets, in its readable form (`fused_head` is the fast one).

Shapes: B batch, C all classes, V classes of one vertical, M verticals, K kept classes.

Source: Gao et al., Equations 1 and 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from concentration.objectives.target_checks import check_targets_of_logits
from concentration.targets import SoftTargets


def sigmoid_cross_entropy(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The loss of each sample, (B,): the sum over all classes of softplus(y) - z*y, for logits y and targets z.

    This equals -log(sigmoid(y))*z - log(1 - sigmoid(y))*(1 - z) summed over classes (Equations 1 and 2 without the mean over
    the batch), but needs no dense (B, C) target.

    Args:
        logits: (B, V) per vertical; their concatenation is in the order of the output index.
        targets: sparse; a class that is not listed has z = 0, or its vertical's background.
        class_weight_C: multiplies both terms of a class.

    Raises:
        DataError: the targets do not fit the logits. On a CPU also: they name a class that does not exist, or are not finite.
    """
    return sigmoid_cross_entropy_by_vertical(logits, targets, class_weight_C).sum(1)


def sigmoid_cross_entropy_by_vertical(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The same by vertical, (B, M): what each vertical's classes add to the loss of each sample."""
    check_targets_of_logits(targets, logits)
    # float32 at least: a sum over 100K softplus values loses everything below 1 in bfloat16.
    logits = [logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) for logits_BV in logits]
    logits_BC = torch.cat(logits, dim=1)
    listed_BK = targets.probability_BK * logits_BC.gather(1, targets.index_BK)
    absent = [softplus(logits_BV) for logits_BV in logits]
    if targets.background_BM is not None:
        backgrounds = targets.background_BM.split(1, dim=1)
        absent = [
            softplus_BV - background_B1 * logits_BV
            for softplus_BV, background_B1, logits_BV in zip(absent, backgrounds, logits, strict=True)
        ]
    if class_weight_C is not None:
        listed_BK = listed_BK * class_weight_C[targets.index_BK]
        weights = class_weight_C.split([logits_BV.shape[1] for logits_BV in logits])
        absent = [loss_BV * weight_V for loss_BV, weight_V in zip(absent, weights, strict=True)]
    loss_BM = torch.stack([loss_BV.sum(1) for loss_BV in absent], dim=1)
    ends_M = torch.tensor([logits_BV.shape[1] for logits_BV in logits], device=logits_BC.device).cumsum(0)
    vertical_BK = torch.bucketize(targets.index_BK, ends_M, right=True)
    loss_BM = loss_BM.scatter_add(1, vertical_BK, -listed_BK)
    return loss_BM if targets.weight_BM is None else loss_BM * targets.weight_BM
