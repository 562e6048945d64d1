"""Average precision of every class, as scikit-learn defines it, and its means over classes.

Shapes: B samples, C all classes, V classes of one vertical, P positive (sample, class) pairs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from concentration.errors import DataError
from concentration.metrics.scores import Scores, pick, place

#: Columns that are copied and sorted together: enough to read whole cache lines, few enough to stay small.
COLUMNS_PER_BLOCK = 64

#: Scores that a GPU turns and sorts together.
SCORES_PER_SORT = 1 << 24

Frequency = Literal["few", "some", "many"]


@dataclass(frozen=True)
class FrequencyGroup:
    """The classes of one range of training counts: their mean AP (NaN without a class) and how many were averaged."""

    ap: float
    num_classes: int


def average_precision(scores_BV: np.ndarray, positive_BV: np.ndarray) -> np.ndarray:
    """How well every class's scores rank its positive samples before the others.

    AP is the sum over thresholds of (recall gained) x (precision there), not interpolated; samples of one score are one
    threshold. Only the order inside a column counts, so logits and probabilities give the same.

    Args:
        scores_BV: (B, V) numbers, higher is more likely; infinities are allowed and are ordinary values.
        positive_BV: (B, V) bool or 0/1.

    Returns:
        (V,) float64 in (0, 1]; NaN for a class without a positive.

    Raises:
        DataError: a score is NaN, the shapes differ, or a positive is something else than 0 and 1.

    Source: `sklearn.metrics.average_precision_score`, per column.
    """
    scores_BV, positive_BV = np.asarray(scores_BV), np.asarray(positive_BV)
    if scores_BV.ndim != 2 or scores_BV.shape != positive_BV.shape:
        raise DataError(
            f"average precision: scores have the shape {scores_BV.shape} and positives {positive_BV.shape}; "
            "expected (samples, classes) for both"
        )
    is_other_BV = (positive_BV != 0) & (positive_BV != 1)
    if is_other_BV.any():
        raise DataError(
            f"average precision: positives hold {positive_BV[is_other_BV][0]!s}; expected booleans, or 0 and 1"
        )
    row_P, column_P = np.nonzero(positive_BV)
    return average_precision_of_pairs(scores_BV, row_P, column_P)


def average_precision_of_pairs(
    scores_BV: Scores, row_P: np.ndarray, column_P: np.ndarray, offset_B: np.ndarray | None = None
) -> np.ndarray:
    """`average_precision` for sparse positives: sample `row_P[i]` is positive for class `column_P[i]`.

    It is the mean over a class's positives of the precision at their own score, where everything of that score is included:
    scikit-learn's sum over thresholds, since a threshold with n positives gains n/P of recall.

    Args:
        scores_BV: (B, V) numbers, on any device, whose work is done there.
        row_P, column_P: (P,) integers; no pair may come twice.
        offset_B: (B,) subtracted from all scores of a sample, without a second (B, V) array: its log-sum-exp turns
            logits into log-softmax.

    Returns:
        (V,) float64; NaN for a class without a positive.

    Raises:
        DataError: a score is NaN.
    """
    scores_BV = torch.as_tensor(scores_BV)
    score_P = pick(scores_BV, row_P, column_P)
    if offset_B is not None:
        score_P = score_P - offset_B[row_P]
    order = np.lexsort((score_P, column_P))
    score_P = score_P[order]
    start_V = np.concatenate([[0], np.cumsum(np.bincount(column_P, minlength=scores_BV.shape[1]))])
    if scores_BV.device.type == "cpu":
        num_at_least_P = _count_by_column(scores_BV.numpy(), offset_B, score_P, start_V)
    else:
        num_at_least_P = _count_on_device(scores_BV, offset_B, score_P, start_V)
    ap_V = np.full(scores_BV.shape[1], np.nan)
    for column in np.flatnonzero(np.diff(start_V)):
        own = slice(start_V[column], start_V[column + 1])
        ap_V[column] = np.mean(count_at_least(score_P[own], score_P[own]) / num_at_least_P[own])
    return ap_V


def check_not_nan(scores_VB: np.ndarray, first_row: int, first_column: int) -> None:
    """Raises: DataError where a score of this block, (classes, samples), is NaN; and which, counting from its place."""
    if scores_VB.size and np.isnan(scores_VB.max()):  # the largest of anything with NaN is NaN
        column, row = (int(indices[0]) for indices in np.nonzero(np.isnan(scores_VB)))
        raise DataError(
            f"average precision: the score of sample {first_row + row} for class {first_column + column} is NaN; "
            "the network diverged or its checkpoint is damaged"
        )


def count_at_least(sorted_N: np.ndarray, value_P: np.ndarray) -> np.ndarray:
    """(P,) how many of the rising numbers are at least as large as each value."""
    return sorted_N.size - np.searchsorted(sorted_N, value_P, side="left")


def mean_average_precision(ap_V: np.ndarray) -> float:
    """The mean over the classes with a positive, that is, over what is not NaN; NaN where there is none."""
    known = np.asarray(ap_V)[~np.isnan(ap_V)]
    return float(known.mean()) if known.size else float("nan")


def average_precision_by_frequency(
    ap_C: np.ndarray, train_counts_C: np.ndarray, few: int = 20, many: int = 100
) -> dict[Frequency, FrequencyGroup]:
    """The mean AP of the classes with few (< `few`), some, and many (> `many`) training images.

    Args:
        ap_C: (C,) NaN for a class without a positive in the evaluated split: it is left out of mean and count.
        train_counts_C: (C,) number of training images of every class.

    Raises:
        DataError: the shapes differ.

    Source: Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World", section 5: many-shot (more than
        100), medium-shot (20 to 100) and few-shot (under 20) classes.
    """
    ap_C, train_counts_C = np.asarray(ap_C), np.asarray(train_counts_C)
    if ap_C.shape != train_counts_C.shape:
        raise DataError(
            f"AP by frequency: {ap_C.size} classes but {train_counts_C.size} training counts; count with this taxonomy"
        )
    is_few_C, is_many_C = train_counts_C < few, train_counts_C > many
    members: dict[Frequency, np.ndarray] = {"few": is_few_C, "some": ~is_few_C & ~is_many_C, "many": is_many_C}
    return {
        name: FrequencyGroup(mean_average_precision(ap_C[is_member_C]), int((~np.isnan(ap_C[is_member_C])).sum()))
        for name, is_member_C in members.items()
    }


def _count_by_column(
    scores_BV: np.ndarray, offset_B: np.ndarray | None, score_P: np.ndarray, start_V: np.ndarray
) -> np.ndarray:
    """(P,) how many samples score at least as high as each positive for its class.

    score_P, start_V: the positives by class, and where each class's begin; in a class they rise.
    """
    num_at_least_P = np.zeros(len(score_P), dtype=np.int64)
    for first in range(0, scores_BV.shape[1], COLUMNS_PER_BLOCK):
        scores_VB = np.ascontiguousarray(scores_BV[:, first : first + COLUMNS_PER_BLOCK].T)
        check_not_nan(scores_VB, first_row=0, first_column=first)
        if offset_B is not None:
            scores_VB = scores_VB - offset_B
        for column, scores_B in enumerate(scores_VB, start=first):
            own = slice(start_V[column], start_V[column + 1])
            if own.start < own.stop:
                num_at_least_P[own] = count_at_least(np.sort(scores_B), score_P[own])
    return num_at_least_P


def _count_on_device(
    scores_BV: Tensor, offset_B: np.ndarray | None, score_P: np.ndarray, start_V: np.ndarray
) -> np.ndarray:
    """The same for many columns at a time."""
    num_samples, num_classes = scores_BV.shape
    offset_B = None if offset_B is None else place(offset_B, scores_BV)
    num_at_least_P = np.zeros(len(score_P), dtype=np.int64)
    width = max(1, SCORES_PER_SORT // max(1, num_samples))
    for first in range(0, num_classes, width):
        scores_VB = scores_BV[:, first : first + width].T.contiguous()
        if scores_VB.numel() and scores_VB.max().isnan():  # the largest of anything with NaN is NaN
            check_not_nan(scores_VB.cpu().numpy(), first_row=0, first_column=first)
        if offset_B is not None:
            scores_VB = scores_VB - offset_B
        start_W = start_V[first : first + width + 1]
        own = slice(start_W[0], start_W[-1])
        # The positives of each column in a row of their own, filled up with numbers that are not looked at.
        column_P = np.repeat(np.arange(len(start_W) - 1), np.diff(start_W))
        place_P = np.arange(own.start, own.stop) - start_W[:-1][column_P]
        limit_VP = np.zeros((len(scores_VB), np.diff(start_W).max(initial=0)), dtype=score_P.dtype)
        limit_VP[column_P, place_P] = score_P[own]
        below_VP = torch.searchsorted(scores_VB.sort(dim=1).values, place(limit_VP, scores_BV)).cpu().numpy()
        num_at_least_P[own] = num_samples - below_VP[column_P, place_P]
    return num_at_least_P
