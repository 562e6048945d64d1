"""The best leaf of each vertical, collected from a network's scores; what is done with them, `calibration`, needs no torch.

    answers = VerticalAnswers(taxonomy)
    for scores_BC, labels, ordinals in batches:
        answers.update(scores_BC, labels, ordinals)
    scaling = fit_scaling(answers.compute(), "vertical", "platt")

Shapes: B samples of a batch, C all classes, L leaves of one vertical, M verticals, P labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from concentration.errors import DataError
from concentration.metrics.calibration import Answers
from concentration.metrics.scores import Scores, find_best, pick, place
from concentration.taxonomy import Taxonomy


class VerticalAnswers:
    """Collects `Answers` batch by batch."""

    def __init__(self, taxonomy: Taxonomy):
        self._taxonomy = taxonomy
        slices = [taxonomy.vertical_slice(vertical) for vertical in taxonomy.verticals]
        self._leaves = [outputs.start + np.flatnonzero(taxonomy.is_leaf[outputs]) for outputs in slices]
        self._parts: list[Answers] = []

    def update(
        self,
        scores_BC: Scores,
        label_outputs: Sequence[Sequence[int]],
        ordinal_B: np.ndarray,
        is_outside: bool = False,
    ) -> None:
        """Adds a batch of logits, on any device; samples without a leaf label are left out, unless all are of no class here.

        Raises: as `find`.
        """
        self._parts.append(self.find(scores_BC, label_outputs, ordinal_B, is_outside))

    def find(
        self,
        scores_BC: Scores,
        label_outputs: Sequence[Sequence[int]],
        ordinal_B: np.ndarray,
        is_outside: bool = False,
    ) -> Answers:
        """The answers of a batch, which is not added.

        Raises:
            DataError: a score is NaN or +inf.
        """
        scores_BC = torch.as_tensor(scores_BC).float()
        if scores_BC.numel() and not scores_BC.max() < torch.inf:  # the largest of anything with NaN is NaN
            raise DataError(
                "calibration: a score is NaN or infinite; the network diverged or its checkpoint is damaged"
            )
        taxonomy = self._taxonomy
        pairs = [(row, label) for row, labels in enumerate(label_outputs) for label in labels]
        row_P, output_P = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        vertical_P, is_leaf_P = taxonomy.vertical_of_output[output_P], taxonomy.is_leaf[output_P]
        score_BM, output_BM, num_best_BM = self._find_best(scores_BC)
        shape = score_BM.shape
        is_best_P = is_leaf_P & (pick(scores_BC, row_P, output_P) == score_BM[row_P, vertical_P])
        num_right_BM = np.zeros(shape, dtype=np.int64)
        np.add.at(num_right_BM, (row_P[is_best_P], vertical_P[is_best_P]), 1)
        is_labelled_BM = np.zeros(shape, dtype=bool)
        is_labelled_BM[row_P, vertical_P] = True
        is_right_BM = (num_right_BM > 0) & (num_right_BM == num_best_BM)
        answers = Answers(np.asarray(ordinal_B), score_BM, output_BM, is_right_BM, is_labelled_BM)
        return answers if is_outside else answers.take(np.unique(row_P[is_leaf_P]))

    def _find_best(self, scores_BC: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, M) the score of each vertical's best leaf, which it is, and how many leaves have that score."""
        found = []
        for leaves_L in self._leaves:
            if not len(leaves_L):  # each of its classes has a child in another vertical
                nothing_B = np.zeros(len(scores_BC), dtype=np.int64)
                found.append((np.full(len(scores_BC), -np.inf, dtype=np.float32), nothing_B, nothing_B + 1))
                continue
            score_B, best_B, num_best_B = find_best(scores_BC.index_select(1, place(leaves_L, scores_BC)))
            found.append((score_B, leaves_L[best_B], num_best_B))
        score_BM, output_BM, num_best_BM = (np.stack(parts, axis=1) for parts in zip(*found, strict=True))
        return score_BM, output_BM.astype(np.int32), num_best_BM

    def compute(self) -> Answers:
        """All samples so far. Raises: DataError where there is none."""
        if not sum(map(len, self._parts)):
            raise DataError("calibration: no sample with a leaf label; give a split that has some")
        if len(self._parts) > 1:
            names = Answers.__dataclass_fields__
            self._parts = [Answers(*(np.concatenate([getattr(p, name) for p in self._parts]) for name in names))]
        return self._parts[0]
