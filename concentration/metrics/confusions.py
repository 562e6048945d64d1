"""Which classes, and which verticals, a network takes for which others.

Shapes: B samples of a batch, C all classes, M verticals, L leaves.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from concentration.taxonomy import Taxonomy


class Confusion(NamedTuple):
    """`count` samples of the class (or vertical) `label` have `answer` as the best leaf (or its vertical)."""

    label: int
    answer: int
    count: int


class Confusions:
    """Counts, for samples with a leaf label, the best leaf of the whole taxonomy against the label.

    Attributes:
        num_samples: with a leaf label.
        vertical_MM: (M, M) samples by the vertical of their first leaf label and of the best leaf, right ones too.
    """

    def __init__(self, taxonomy: Taxonomy):
        self._taxonomy = taxonomy
        self._leaves_L = np.flatnonzero(taxonomy.is_leaf)
        self._pairs: Counter[tuple[int, int]] = Counter()
        self.num_samples = 0
        self.vertical_MM = np.zeros((taxonomy.num_verticals, taxonomy.num_verticals), dtype=np.int64)

    def update(self, scores_BC: np.ndarray, label_outputs: Sequence[Sequence[int]]) -> None:
        """Adds a batch: scores by output, and the direct labels of every sample."""
        best_B = self._leaves_L[scores_BC[:, self._leaves_L].argmax(1)]
        for best, labels in zip(best_B.tolist(), label_outputs, strict=True):
            leaves = [label for label in labels if self._taxonomy.is_leaf[label]]
            if not leaves:
                continue
            self.num_samples += 1
            is_right = best in leaves
            label = best if is_right else leaves[0]
            vertical_of = self._taxonomy.vertical_of_output
            self.vertical_MM[vertical_of[label], vertical_of[best]] += 1
            if not is_right:
                self._pairs[label, best] += 1

    @property
    def num_right(self) -> int:
        return self.num_samples - self._pairs.total()

    def worst_classes(self, count: int) -> list[Confusion]:
        """The most frequent pairs of outputs."""
        ordered = sorted(self._pairs.items(), key=lambda item: (-item[1], item[0]))
        return [Confusion(label, answer, number) for (label, answer), number in ordered[:count]]

    def worst_verticals(self, count: int) -> list[Confusion]:
        """The most frequent pairs of two different verticals."""
        labels, answers = np.nonzero(self.vertical_MM)
        found = [
            Confusion(i, j, int(self.vertical_MM[i, j])) for i, j in zip(labels.tolist(), answers.tolist(), strict=True)
        ]
        wrong = [pair for pair in found if pair.label != pair.answer]
        return sorted(wrong, key=lambda pair: (-pair.count, pair[:2]))[:count]
