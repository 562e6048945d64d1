"""Calibration: held against torchmetrics, scikit-learn, and a slow look at all scores.

Shapes: N samples, C all classes, M verticals.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from concentration.errors import ConfigError, DataError
from concentration.metrics.calibration import (
    Scaling,
    area_under_roc,
    compute_reliability,
    expected_calibration_error,
    find_rejection_threshold,
    find_threshold,
    fit_line,
    fit_scaling,
    log_loss,
    sigmoid,
    winners,
)
from concentration.metrics.evaluation import Evaluator
from concentration.metrics.vertical_answers import VerticalAnswers


def draw(seed: int, num_samples: int, slope: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and whether each is right: with the probability that the true line gives it."""
    rng = np.random.default_rng(seed)
    score_N = rng.normal(0, 2, num_samples)
    return score_N, rng.random(num_samples) < sigmoid(slope * score_N + shift)


def draw_scores(taxonomy, seed: int, num_samples: int, shouts=()) -> tuple[np.ndarray, list[list[int]]]:
    """Logits in which a sample's label stands out, and in some verticals everything is louder."""
    rng = np.random.default_rng(seed)
    leaves = np.flatnonzero(taxonomy.is_leaf)
    scores_NC = rng.normal(-2, 1.5, (num_samples, taxonomy.num_classes)).astype(np.float32)
    labels = [[int(label)] for label in rng.choice(leaves, num_samples)]
    for row, (label,) in enumerate(labels):
        scores_NC[row, label] += 3
    for vertical in shouts:
        scores_NC[:, taxonomy.vertical_slice(vertical)] += 4
    return scores_NC, labels


def collect(taxonomy, scores_NC, labels, parts: int = 3):
    answers = VerticalAnswers(taxonomy)
    for rows in np.array_split(np.arange(len(labels)), parts):
        answers.update(scores_NC[rows], [labels[row] for row in rows], rows)
    return answers.compute()


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_torchmetrics(seed, num_bins):
    score_N, is_right_N = draw(seed, 500, 0.5, 0.3)
    probability_N = sigmoid(score_N).astype(np.float32).astype(np.float64)
    found = expected_calibration_error(probability_N, is_right_N, num_bins)
    tensors = torch.from_numpy(probability_N).float(), torch.from_numpy(is_right_N).long()
    assert found == pytest.approx(binary_calibration_error(*tensors, num_bins, "l1").item(), abs=1e-5)
    bins = compute_reliability(probability_N, is_right_N, num_bins)
    assert sum(b.num_answers for b in bins) == 500
    assert all(b.low <= b.probability <= b.high for b in bins)


@pytest.mark.parametrize("measure", [expected_calibration_error, compute_reliability, log_loss])
@pytest.mark.parametrize("wrong", [50.0, -0.5, float("nan")])
def test_what_is_no_probability_is_refused(measure, wrong):
    """Percents and logits would have a place in the last or the first bin."""
    with pytest.raises(DataError, match=rf"{wrong} is no probability; expected numbers in \[0, 1\]"):
        measure(np.array([0.5, wrong]), np.array([True, False]))


def test_a_misspelt_form_is_refused():
    """It would be a line through the scores without their shift."""
    with pytest.raises(ConfigError, match="form=plat: expected 'temperature' or 'platt'; did you mean 'platt'"):
        fit_line(*draw(0, 10), "plat")


def test_the_area_under_the_roc_of_nan_is_refused():
    with pytest.raises(DataError, match="a number is NaN"):
        area_under_roc(np.array([0.5, np.nan]), np.array([0.1]))


def test_probabilities_of_0_and_1_have_a_bin():
    bins = compute_reliability(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 10)
    assert [(b.low, b.num_answers, b.share_right) for b in bins] == [(0.0, 1, 0.0), (0.9, 2, 0.5)]


@pytest.mark.parametrize("form", ["platt", "temperature"])
def test_a_line_is_that_of_scikit_learns_logistic_regression(form):
    score_N, is_right_N = draw(0, 2000, 0.7, -1.0)
    slope, shift = fit_line(score_N, is_right_N, form)
    num_right, num_wrong = is_right_N.sum(), (~is_right_N).sum()
    # Platt's soft targets as two weighted samples each.
    target_N = np.where(is_right_N, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    model = LogisticRegression(C=np.inf, fit_intercept=form == "platt", tol=1e-10)
    doubled = np.concatenate([score_N, score_N])[:, None], np.repeat([1, 0], 2000)
    model.fit(*doubled, sample_weight=np.concatenate([target_N, 1 - target_N]))
    assert slope == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert shift == pytest.approx(model.intercept_[0] if form == "platt" else 0.0, rel=1e-4)
    if form == "platt":
        assert (slope, shift) == (pytest.approx(0.7, abs=0.1), pytest.approx(-1.0, abs=0.15))


def test_what_is_separable_one_sided_or_upside_down_has_a_finite_line_that_rises():
    score_N = np.linspace(-30, 40, 50)
    for is_right_N in (score_N > 0, score_N < 0, score_N > 99, score_N < 99):
        for form in ("platt", "temperature"):
            slope, shift = fit_line(score_N, is_right_N, form)
            assert 0 < slope < 100
            assert abs(shift) < 1000
    wrong = fit_line(score_N, score_N < 0, "platt")
    assert sigmoid(wrong[0] * score_N + wrong[1]).mean() == pytest.approx((score_N < 0).mean(), abs=0.05)
    assert fit_line(np.full(3, -np.inf), np.zeros(3, bool), "platt") == (1.0, 0.0)


@given(seed=st.integers(0, 30), slope=st.floats(0.01, 30), shift=st.floats(-20, 20))
def test_scores_that_are_scaled_beforehand_give_the_same_probabilities(seed, slope, shift):
    score_N, is_right_N = draw(seed, 200, 1.3, -0.5)
    fitted = fit_line(score_N, is_right_N, "platt")
    other = fit_line(slope * score_N + shift, is_right_N, "platt")
    np.testing.assert_allclose(
        fitted[0] * score_N + fitted[1], other[0] * (slope * score_N + shift) + other[1], atol=1e-4
    )


def test_the_best_leaves_of_verticals_are_found_in_any_batches(taxonomy):
    scores_NC, labels = draw_scores(taxonomy, 1, 60)
    labels[3] = [taxonomy.output("bird")]  # no leaf: it says not which leaf is right
    labels[4] = [taxonomy.output("gull"), taxonomy.output("taxi")]
    answers = collect(taxonomy, scores_NC, labels)
    assert answers.ordinal_N.tolist() == [row for row in range(60) if row != 3]
    for place, row in enumerate(answers.ordinal_N):
        for number, vertical in enumerate(taxonomy.verticals):
            outputs = taxonomy.vertical_slice(vertical)
            leaves = [o for o in range(outputs.start, outputs.stop) if taxonomy.is_leaf[o]]
            best = max(leaves, key=lambda output, row=row: scores_NC[row, output])
            assert answers.output_NM[place, number] == best
            assert answers.score_NM[place, number] == scores_NC[row, best]
            assert answers.is_right_NM[place, number] == (best in labels[row])
            assert answers.is_labelled_NM[place, number] == any(o in labels[row] for o in leaves)
    whole = collect(taxonomy, scores_NC, labels, parts=1)
    assert all(np.array_equal(*pair) for pair in zip(vars(answers).values(), vars(whole).values(), strict=True))


def test_top1_before_scaling_is_the_evaluations(taxonomy):
    scores_NC, labels = draw_scores(taxonomy, 2, 300, shouts=["cars"])
    scores_NC = scores_NC.round()  # with many ties
    evaluator = Evaluator(taxonomy)
    evaluator.update(scores_NC, labels)
    found = winners(collect(taxonomy, scores_NC, labels), Scaling.identity(taxonomy.num_verticals))
    assert found.is_right_N.mean() == pytest.approx(evaluator.compute().top1)


@pytest.mark.parametrize("form", ["platt", "temperature"])
def test_the_winner_is_the_best_calibrated_leaf_of_all_classes(taxonomy, form):
    scores_NC, labels = draw_scores(taxonomy, 3, 400, shouts=["dishes"])
    answers = collect(taxonomy, scores_NC, labels)
    scaling = fit_scaling(answers, "vertical", form)
    assert (scaling.slope_M > 0).all()
    calibrated_NC = np.where(taxonomy.is_leaf, scaling.scale(scores_NC, taxonomy.vertical_of_output), -np.inf)
    found = winners(answers, scaling)
    assert found.output_N.tolist() == calibrated_NC.argmax(1).tolist()
    np.testing.assert_allclose(found.probability_N, sigmoid(calibrated_NC.max(1)), rtol=1e-6)
    assert found.is_right_N.tolist() == [o in label for o, label in zip(found.output_N, labels, strict=True)]


@pytest.mark.parametrize("form", ["platt", "temperature"])
def test_a_vertical_without_a_sample_of_its_own_takes_the_line_of_the_others(taxonomy, form):
    """Not a line by which it is never right."""
    scores_NC, labels = draw_scores(taxonomy, 4, 3000)
    unseen = taxonomy.verticals.index("dishes")
    leaves = range(*taxonomy.vertical_slice("dishes").indices(taxonomy.num_classes))
    is_kept_N = np.array([not set(leaves) & set(of_sample) for of_sample in labels])
    answers = collect(taxonomy, scores_NC, labels)
    val = answers.take(is_kept_N)
    assert not val.is_labelled_NM[:, unseen].any()
    asked = answers.take(~is_kept_N)
    share_right = winners(asked, fit_scaling(val, "vertical", form)).is_right_N.mean()
    whole = fit_scaling(answers, "vertical", form)
    assert share_right > winners(asked, whole).is_right_N.mean() - 0.1


def test_a_vertical_that_shouts_is_lowered_and_answers_become_right_as_often_as_they_say(taxonomy):
    shouting = [draw_scores(taxonomy, seed, 3000, shouts=["dishes"]) for seed in (4, 5)]
    quiet = draw_scores(taxonomy, 5, 3000)
    val, test = (collect(taxonomy, *each) for each in shouting)
    nothing = Scaling.identity(taxonomy.num_verticals)
    before, healthy = winners(test, nothing), winners(collect(taxonomy, *quiet), nothing)
    after = winners(test, fit_scaling(val, "vertical", "platt"))
    assert before.is_right_N.mean() < healthy.is_right_N.mean() - 0.2
    assert after.is_right_N.mean() > healthy.is_right_N.mean() - 0.03
    errors = [expected_calibration_error(w.probability_N, w.is_right_N) for w in (before, after)]
    assert errors[0] > 0.2
    assert errors[1] < 0.05
    alike = winners(test, fit_scaling(val, "global", "platt"))
    assert alike.is_right_N.tolist() == before.is_right_N.tolist(), "one line for all changes no answer"
    assert errors[1] < expected_calibration_error(alike.probability_N, alike.is_right_N) < 0.1
    losses = [log_loss(w.probability_N, w.is_right_N) for w in (before, alike, after)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("decimals", [1, 6])
def test_a_threshold_is_the_lowest_of_scikit_learns_curve(precision, decimals):
    score_N, is_right_N = draw(6, 400)
    probability_N = sigmoid(score_N).round(decimals)
    precisions, _, thresholds = precision_recall_curve(is_right_N, probability_N)
    for min_answers in (1, 30):
        num_N = np.array([(probability_N >= t).sum() for t in thresholds])
        expected = thresholds[(precisions[:-1] >= precision) & (num_N >= min_answers)]
        found = find_threshold(probability_N, is_right_N, precision, min_answers)
        assert found == (pytest.approx(expected.min()) if len(expected) else None)
    assert find_threshold(probability_N[:0], is_right_N[:0], precision, 1) is None


@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), min_size=1, max_size=60), st.floats(0, 0.99))
def test_no_more_are_rejected_than_is_allowed(values, rate):
    probability_N = np.array(values)
    threshold = find_rejection_threshold(probability_N, rate)
    assert (probability_N < threshold).mean() <= rate
    higher = np.sort(probability_N[probability_N > threshold])[:1]
    assert not len(higher) or (probability_N < higher[0]).mean() > rate, "a higher one would reject too many"


def test_the_area_under_the_roc_is_scikit_learns():
    rng = np.random.default_rng(7)
    inside_N, outside_N = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, 150).round(1)
    truth = np.repeat([1, 0], [200, 150])
    assert area_under_roc(inside_N, outside_N) == pytest.approx(roc_auc_score(truth, np.r_[inside_N, outside_N]))


def test_a_vertical_that_is_left_out_is_never_the_answer(taxonomy):
    answers = collect(taxonomy, *draw_scores(taxonomy, 8, 50))
    found = winners(answers.without(1), Scaling.identity(taxonomy.num_verticals))
    assert not (found.vertical_N == 1).any()


def test_outside_samples_are_kept_without_labels_and_broken_scores_are_refused(taxonomy):
    answers = VerticalAnswers(taxonomy)
    with pytest.raises(DataError, match="no sample with a leaf label"):
        answers.compute()
    scores_NC = np.zeros((4, taxonomy.num_classes), dtype=np.float32)
    answers.update(scores_NC, [()] * 4, np.arange(4), is_outside=True)
    found = answers.compute()
    assert len(found) == 4
    assert not found.is_right_NM.any()
    for bad in (np.nan, np.inf):
        scores_NC[1, 2] = bad
        with pytest.raises(DataError, match="a score is NaN or infinite"):
            answers.update(scores_NC, [()] * 4, np.arange(4), is_outside=True)
