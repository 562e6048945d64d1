"""From logits to what a reader sees: the most probable classes, with their verticals and ancestors.

Shapes: B batch, C all classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from concentration.errors import ConfigError
from concentration.metrics.calibration import sigmoid
from concentration.schema import suggest
from concentration.serving.calibration import Calibration
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class ClassAnswer:
    """A class and its probability.

    Attributes:
        lineage: the names from the furthest ancestor down to the class itself.
        is_sure: whether the probability reaches the threshold from which on such answers are right as often as was wanted of
            the calibration; None without one.
    """

    id: str
    name: str
    vertical: str
    probability: float
    lineage: tuple[str, ...]
    is_sure: bool | None = None


@dataclass(frozen=True)
class NeighbourAnswer:
    """A class of which images lie near; `similarity` is the cosine of the nearest, `share` its part of the votes."""

    name: str
    similarity: float
    share: float


@dataclass(frozen=True)
class ImageAnswer:
    """What is said of one image.

    Attributes:
        none_of_these: whether the best of all leaves is less probable than images of the taxonomy are; None without a
            calibration.
        error: why nothing is said.
    """

    path: str
    classes: tuple[ClassAnswer, ...] = ()
    none_of_these: bool | None = None
    neighbours: tuple[NeighbourAnswer, ...] = ()
    error: str | None = None


class Ranked(NamedTuple):
    """As in `ImageAnswer`."""

    classes: tuple[ClassAnswer, ...]
    none_of_these: bool | None


class Ranking:
    """Which classes are candidates, and how many are named.

    Args:
        best: how many classes are named, in all or of every vertical.
        verticals: the candidates'; none means all.
        classes: `leaves` leaves out classes that have classes below them, which are never less probable.
        is_by_vertical: ranks inside every vertical, verticals by their best class.
        calibration: makes verticals comparable and probabilities true.

    Raises:
        ConfigError: there is no such vertical.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        best: int = 5,
        verticals: Sequence[str] = (),
        classes: Literal["leaves", "all"] = "leaves",
        is_by_vertical: bool = False,
        calibration: Calibration | None = None,
    ):
        self._taxonomy = taxonomy
        self._best = best
        self._calibration = calibration
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

    def rank(self, logits_BC: np.ndarray) -> list[Ranked]:
        """The answers of every image, the most probable first; by vertical, the vertical with the best class first."""
        is_none_B: Sequence[bool | None] = [None] * len(logits_BC)
        if self._calibration is not None:
            logits_BC = self._calibration.scale(logits_BC, self._taxonomy)
            is_none_B = sigmoid(logits_BC[:, self._taxonomy.is_leaf].max(axis=1)) < self._calibration.rejection
        ranked: list[list[np.ndarray]] = [[] for _ in logits_BC]
        for outputs in self._groups:
            scores = logits_BC[:, outputs]
            count = min(self._best, len(outputs))
            best_BK = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            for row, places in enumerate(best_BK):
                order = places[np.lexsort((places, -scores[row, places]))]  # of equal ones the first
                ranked[row].append(outputs[order])
        answers = []
        for logits_C, groups, is_none in zip(logits_BC, ranked, is_none_B, strict=True):
            groups.sort(key=lambda group: -logits_C[group[0]])
            classes = tuple(self._answer(output, logits_C[output]) for group in groups for output in group)
            answers.append(Ranked(classes, None if is_none is None else bool(is_none)))
        return answers

    def _answer(self, output: int, logit: float) -> ClassAnswer:
        c = self._taxonomy.class_of_output(output)
        probability = float(sigmoid(np.float64(logit)))
        is_sure = None if self._calibration is None else bool(probability >= self._calibration.threshold_C[output])
        return ClassAnswer(c.id, c.name, c.vertical, probability, self._taxonomy.lineage(output), is_sure)
