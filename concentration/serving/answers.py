"""From logits to what a reader sees: the most probable classes, with their verticals and ancestors.

Shapes: B batch, C all classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from concentration.errors import ConfigError
from concentration.schema import suggest
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class ClassAnswer:
    """A class and its probability; `lineage` are the names from the furthest ancestor down to the class itself."""

    id: str
    name: str
    vertical: str
    probability: float
    lineage: tuple[str, ...]


@dataclass(frozen=True)
class NeighbourAnswer:
    """A class of which images lie near; `similarity` is the cosine of the nearest, `share` its part of the votes."""

    name: str
    similarity: float
    share: float


@dataclass(frozen=True)
class ImageAnswer:
    """What is said of one image; `error` says why nothing is."""

    path: str
    classes: tuple[ClassAnswer, ...] = ()
    neighbours: tuple[NeighbourAnswer, ...] = ()
    error: str | None = None


class Ranking:
    """Which classes are candidates, and how many are named.

    Args:
        best: how many classes are named, in all or of every vertical.
        verticals: the candidates'; none means all.
        classes: `leaves` leaves out classes that have classes below them, which are never less probable.
        is_by_vertical: ranks inside every vertical, verticals by their best class.

    Raises:
        ConfigError: there is no such vertical, or no candidate is left.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        best: int = 5,
        verticals: Sequence[str] = (),
        classes: Literal["leaves", "all"] = "leaves",
        is_by_vertical: bool = False,
    ):
        self._taxonomy = taxonomy
        self._best = best
        for vertical in verticals:
            if vertical not in taxonomy.verticals:
                raise ConfigError(f"verticals={vertical}: no such vertical{suggest(vertical, taxonomy.verticals)}")
        is_candidate_C = taxonomy.is_leaf.copy() if classes == "leaves" else np.ones(taxonomy.num_classes, dtype=bool)
        if verticals:
            numbers = [taxonomy.vertical_number(vertical) for vertical in verticals]
            is_candidate_C &= np.isin(taxonomy.vertical_of_output, numbers)
        outputs = np.flatnonzero(is_candidate_C)
        vertical_of_candidate = taxonomy.vertical_of_output[outputs]
        self._groups = [outputs]
        if is_by_vertical:
            self._groups = [outputs[vertical_of_candidate == number] for number in np.unique(vertical_of_candidate)]

    def rank(self, logits_BC: np.ndarray) -> list[tuple[ClassAnswer, ...]]:
        """The answers of every image, the most probable first; by vertical, the vertical with the best class first."""
        ranked: list[list[np.ndarray]] = [[] for _ in logits_BC]
        for outputs in self._groups:
            scores = logits_BC[:, outputs]
            count = min(self._best, len(outputs))
            best_BK = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            for row, places in enumerate(best_BK):
                order = places[np.lexsort((places, -scores[row, places]))]  # of equal ones the first
                ranked[row].append(outputs[order])
        answers = []
        for logits_C, groups in zip(logits_BC, ranked, strict=True):
            groups.sort(key=lambda group: -logits_C[group[0]])
            answers.append(tuple(self._answer(output, logits_C[output]) for group in groups for output in group))
        return answers

    def _answer(self, output: int, logit: float) -> ClassAnswer:
        c = self._taxonomy.class_of_output(output)
        probability = float(1 / (1 + np.exp(-np.float64(logit))))
        return ClassAnswer(c.id, c.name, c.vertical, probability, self._taxonomy.lineage(output))
