"""Average precision against scikit-learn and torchmetrics, and the properties that a ranking metric has."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import multilabel_average_precision

from concentration.errors import DataError
from concentration.metrics.average_precision import (
    average_precision,
    average_precision_by_frequency,
    average_precision_of_pairs,
    mean_average_precision,
)


def reference_ap(scores_BV, positive_BV):
    """scikit-learn, class by class; NaN without a positive."""
    return np.array(
        [
            average_precision_score(positive_B, scores_B) if positive_B.any() else np.nan
            for scores_B, positive_B in zip(scores_BV.T, positive_BV.T, strict=True)
        ]
    )


def draw_scores(rng, shape, kind):
    if kind == "tied":  # seven values, so that every column is full of ties
        return rng.integers(0, 7, shape).astype(np.float32)
    if kind == "constant":
        return np.zeros(shape)
    return rng.standard_normal(shape).astype(kind)


@pytest.mark.parametrize("kind", ["float32", "float64", "tied", "constant"])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed, kind):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 200)), int(rng.integers(1, 150)))
    scores_BV, positive_BV = draw_scores(rng, shape, kind), rng.random(shape) < rng.choice([0.01, 0.2, 0.9])
    np.testing.assert_allclose(
        average_precision(scores_BV, positive_BV), reference_ap(scores_BV, positive_BV), rtol=0, atol=1e-9
    )


def test_scores_one_float_apart_are_two_thresholds():
    low = np.float32(0.1)
    scores_BV = np.array([[np.nextafter(low, np.float32(1))], [low]])
    assert average_precision(scores_BV, np.array([[True], [False]])) == [1.0]
    assert average_precision(scores_BV, np.array([[False], [True]])) == [0.5]


def test_average_precision_is_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    scores_BV, positive_BV = rng.random((60, 9)).astype(np.float32), rng.random((60, 9)) < 0.3
    expected = multilabel_average_precision(
        torch.from_numpy(scores_BV), torch.from_numpy(positive_BV).long(), num_labels=9, average="none"
    )
    np.testing.assert_allclose(average_precision(scores_BV, positive_BV), expected, atol=1e-6)


def test_tensors_are_taken_like_arrays():
    scores_BV, positive_BV = torch.tensor([[0.3], [0.2], [0.1]]), torch.tensor([[0], [1], [1]])
    np.testing.assert_allclose(average_precision(scores_BV, positive_BV), [(1 / 2 + 2 / 3) / 2])


def test_a_perfect_ranking_has_one_and_a_constant_score_the_share_of_positives():
    positive_BV = np.array([[1], [1], [0], [0], [0]])
    assert average_precision(np.array([[5], [4], [3], [2], [1]]), positive_BV) == [1.0]
    np.testing.assert_allclose(average_precision(np.zeros((5, 1)), positive_BV), [2 / 5])


def test_a_class_without_a_positive_is_nan_and_left_out_of_the_mean():
    ap_V = average_precision(np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[True, False], [False, False]]))
    np.testing.assert_array_equal(ap_V, [1.0, np.nan])
    assert mean_average_precision(ap_V) == 1.0
    assert np.isnan(mean_average_precision(np.array([np.nan, np.nan])))


def test_a_rising_function_of_a_class_scores_changes_nothing():
    rng = np.random.default_rng(1)
    scores_BV, positive_BV = rng.integers(-9, 9, (80, 5)).astype(float), rng.random((80, 5)) < 0.2
    expected = average_precision(scores_BV, positive_BV)
    np.testing.assert_array_equal(average_precision(1 / (1 + np.exp(-scores_BV)), positive_BV), expected)
    np.testing.assert_array_equal(average_precision(scores_BV * [1, 2, 3, 4, 5] + 7, positive_BV), expected)


def test_the_order_of_samples_changes_nothing():
    rng = np.random.default_rng(2)
    scores_BV, positive_BV = rng.integers(0, 5, (80, 5)), rng.random((80, 5)) < 0.2
    order = rng.permutation(80)
    np.testing.assert_array_equal(
        average_precision(scores_BV[order], positive_BV[order]), average_precision(scores_BV, positive_BV)
    )


def test_an_offset_per_sample_is_subtracted_before_ranking():
    rng = np.random.default_rng(3)
    scores_BV, positive_BV, offset_B = rng.random((50, 4)), rng.random((50, 4)) < 0.3, rng.random(50)
    np.testing.assert_array_equal(
        average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV), offset_B=offset_B),
        average_precision(scores_BV - offset_B[:, None], positive_BV),
    )


def test_nan_scores_are_an_error_that_says_where():
    scores_BV = np.zeros((6, 70))
    scores_BV[4, 66] = np.nan  # in the second block of columns, and without a positive
    with pytest.raises(DataError, match="sample 4 for class 66"):
        average_precision(scores_BV, np.eye(6, 70))


@pytest.mark.parametrize("wrong", [-1, 0.5, np.nan])
def test_positives_that_are_neither_zero_nor_one_are_an_error(wrong):
    """All of them would be positives, and an AP of 1 what is left of labels 1 and -1."""
    with pytest.raises(DataError, match=f"positives hold {wrong}; expected booleans, or 0 and 1"):
        average_precision(np.zeros((2, 3)), np.array([[1, 0, wrong], [0, 1, 0]]))


def test_shapes_that_differ_are_an_error():
    with pytest.raises(DataError, match=r"\(3, 2\).*\(3, 4\)"):
        average_precision(np.zeros((3, 2)), np.zeros((3, 4)))


def test_classes_are_grouped_by_their_training_images_as_in_the_long_tail_literature():
    counts_C = np.array([0, 19, 20, 100, 101, 5000, 7])
    ap_C = np.array([0.1, 0.3, 0.4, 0.6, 0.8, 1.0, np.nan])
    groups = average_precision_by_frequency(ap_C, counts_C)
    assert {name: group.num_classes for name, group in groups.items()} == {"few": 2, "some": 2, "many": 2}
    assert [groups[name].ap for name in ("few", "some", "many")] == pytest.approx([0.2, 0.5, 0.9])


def test_the_bounds_of_the_frequency_groups_can_be_moved_and_a_group_can_be_empty():
    groups = average_precision_by_frequency(np.array([0.2, 0.4]), np.array([3, 4]), few=1, many=3)
    assert (groups["some"].ap, groups["some"].num_classes) == (0.2, 1)
    assert (groups["many"].ap, groups["many"].num_classes) == (0.4, 1)
    assert np.isnan(groups["few"].ap)
    assert groups["few"].num_classes == 0


def test_training_counts_of_another_taxonomy_are_an_error():
    with pytest.raises(DataError, match="3 classes but 2 training counts"):
        average_precision_by_frequency(np.zeros(3), np.zeros(2))
