"""Calibration: a slope and shift of the logits of each vertical that make probabilities true, and verticals comparable.

    answers = vertical_answers.compute()  # of VerticalAnswers, from scores
    scaling = fit_scaling(answers, "vertical", "platt")
    found = winners(answers, scaling)
    print(found.is_right_N.mean(), expected_calibration_error(found.probability_N, found.is_right_N))

Since slopes are positive, a vertical's classes keep their order, so the best answer over all classes is always the best leaf of
one of the verticals. Only these best leaves are kept: 10 bytes per sample and vertical, for any number of classes.

Shapes: B samples of a batch, N samples with a leaf label, C all classes, M verticals.

Source: temperature scaling of Guo et al. 2017; Platt 1999, with his smoothed targets. Only the probability of the answer is
calibrated, not those of all classes: "top-label" calibration of Gupta and Ramdas 2022.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from concentration.errors import DataError
from concentration.schema import check_choice
from concentration.taxonomy import Taxonomy

#: Whether all verticals share a slope and shift, or each has its own.
Scope = Literal["global", "vertical"]
#: Whether there is only a slope (the inverse of a temperature), or a slope and a shift.
Form = Literal["temperature", "platt"]

#: The smallest slope. A vertical whose scores say nothing of what is right, or the opposite, gets it and only a shift is fitted.
SMALLEST_SLOPE = 1e-3

#: The most steps of Newton's method. Ten are enough for data that is not separable, and smoothed targets never are.
MAX_STEPS = 100


@dataclass(frozen=True)
class Answers:
    """The best leaf of each vertical for every sample that has a leaf label.

    Attributes:
        ordinal_N: int64, the sample's ordinal in its split.
        score_NM: float32, the logit of the best leaf; -inf if the vertical was not computed for this sample.
        output_NM: int32, the best leaf.
        is_right_NM: bool, whether the best leaf is a label of the sample, and no leaf with the same score is none.
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
        """The answers of some samples, given by a mask (N,) or by their places."""
        return Answers(*(getattr(self, name)[samples] for name in self.__dataclass_fields__))

    def without(self, vertical: int) -> "Answers":
        """The answers if the vertical with this number did not exist: none of its leaves is ever the best."""
        score_NM = self.score_NM.copy()
        score_NM[:, vertical] = -np.inf
        return Answers(self.ordinal_N, score_NM, self.output_NM, self.is_right_NM, self.is_labelled_NM)


@dataclass(frozen=True)
class Scaling:
    """The calibration of each vertical: calibrated logit = slope * logit + shift.

    Attributes:
        slope_M: float64, positive.
        shift_M: float64.
    """

    slope_M: np.ndarray
    shift_M: np.ndarray

    @classmethod
    def identity(cls, num_verticals: int) -> "Scaling":
        """The scaling that changes nothing."""
        return cls(np.ones(num_verticals), np.zeros(num_verticals))

    def then(self, slope: float, shift: float) -> "Scaling":
        """This scaling, and then a slope and shift that are the same for all verticals."""
        return Scaling(slope * self.slope_M, slope * self.shift_M + shift)

    def scale_best(self, score_NM: np.ndarray) -> np.ndarray:
        """The calibrated logits of the verticals' best leaves, (N, M) float64."""
        return self.slope_M * score_NM.astype(np.float64) + self.shift_M

    def scale(self, scores_BC: np.ndarray, vertical_of_output: np.ndarray) -> np.ndarray:
        """The calibrated logits of all classes, (B, C); their sigmoids are the probabilities of the classes.

        Args:
            scores_BC: logits.
            vertical_of_output: (C,) integers, the vertical of each class.
        """
        return self.slope_M[vertical_of_output] * scores_BC + self.shift_M[vertical_of_output]


def load_scaling(content: Mapping[str, Any], taxonomy: Taxonomy) -> Scaling:
    """The scaling of a calibration file.

    Args:
        content: the content of calibrations/NAME.json.
        taxonomy: the taxonomy of the logits.

    Raises:
        DataError: the calibration was made for other verticals than those of `taxonomy`.
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
    """The best answer over all classes for each sample.

    Attributes:
        probability_N: float64, its calibrated probability.
        vertical_N: int64, the vertical that it is of.
        output_N: int32, the leaf.
        is_right_N: bool, whether it is a label of the sample; as in `metrics.ranking`, a wrong leaf with the same score makes
            it wrong.
    """

    probability_N: np.ndarray
    vertical_N: np.ndarray
    output_N: np.ndarray
    is_right_N: np.ndarray


def winners(answers: Answers, scaling: Scaling) -> Winners:
    """The best answer of each sample: the best among the best leaves of the verticals, after scaling."""
    logit_NM = scaling.scale_best(answers.score_NM)
    vertical_N, rows = logit_NM.argmax(axis=1), np.arange(len(answers))
    best_N = logit_NM[rows, vertical_N]
    is_tied_wrong_N = ((logit_NM == best_N[:, None]) & ~answers.is_right_NM).any(axis=1)
    return Winners(sigmoid(best_N), vertical_N, answers.output_NM[rows, vertical_N], ~is_tied_wrong_N)


def fit_scaling(answers: Answers, scope: Scope, form: Form) -> Scaling:
    """Fits the scaling under which answers are right as often as their probabilities say.

    With scope `vertical`, a slope and shift of each vertical are first fitted to the score of its best leaf and whether that is
    right, over ALL samples, most of which are of other verticals. This lowers a vertical that gives high scores to images of
    other verticals, and makes the best leaves of the verticals comparable. A vertical without samples of its own would never be
    right; it gets the slope and shift of all others together.

    Then, with either scope, one slope and shift for all verticals are fitted to the best answers: the largest of M estimates
    would otherwise be too confident.

    Args:
        answers: the answers to samples that the network was not trained on.
        scope: `vertical` fits each vertical, and then all; `global` only all.
        form: `temperature` fits no shift.

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
    """The slope and shift of a logistic regression of `is_right_N` on the scores. Scores that are not finite are left out.

    The targets are Platt's: (n + 1) / (n + 2) for each of n right answers and 1 / (m + 2) for each of m wrong ones, so that
    the slope stays finite even if the scores separate right from wrong. A temperature has the shift 0.

    Raises:
        ConfigError: `scope` or `form` is another word.
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
    """The expected calibration error: the mean of |mean probability - share of right answers| over bins, weighted by answers.

    Args:
        probability_N: the probability of each answer.
        is_right_N: bool.
        num_bins: how many bins of equal width [0, 1] is divided into.

    Raises:
        DataError: a probability lies outside [0, 1].

    Source: `torchmetrics.functional.classification.binary_calibration_error` with norm "l1".
    """
    bins = compute_reliability(probability_N, is_right_N, num_bins)
    return sum(abs(b.probability - b.share_right) * b.num_answers for b in bins) / max(1, len(probability_N))


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers whose probability lies between `low` and `high`.

    Attributes:
        low, high: the edges of the bin.
        num_answers: how many answers it has.
        probability: their mean probability.
        share_right: the share of them that is right.
    """

    low: float
    high: float
    num_answers: int
    probability: float
    share_right: float


def compute_reliability(probability_N: np.ndarray, is_right_N: np.ndarray, num_bins: int = 15) -> list[ReliabilityBin]:
    """The bins of a reliability diagram: [0, 1] is divided into bins of equal width, and those with answers are returned.

    Raises:
        DataError: a probability lies outside [0, 1].
    """
    _check_probabilities(probability_N)
    edges = np.linspace(0, 1, num_bins + 1)
    # As in torchmetrics, a probability on an edge belongs to the bin above it, and 1 to the last bin.
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
    """The lowest threshold for which answers with at least that probability have the wanted precision; None if there is none.

    Args:
        probability_N: the probability of each answer.
        is_right_N: bool.
        precision: the share of answers that must be right.
        min_answers: a threshold that leaves fewer answers is not considered, since they prove nothing.

    Source: `sklearn.metrics.precision_recall_curve`.
    """
    order = np.argsort(-probability_N, kind="stable")
    sorted_N = probability_N[order]
    num_N = np.arange(1, len(sorted_N) + 1)
    is_last_N = np.append(sorted_N[1:] < sorted_N[:-1], True)[: len(sorted_N)]  # equal probabilities go together
    is_enough_N = is_last_N & (num_N >= min_answers) & (np.cumsum(is_right_N[order]) >= precision * num_N)
    found = np.flatnonzero(is_enough_N)
    return float(sorted_N[found[-1]]) if len(found) else None


def find_rejection_threshold(probability_N: np.ndarray, false_rejection_rate: float) -> float:
    """The largest threshold below which at most the share `false_rejection_rate` of these probabilities lies.

    Args:
        probability_N: the probabilities of the answers to images that do show a class of the taxonomy.
    """
    return float(np.sort(probability_N)[int(false_rejection_rate * len(probability_N))])


def area_under_roc(inside_N: np.ndarray, outside_N: np.ndarray) -> float:
    """The area under the ROC curve: how probably a random value of `inside_N` is above one of `outside_N`; ties count half.

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
    """The mean negative log-likelihood of whether answers are right, given their probabilities.

    Raises:
        DataError: a probability lies outside [0, 1].
    """
    _check_probabilities(probability_N)
    clipped_N = np.clip(probability_N, 1e-12, 1 - 1e-12)
    return float(-np.log(np.where(is_right_N, clipped_N, 1 - clipped_N)).mean())


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), without overflow for large negative logits."""
    return 0.5 * (1 + np.tanh(0.5 * logit))


def _check_probabilities(probability_N: np.ndarray) -> None:
    """Logits and percents would fall into the first and the last bin without a word."""
    probability_N = np.asarray(probability_N)
    is_one_N = (probability_N >= 0) & (probability_N <= 1)
    if not is_one_N.all():
        raise DataError(f"calibration: {probability_N[~is_one_N][0]!s} is no probability; expected numbers in [0, 1]")


def _minimise(column_ND: np.ndarray, target_N: np.ndarray, offset_N: np.ndarray) -> np.ndarray:
    """The weights (D,) of a logistic regression with soft targets, by Newton's method; a step is halved until it lowers the loss.

    Args:
        column_ND: the D inputs of each sample.
        target_N: the targets, in [0, 1].
        offset_N: added to each logit.
    """
    weight_D = np.zeros(column_ND.shape[1])
    scale_D = np.maximum(np.abs(column_ND).max(axis=0), 1e-12)  # columns scaled to 1 make the Hessian well-conditioned
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
