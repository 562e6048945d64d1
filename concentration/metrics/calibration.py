"""Calibration: one slope and shift a vertical that make the probabilities of answers true, and the verticals comparable.

    answers = vertical_answers.compute()  # of VerticalAnswers, from scores
    scaling = fit_scaling(answers, "vertical", "platt")
    found = winners(answers, scaling)
    print(found.is_right_N.mean(), expected_calibration_error(found.probability_N, found.is_right_N))

A rising line of each vertical's own leaves the order of its classes as it is, so that the best answer over all classes is always
one of the verticals' best leaves. These alone are kept: 10 bytes for each sample and vertical, however many classes there are.

Shapes: B samples of a batch, N samples seen, C all classes, M verticals.

Source: temperature scaling of Guo et al. 2017; Platt 1999 with his smoothed targets; that an answer's own probability is what is
calibrated, not all classes', is the "top-label" calibration of Gupta and Ramdas 2022.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from concentration.errors import DataError
from concentration.schema import check_choice
from concentration.taxonomy import Taxonomy

Scope = Literal["global", "vertical"]
Form = Literal["temperature", "platt"]

#: A vertical whose scores say nothing, or the opposite, gets this slope: its order stays, and its shift alone is fitted.
SMALLEST_SLOPE = 1e-3

#: Newton's steps; ten are enough for what is not separable, and the smoothed targets leave nothing separable.
MAX_STEPS = 100


@dataclass(frozen=True)
class Answers:
    """The best leaf of each vertical, of all samples with a leaf label.

    Attributes:
        ordinal_N: int64, which samples.
        score_NM: float32 logits; -inf where a vertical was not computed for a sample.
        output_NM: int32, which leaf.
        is_right_NM: bool, whether it is a label of the sample; a wrong leaf of the same score makes it wrong.
        is_labelled_NM: bool, whether the sample has a label in the vertical.
    """

    ordinal_N: np.ndarray
    score_NM: np.ndarray
    output_NM: np.ndarray
    is_right_NM: np.ndarray
    is_labelled_NM: np.ndarray

    def __len__(self) -> int:
        return len(self.ordinal_N)

    def take(self, samples: np.ndarray) -> "Answers":
        """These samples only: a mask (N,) or numbers."""
        return Answers(*(getattr(self, name)[samples] for name in self.__dataclass_fields__))

    def without(self, vertical: int) -> "Answers":
        """As if there were no such vertical: none of its leaves is ever an answer."""
        score_NM = self.score_NM.copy()
        score_NM[:, vertical] = -np.inf
        return Answers(self.ordinal_N, score_NM, self.output_NM, self.is_right_NM, self.is_labelled_NM)


@dataclass(frozen=True)
class Scaling:
    """Calibrated logit = slope * logit + shift, by vertical; the slopes are positive."""

    slope_M: np.ndarray
    shift_M: np.ndarray

    @classmethod
    def identity(cls, num_verticals: int) -> "Scaling":
        return cls(np.ones(num_verticals), np.zeros(num_verticals))

    def then(self, slope: float, shift: float) -> "Scaling":
        """Followed by one line that is the same for all verticals."""
        return Scaling(slope * self.slope_M, slope * self.shift_M + shift)

    def scale_best(self, score_NM: np.ndarray) -> np.ndarray:
        """Calibrated logits (N, M) float64 of the verticals' best leaves."""
        return self.slope_M * score_NM.astype(np.float64) + self.shift_M

    def scale(self, scores_BC: np.ndarray, vertical_of_output: np.ndarray) -> np.ndarray:
        """Calibrated logits (B, C) of all classes; their sigmoids are the probabilities that are shown."""
        return self.slope_M[vertical_of_output] * scores_BC + self.shift_M[vertical_of_output]


def load_scaling(content: Mapping[str, Any], taxonomy: Taxonomy) -> Scaling:
    """The scaling of a calibration file, for logits by the output index of this taxonomy.

    Raises:
        DataError: it was made for other verticals.
    """
    by_vertical = content["scaling"]
    if tuple(by_vertical) != taxonomy.verticals:
        raise DataError(
            f"calibration of {content['name']}: for the verticals {', '.join(by_vertical)}, here "
            f"{', '.join(taxonomy.verticals)}; run `concentrate calibrate overwrite=true`"
        )
    slope_M, shift_M = (np.array([line[key] for line in by_vertical.values()]) for key in ("slope", "shift"))
    return Scaling(slope_M, shift_M)


@dataclass(frozen=True)
class Winners:
    """The one answer over all classes of each sample.

    Attributes:
        probability_N: float64.
        vertical_N, output_N: which vertical's, and which leaf.
        is_right_N: bool; a wrong answer of the same score makes it wrong, as `metrics.ranking` has it.
    """

    probability_N: np.ndarray
    vertical_N: np.ndarray
    output_N: np.ndarray
    is_right_N: np.ndarray


def winners(answers: Answers, scaling: Scaling) -> Winners:
    """The verticals' best leaves compared with each other."""
    logit_NM = scaling.scale_best(answers.score_NM)
    vertical_N, rows = logit_NM.argmax(axis=1), np.arange(len(answers))
    best_N = logit_NM[rows, vertical_N]
    is_tied_wrong_N = ((logit_NM == best_N[:, None]) & ~answers.is_right_NM).any(axis=1)
    return Winners(sigmoid(best_N), vertical_N, answers.output_NM[rows, vertical_N], ~is_tied_wrong_N)


def fit_scaling(answers: Answers, scope: Scope, form: Form) -> Scaling:
    """The scaling under which answers are as often right as their probabilities say.

    `vertical` first fits each vertical's line to (score of its best leaf, whether that is right) over ALL samples, most of which
    are of other verticals: so a vertical that shouts at foreign images is lowered, and the verticals' best leaves can be
    compared. Then, as `global` does at once, one line for all is fitted to the winners, of whom the best of M estimates is
    otherwise too confident. `temperature` has no shift. A vertical without a sample of its own would be found never to be right;
    it takes the line of all others together.

    Raises:
        ConfigError: `scope` or `form` is another word.
    """
    check_choice("scope", scope, Scope)
    scaling = Scaling.identity(answers.score_NM.shape[1])
    if scope == "vertical":
        is_seen_M = answers.is_labelled_NM.any(axis=0)
        score_MN, is_right_MN = answers.score_NM.T, answers.is_right_NM.T
        line_M2 = np.array([fit_line(*each, form) for each in zip(score_MN, is_right_MN, strict=True)])
        if not is_seen_M.all():
            line_M2[~is_seen_M] = fit_line(score_MN[is_seen_M].ravel(), is_right_MN[is_seen_M].ravel(), form)
        scaling = Scaling(*line_M2.T)
    found = winners(answers, scaling)
    best_N = scaling.scale_best(answers.score_NM)[np.arange(len(answers)), found.vertical_N]
    return scaling.then(*fit_line(best_N, found.is_right_N, form))


def fit_line(score_N: np.ndarray, is_right_N: np.ndarray, form: Form) -> tuple[float, float]:
    """Slope and shift of the logistic regression of `is_right_N` on finite scores; no shift for a temperature.

    The targets are Platt's: (n + 1) / (n + 2) of n right ones, 1 / (m + 2) of m wrong ones, so that what is separable has a
    finite line. Raises: ConfigError where `form` is another word.
    """
    check_choice("form", form, Form)
    is_finite_N = np.isfinite(score_N)
    score_N, is_right_N = score_N[is_finite_N].astype(np.float64), is_right_N[is_finite_N]
    if not len(score_N):
        return 1.0, 0.0
    num_right = int(is_right_N.sum())
    target_N = np.where(is_right_N, (num_right + 1) / (num_right + 2), 1 / (len(score_N) - num_right + 2))
    columns = [score_N] if form == "temperature" else [score_N, np.ones_like(score_N)]
    line = _minimise(np.stack(columns, axis=1), target_N, np.zeros(len(score_N)))
    slope, shift = float(line[0]), float(line[1]) if form == "platt" else 0.0
    if slope >= SMALLEST_SLOPE:
        return slope, shift
    if form == "platt":
        shift = float(_minimise(np.ones((len(score_N), 1)), target_N, SMALLEST_SLOPE * score_N)[0])
    return SMALLEST_SLOPE, shift


def expected_calibration_error(probability_N: np.ndarray, is_right_N: np.ndarray, num_bins: int = 15) -> float:
    """The mean distance of probability and share of right answers over bins of equal width, weighted by their samples.

    Raises:
        DataError: a probability lies outside [0, 1].

    Source: `torchmetrics.functional.classification.binary_calibration_error` with norm "l1".
    """
    bins = compute_reliability(probability_N, is_right_N, num_bins)
    return sum(abs(b.probability - b.share_right) * b.num_answers for b in bins) / max(1, len(probability_N))


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers with probabilities from `low` to `high`: how many, their mean probability, and the share that is right."""

    low: float
    high: float
    num_answers: int
    probability: float
    share_right: float


def compute_reliability(probability_N: np.ndarray, is_right_N: np.ndarray, num_bins: int = 15) -> list[ReliabilityBin]:
    """The bins of equal width that have an answer. Raises: DataError where a probability lies outside [0, 1]."""
    _check_probabilities(probability_N)
    edges = np.linspace(0, 1, num_bins + 1)
    # As torchmetrics' bucketize: a probability on an edge belongs to the bin above it, and 1 to the last.
    bin_N = np.clip(np.searchsorted(edges, probability_N, side="right") - 1, 0, num_bins - 1)
    count, right = np.bincount(bin_N, minlength=num_bins), np.bincount(bin_N, is_right_N, minlength=num_bins)
    total = np.bincount(bin_N, probability_N, minlength=num_bins)
    return [
        ReliabilityBin(
            float(edges[b]), float(edges[b + 1]), int(count[b]), float(total[b] / count[b]), float(right[b] / count[b])
        )
        for b in np.flatnonzero(count)
    ]


def find_threshold(
    probability_N: np.ndarray, is_right_N: np.ndarray, precision: float, min_answers: int
) -> float | None:
    """The lowest probability from which on at least this share of the answers is right; None where none is known to be.

    Fewer than `min_answers` answers are no evidence. Source: `sklearn.metrics.precision_recall_curve`.
    """
    order = np.argsort(-probability_N, kind="stable")
    sorted_N = probability_N[order]
    num_N = np.arange(1, len(sorted_N) + 1)
    is_last_N = np.append(sorted_N[1:] < sorted_N[:-1], True)[: len(sorted_N)]  # equal probabilities go together
    is_enough_N = is_last_N & (num_N >= min_answers) & (np.cumsum(is_right_N[order]) >= precision * num_N)
    found = np.flatnonzero(is_enough_N)
    return float(sorted_N[found[-1]]) if len(found) else None


def find_rejection_threshold(probability_N: np.ndarray, false_rejection_rate: float) -> float:
    """The largest threshold below which lies at most this share of the answers to images of the taxonomy."""
    return float(np.sort(probability_N)[int(false_rejection_rate * len(probability_N))])


def area_under_roc(inside_N: np.ndarray, outside_N: np.ndarray) -> float:
    """The chance that an inside sample's number is above an outside sample's, equal ones counting half.

    Raises:
        DataError: a number is NaN.

    Source: `sklearn.metrics.roc_auc_score`.
    """
    if np.isnan(inside_N).any() or np.isnan(outside_N).any():  # sorted, it would count as the largest
        raise DataError("area under the ROC: a number is NaN; leave these samples out")
    inside_N = np.sort(inside_N)
    num_above = len(inside_N) - np.searchsorted(inside_N, outside_N, side="right")
    num_equal = np.searchsorted(inside_N, outside_N, side="right") - np.searchsorted(inside_N, outside_N, side="left")
    return float((num_above + 0.5 * num_equal).sum() / (len(inside_N) * len(outside_N)))


def log_loss(probability_N: np.ndarray, is_right_N: np.ndarray) -> float:
    """The mean negative logarithm of the probability of what came true. Raises: DataError as `compute_reliability`."""
    _check_probabilities(probability_N)
    clipped_N = np.clip(probability_N, 1e-12, 1 - 1e-12)
    return float(-np.log(np.where(is_right_N, clipped_N, 1 - clipped_N)).mean())


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logit))


def _check_probabilities(probability_N: np.ndarray) -> None:
    """Logits and percents would fall into the first and the last bin without a word."""
    probability_N = np.asarray(probability_N)
    is_one_N = (probability_N >= 0) & (probability_N <= 1)
    if not is_one_N.all():
        raise DataError(f"calibration: {probability_N[~is_one_N][0]!s} is no probability; expected numbers in [0, 1]")


def _minimise(column_ND: np.ndarray, target_N: np.ndarray, offset_N: np.ndarray) -> np.ndarray:
    """The weights of a logistic regression with soft targets and an offset, by Newton's method with halved steps."""
    weight_D = np.zeros(column_ND.shape[1])
    scale_D = np.maximum(np.abs(column_ND).max(axis=0), 1e-12)  # the columns' own sizes: the problem is then a mild one
    column_ND = column_ND / scale_D

    def loss(weight_D: np.ndarray) -> float:
        logit_N = column_ND @ weight_D + offset_N
        return float((np.logaddexp(0, logit_N) - target_N * logit_N).mean())

    current = loss(weight_D)
    for _ in range(MAX_STEPS):
        probability_N = sigmoid(column_ND @ weight_D + offset_N)
        gradient_D = column_ND.T @ (probability_N - target_N) / len(target_N)
        curvature_N = probability_N * (1 - probability_N)
        hessian_DD = (column_ND * curvature_N[:, None]).T @ column_ND / len(target_N)
        step_D = np.linalg.solve(hessian_DD + 1e-12 * np.eye(len(weight_D)), gradient_D)
        share = 1.0
        while (after := loss(weight_D - share * step_D)) > current and share > 1e-9:
            share /= 2
        if current - after <= 1e-15:
            break
        weight_D, current = weight_D - share * step_D, after
    return weight_D / scale_D
