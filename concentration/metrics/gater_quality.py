"""How a gater shares samples out among experts, and how good its choices are.

Shapes: N samples, E experts.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GaterQuality:
    """Shares are of the N samples; losses are means over them.

    Attributes:
        load: of each expert, the share of the samples that it is the first choice for.
        effective_experts: exp of the entropy of the loads: E where they are even, 1 where one expert gets all.
        largest_load: the largest load as a multiple of an even one.
        agreement: samples that the gater sends to the expert of their own group, the one which such samples trained.
        best_expert: samples that the gater sends to the expert with the lowest loss; 1/E is chance.
        loss_chosen, loss_best, loss_mean: of the chosen expert, of the best one (an oracle's), and of all experts.
    """

    load: list[float]
    effective_experts: float
    largest_load: float
    agreement: float
    best_expert: float
    loss_chosen: float
    loss_best: float
    loss_mean: float
    num_samples: int


def measure_gater(chosen_N: np.ndarray, group_N: np.ndarray, loss_NE: np.ndarray) -> GaterQuality:
    """The quality of the first choices, given each sample's group and every expert's loss for it; N is at least 1."""
    num_samples, num_experts = loss_NE.shape
    load_E = np.bincount(chosen_N, minlength=num_experts) / num_samples
    used = load_E[load_E > 0]
    return GaterQuality(
        load=load_E.tolist(),
        effective_experts=float(np.exp(-(used * np.log(used)).sum())),
        largest_load=float(load_E.max() * num_experts),
        agreement=float((chosen_N == group_N).mean()),
        best_expert=float((loss_NE[np.arange(num_samples), chosen_N] <= loss_NE.min(axis=1)).mean()),
        loss_chosen=float(loss_NE[np.arange(num_samples), chosen_N].mean()),
        loss_best=float(loss_NE.min(axis=1).mean()),
        loss_mean=float(loss_NE.mean()),
        num_samples=num_samples,
    )
