"""Two networks before the same images: where they give the same answer, and which of them is right where they do not.

Shapes: B samples of a batch, M verticals, P (sample, vertical it has a label in) pairs, N samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from concentration.metrics.calibration import Answers, Scaling, winners


@dataclass(frozen=True)
class LeafAnswers:
    """What a network answers, by leaf: among the leaves of each vertical that a sample is labelled in, and among all.

    Attributes:
        sample_P, vertical_P: int64, int32; which sample, and which vertical of the whole taxonomy.
        class_P: int32, the best leaf there, by its position in the taxonomy, which stays when classes come.
        is_right_P: bool.
        sample_N, class_N, is_right_N: the same of the best leaf of all.
    """

    sample_P: np.ndarray
    vertical_P: np.ndarray
    class_P: np.ndarray
    is_right_P: np.ndarray
    sample_N: np.ndarray
    class_N: np.ndarray
    is_right_N: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["LeafAnswers"]) -> "LeafAnswers":
        """All parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}


def select_leaf_answers(answers: Answers, position_C: np.ndarray, first_vertical: int = 0) -> LeafAnswers:
    """The answers of a batch.

    Args:
        answers: of the network's own outputs.
        position_C: position in the whole taxonomy of each of them.
        first_vertical: the number of the first of its verticals.
    """
    row_P, vertical_P = np.nonzero(answers.is_labelled_NM)
    best = winners(answers, Scaling.identity(answers.score_NM.shape[1]))
    return LeafAnswers(
        answers.ordinal_N[row_P].astype(np.int64),
        (vertical_P + first_vertical).astype(np.int32),
        position_C[answers.output_NM[row_P, vertical_P]].astype(np.int32),
        answers.is_right_NM[row_P, vertical_P],
        answers.ordinal_N.astype(np.int64),
        position_C[best.output_N].astype(np.int32),
        best.is_right_N,
    )


@dataclass(frozen=True)
class Agreement:
    """Of the samples that both have answered: how many, with the same answer, and which of the two is right alone."""

    num_samples: int
    same: int
    only_first_right: int
    only_second_right: int


def compare_in_verticals(first: LeafAnswers, second: LeafAnswers) -> Mapping[int, Agreement]:
    """By the number of each vertical in which both have answers."""
    width = 1 + max(int(answers.vertical_P.max(initial=0)) for answers in (first, second))
    keys = [answers.sample_P * width + answers.vertical_P for answers in (first, second)]
    _, at_first, at_second = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    vertical_P = first.vertical_P[at_first]
    return {
        int(number): _count(
            (first.class_P[at_first], first.is_right_P[at_first]),
            (second.class_P[at_second], second.is_right_P[at_second]),
            vertical_P == number,
        )
        for number in np.unique(vertical_P)
    }


def compare_overall(first: LeafAnswers, second: LeafAnswers) -> Agreement:
    """Of the best leaves over all classes."""
    _, at_first, at_second = np.intersect1d(first.sample_N, second.sample_N, assume_unique=True, return_indices=True)
    return _count(
        (first.class_N[at_first], first.is_right_N[at_first]),
        (second.class_N[at_second], second.is_right_N[at_second]),
        np.ones(len(at_first), dtype=bool),
    )


def _count(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], chosen: np.ndarray
) -> Agreement:
    (class_of_first, first_is_right), (class_of_second, second_is_right) = (
        (of_class[chosen], is_right[chosen]) for of_class, is_right in (first, second)
    )
    return Agreement(
        int(chosen.sum()),
        int((class_of_first == class_of_second).sum()),
        int((first_is_right & ~second_is_right).sum()),
        int((second_is_right & ~first_is_right).sum()),
    )
