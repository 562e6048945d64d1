"""Softmax cross-entropy against sparse soft targets: classes exclude each other, over all verticals.

Shapes: B batch, C all classes, V classes of one vertical, M verticals, K kept classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from concentration.targets import SoftTargets

#: As log-odds, what is impossible or certain: finite, and its sigmoid is 4e-44.
LARGEST_LOGIT = 100.0


def softmax_cross_entropy(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The loss of each sample, (B,): -sum over all classes of q * log p, p the softmax of all logits.

    q are the targets divided by their sum over all classes: a single label is 1, several share it evenly. A sample without a
    target has the loss 0.

    Args:
        logits: per vertical, (B, V); their concatenation is in the order of the output index.
        targets: sparse; classes that are not listed have z = 0, or the background of their vertical.
        class_weight_C: multiplies the term of a class.
    """
    return softmax_cross_entropy_by_vertical(logits, targets, class_weight_C).sum(1)


def softmax_cross_entropy_by_vertical(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The same, (B, M): what the targets in each vertical add to the loss of each sample."""
    logits_BC = torch.cat(
        [logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) for logits_BV in logits], 1
    )
    sizes = [logits_BV.shape[1] for logits_BV in logits]
    sizes_M = torch.tensor(sizes, device=logits_BC.device)
    surprise_BC = logits_BC.logsumexp(1, keepdim=True) - logits_BC
    if class_weight_C is not None:
        surprise_BC = surprise_BC * class_weight_C
    listed_BK = targets.probability_BK * surprise_BC.gather(1, targets.index_BK)
    vertical_BK = torch.bucketize(targets.index_BK, sizes_M.cumsum(0), right=True)
    loss_BM = listed_BK.new_zeros(len(logits_BC), len(sizes)).scatter_add(1, vertical_BK, listed_BK)
    total_B = targets.probability_BK.sum(1)
    if targets.background_BM is not None:
        of_vertical_BM = torch.stack([surprise_BV.sum(1) for surprise_BV in surprise_BC.split(sizes, dim=1)], dim=1)
        loss_BM = loss_BM + targets.background_BM * of_vertical_BM
        total_B = total_B + targets.background_BM @ sizes_M.to(targets.background_BM.dtype)
    loss_BM = loss_BM / torch.where(total_B > 0, total_B, torch.inf).unsqueeze(1)
    return loss_BM if targets.weight_BM is None else loss_BM * targets.weight_BM


def compute_log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, at most LARGEST_LOGIT from 0: what a sigmoid makes the same probability of.

    In float64: a probability that float32 rounds to 1 has lost how certain it is, and with it its rank.
    """
    log_probability = log_probability.double().clamp(max=0)
    return (log_probability - torch.log(-torch.expm1(log_probability))).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
