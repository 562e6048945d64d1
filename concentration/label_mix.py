"""Soft targets with a share of the labels.

Shapes: B batch, K targets a sample, C all classes, M verticals.
"""

from dataclasses import replace

import numpy as np
import torch

from concentration.targets import SoftTargets


class LabelMix:
    """Mixes a sample's labels into its soft targets: (1 - share) * soft + share * hard.

    It does so only in the verticals in which the sample has a leaf among its labels. Where the labels name inner classes alone,
    they say nothing of the leaves, and the targets stay the teachers'.

    Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, section 2. They add the losses on soft
    and on hard targets; a sigmoid cross-entropy is linear in its target, so their sum is the loss on the mixed target.

    Args:
        share: from 0 (teachers alone) to 1.
        is_leaf_C: bool, in the order of the outputs.
        vertical_of_output_C: int64, the number of each output's vertical.
    """

    def __init__(self, share: float, is_leaf_C: np.ndarray, vertical_of_output_C: np.ndarray):
        self._share = share
        self._is_leaf_C = torch.tensor(is_leaf_C)
        self._vertical_C = torch.tensor(vertical_of_output_C)
        self._num_verticals = int(vertical_of_output_C.max()) + 1

    def to(self, device: torch.device) -> None:
        self._is_leaf_C, self._vertical_C = self._is_leaf_C.to(device), self._vertical_C.to(device)

    def __call__(self, soft: SoftTargets, labels: SoftTargets) -> SoftTargets:
        """The mixed targets. `labels`: of the same samples, each class once, with probability 1; their weights are ignored."""
        known_BK = self._is_leaf_C[labels.index_BK] & (labels.probability_BK > 0)
        num_known_BM = torch.zeros(len(known_BK), self._num_verticals, device=known_BK.device)
        num_known_BM.scatter_add_(1, self._vertical_C[labels.index_BK], known_BK.float())
        share_BM = self._share * (num_known_BM > 0)
        soft_BK = soft.probability_BK * (1 - share_BM.gather(1, self._vertical_C[soft.index_BK]))
        hard_BK = labels.probability_BK * share_BM.gather(1, self._vertical_C[labels.index_BK])
        return replace(
            soft,
            index_BK=torch.cat([soft.index_BK, labels.index_BK], dim=1),
            probability_BK=torch.cat([soft_BK, hard_BK], dim=1),
            background_BM=None if soft.background_BM is None else soft.background_BM * (1 - share_BM),
        )
