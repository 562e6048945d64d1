"""Teachers in the loop: in every step they make the soft targets that would otherwise be stored, in the training's precision.

Shapes: B batch, V classes of one vertical, M verticals, K kept classes of one vertical.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from concentration.label_mix import LabelMix
from concentration.networks.classifier import Classifier
from concentration.targets import SoftTargets, keep_top_k


class RoutedTeachers:
    """One frozen teacher per vertical. It is no `nn.Module`, because the student's module must not own its teachers.

    Args:
        teachers: in the order of the verticals.
        top_k: K, as in stored targets.
        tail: the targets of classes outside the top K, as in `StoredTargets`.
        mix: mixes in a share of the labels.

    Source: Gao et al., section 3.1 (F_map, Equation 2), without storing the targets.
    """

    def __init__(
        self,
        teachers: Sequence[Classifier],
        top_k: int,
        tail: Literal["zero", "spread"],
        mix: LabelMix | None = None,
    ):
        self._teachers = list(teachers)
        self._sizes = tuple(teacher.num_outputs for teacher in teachers)
        self._top_k = top_k
        self._tail = tail
        self._mix = mix

    def __deepcopy__(self, memo: dict) -> "RoutedTeachers":
        """Itself: an average of a module's weights is a copy of the module, and needs no second copy of the teachers."""
        return self

    def to(self, device: torch.device) -> None:
        self._teachers = [teacher.to(device) for teacher in self._teachers]
        if self._mix is not None:
            self._mix.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: SoftTargets) -> SoftTargets:
        """The targets of images (B, 3, H, W) with these labels, whose weights are kept."""
        routed_BM = self._route(labels)
        kept_M = torch.tensor([min(self._top_k, size) for size in self._sizes], device=images.device)
        # The place where each vertical's classes start in a sample's row.
        start_BM = (routed_BM * kept_M).cumsum(1) - routed_BM * kept_M
        width = int((routed_BM * kept_M).sum(1).max())
        index_BK = torch.zeros(len(images), width, dtype=torch.int64, device=images.device)
        probability_BK = torch.zeros(len(images), width, device=images.device)
        background_BM = torch.zeros(len(images), len(self._sizes), device=images.device)
        first_output = 0
        for number, (teacher, size) in enumerate(zip(self._teachers, self._sizes, strict=True)):
            rows = routed_BM[:, number].nonzero().squeeze(1)
            if len(rows):
                index, probability, tail = keep_top_k(teacher(images[rows]).float().sigmoid(), self._top_k)
                if self._tail == "spread" and size > index.shape[1]:
                    background = tail / (size - index.shape[1])
                    background_BM[rows, number] = background
                    probability = probability - background[:, None]
                columns = start_BM[rows, number, None] + torch.arange(index.shape[1], device=images.device)
                index_BK[rows[:, None], columns] = index + first_output
                probability_BK[rows[:, None], columns] = probability
            first_output += size
        soft = SoftTargets(
            index_BK, probability_BK, background_BM if self._tail == "spread" else None, labels.weight_BM
        )
        return soft if self._mix is None else self._mix(soft, labels)

    def _route(self, labels: SoftTargets) -> Tensor:
        """(B, M) bool: F_map."""
        ends_M = torch.tensor(self._sizes, device=labels.index_BK.device).cumsum(0)
        vertical_BK = torch.bucketize(labels.index_BK, ends_M, right=True)
        count_BM = torch.zeros(len(vertical_BK), len(self._sizes), device=vertical_BK.device)
        return count_BM.scatter_add_(1, vertical_BK, labels.probability_BK) > 0
