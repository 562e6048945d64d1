"""Several answers about one image combined into one: those of several networks, of several crops, or of both.

Shapes: B batch, N answers about each sample, C classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

#: `mean` of the probabilities, or their largest.
Combination = Literal["mean", "max"]


def combine_logits(logits_BNC: Tensor, how: Combination) -> Tensor:
    """The logits (B, C) of the combined probabilities, which are the sigmoids of logits (B, N, C).

    The mean is computed from log p and log(1 - p): as float32 sigmoids, all answers that are nearly certain would be tied at 1.
    -inf, a class that was not computed, counts as probability 0.

    Source: Szegedy et al., arXiv 1409.4842, section 7: the mean over crops and networks; the largest over crops was worse.
    """
    if how == "max":
        return logits_BNC.amax(1)
    return torch.logsumexp(logsigmoid(logits_BNC), 1) - torch.logsumexp(logsigmoid(-logits_BNC), 1)
