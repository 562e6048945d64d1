"""Turns logits into answers: the most probable classes, with their verticals and ancestors.

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
        is_sure: whether the probability reaches the threshold from which on answers have the precision that was asked of
            `concentrate calibrate`; None without a calibration.
    """

    id: str
    name: str
    vertical: str
    probability: float
    lineage: tuple[str, ...]
    is_sure: bool | None = None


@dataclass(frozen=True)
class NeighbourAnswer:
    """A class that has images among the nearest neighbours.

    Attributes:
        similarity: the cosine similarity of its nearest image.
        share: its share of the neighbours' votes.
    """

    name: str
    similarity: float
    share: float


@dataclass(frozen=True)
class ImageAnswer:
    """The answer to one image.

    Attributes:
        path: what the image is called.
        classes: the most probable classes.
        none_of_these: whether the image probably shows none of the classes, because even the most probable leaf is below the
            calibration's threshold; None without a calibration.
        neighbours: the classes of the nearest neighbours; none without an index.
        error: why there is no answer; None if there is one.
    """

    path: str
    classes: tuple[ClassAnswer, ...] = ()
    none_of_these: bool | None = None
    neighbours: tuple[NeighbourAnswer, ...] = ()
    error: str | None = None


class Ranked(NamedTuple):
    """The part of an `ImageAnswer` that comes from the network."""

    classes: tuple[ClassAnswer, ...]
    none_of_these: bool | None


class Ranking:
    """Chooses the classes that an answer names.

    Args:
        taxonomy: the classes of the network.
        best: how many classes are named; with `is_by_vertical`, how many of each vertical.
        verticals: the verticals whose classes may be named; empty for all.
        classes: whether all classes may be named, or only leaves. An ancestor is as a rule more probable than its descendants.
        is_by_vertical: whether classes are ranked inside each vertical, and verticals by their best class.
        calibration: corrects the probabilities and makes verticals comparable; None leaves them as they are.

    Raises:
        ConfigError: a vertical does not exist.
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
        """The answer to each image: classes by falling probability or, by vertical, first the vertical with the best class.

        Args:
            logits_BC: float32, from the network.
        """
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
                order = places[np.lexsort((places, -scores[row, places]))]  # of equal scores the lower output first
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
