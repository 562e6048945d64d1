"""Softmax cross-entropy against sparse soft targets: of all classes of all verticals one is true.

Shapes: B batch, C all classes, V classes of one vertical, M verticals, K kept classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from concentration.objectives.target_checks import check_targets_of_logits
from concentration.targets import SoftTargets

#: Log-odds are cut off here, so that what is impossible or certain stays finite: the sigmoid of -100 is 4e-44.
LARGEST_LOGIT = 100.0


def softmax_cross_entropy(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The loss of each sample, (B,): the sum over all classes of -q * log p, where p is the softmax of all logits.

    q is the sample's targets divided by their sum over all classes: a single label has q = 1, several labels share it evenly.
    The loss of a sample without targets is 0.

    Args:
        logits: (B, V) per vertical; their concatenation is in the order of the output index.
        targets: sparse; a class that is not listed has z = 0, or its vertical's background.
        class_weight_C: multiplies the term of a class.

    Raises:
        DataError: as `sigmoid_cross_entropy`.
    """
    return softmax_cross_entropy_by_vertical(logits, targets, class_weight_C).sum(1)


def softmax_cross_entropy_by_vertical(
    logits: Sequence[Tensor], targets: SoftTargets, class_weight_C: Tensor | None = None
) -> Tensor:
    """The same by vertical, (B, M): what each vertical's targets add to the loss of each sample."""
    check_targets_of_logits(targets, logits)
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
    """log(p / (1 - p)) from log p, clamped to +-LARGEST_LOGIT: the logit whose sigmoid is p.

    It is computed in float64: probabilities that float32 rounds to 1 would lose their order.
    """
    log_probability = log_probability.double().clamp(max=0)
    return (log_probability - torch.log(-torch.expm1(log_probability))).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
