"""Ranks against scikit-learn's top-k accuracy; mAP@K in one pass, and merged, against a dense reference."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from concentration.metrics import ranking
from concentration.metrics.average_precision import average_precision
from concentration.metrics.ranking import MeanAveragePrecisionAtK, rank_labels, rank_of_best_label


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ranks_within_k_are_the_top_k_accuracy_of_scikit_learn(k):
    rng = np.random.default_rng(k)
    scores_BL, label_B = rng.standard_normal((300, 12)), rng.integers(0, 12, 300)
    rank_B = rank_of_best_label(scores_BL, np.arange(300), label_B)
    assert (rank_B <= k).mean() == pytest.approx(top_k_accuracy_score(label_B, scores_BL, k=k, labels=range(12)))


def test_a_tie_with_a_wrong_class_counts_against():
    scores_BL = np.zeros((1, 4))
    assert rank_of_best_label(scores_BL, np.array([0]), np.array([0])) == [4]


def test_labels_of_one_sample_are_never_in_each_others_way():
    scores_BL = np.array([[3.0, 2.0, 3.0, 1.0], [3.0, 2.0, 3.0, 1.0]])
    row_P, column_P = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 3])
    np.testing.assert_array_equal(rank_of_best_label(scores_BL, row_P, column_P), [1, 3])


def test_a_sample_without_a_label_is_behind_all():
    np.testing.assert_array_equal(rank_of_best_label(np.ones((2, 3)), np.array([1]), np.array([0])), [4, 3])


def reference_ranks(scores_L, labels):
    """Wrong classes before a label of the same score, labels among themselves by their scores: by sorting one list."""
    order = sorted(range(len(scores_L)), key=lambda c: (-scores_L[c], c in labels))
    return sorted(order.index(label) + 1 for label in labels)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_every_label_has_its_place_in_the_sorted_list(tied, block, monkeypatch):
    monkeypatch.setitem(ranking.SCORES_PER_BLOCK, "cpu", block)
    scores_BL, positive_BL = draw(3, tied)
    scores_BL[::5, ::2] = -np.inf
    row_P, column_P = np.nonzero(positive_BL)
    order = np.random.default_rng(0).permutation(len(row_P))  # pairs may come in any order
    rank_P = rank_labels(scores_BL, row_P[order], column_P[order])
    for row in range(len(scores_BL)):
        labels = column_P[row_P == row]
        assert sorted(rank_P[row_P[order] == row]) == reference_ranks(scores_BL[row], set(labels.tolist()))


def test_the_first_of_the_labels_is_the_best_label():
    scores_BL, positive_BL = draw(4, tied=True)
    row_P, column_P = np.nonzero(positive_BL)
    first_B = np.full(len(scores_BL), scores_BL.shape[1] + 1)
    np.minimum.at(first_B, row_P, rank_labels(scores_BL, row_P, column_P))
    np.testing.assert_array_equal(first_B, rank_of_best_label(scores_BL, row_P, column_P))


def reference_ap_at_k(scores_BC, positive_BC, k):
    """The formula in words, a loop: sort, walk down the list, divide by what was possible."""
    ap_C = []
    for scores_B, positive_B in zip(scores_BC.T, positive_BC.T, strict=True):
        listed = sorted((-score, positive) for score, positive in zip(scores_B, positive_B, strict=True))
        total, num_right = 0.0, 0
        for place, (score, positive) in enumerate(listed[:k], start=1):
            if positive and score < np.inf:
                num_right += 1
                total += num_right / place
        ap_C.append(total / min(k, positive_B.sum()) if positive_B.any() else np.nan)
    return np.array(ap_C)


def draw(seed, tied, num_samples=300, num_classes=23):
    rng = np.random.default_rng(seed)
    scores_BC = rng.standard_normal((num_samples, num_classes)).astype(np.float32)
    if tied:
        scores_BC = np.round(scores_BC)
    share_C = rng.choice([0.0, 0.01, 0.1, 0.5], num_classes)  # none, fewer than K, and more than K
    return scores_BC, rng.random(scores_BC.shape) < share_C


def see(scores_BC, positive_BC, k, batch_size):
    metric = MeanAveragePrecisionAtK(scores_BC.shape[1], k)
    for first in range(0, len(scores_BC), batch_size):
        batch = slice(first, first + batch_size)
        metric.update(scores_BC[batch], *np.nonzero(positive_BC[batch]))
    return metric


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("k", "batch_size"), [(50, 300), (50, 32), (50, 1), (7, 64), (1, 5), (400, 64)])
def test_one_pass_in_batches_is_the_dense_reference(k, batch_size, tied):
    scores_BC, positive_BC = draw(k, tied)
    metric = see(scores_BC, positive_BC, k, batch_size)
    expected = reference_ap_at_k(scores_BC, positive_BC, k)
    np.testing.assert_allclose(metric.compute_per_class(), expected, rtol=0, atol=1e-12)
    assert metric.compute() == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("tied", [False, True])
def test_merged_parts_are_one_pass(tied):
    scores_BC, positive_BC = draw(11, tied)
    whole = see(scores_BC, positive_BC, 50, 64)
    merged = see(scores_BC[:0], positive_BC[:0], 50, 64)
    for part in np.array_split(np.random.default_rng(0).permutation(len(scores_BC)), 4):
        merged.merge(see(scores_BC[part], positive_BC[part], 50, 64))
    np.testing.assert_array_equal(merged.compute_per_class(), whole.compute_per_class())


def test_a_long_enough_list_without_ties_is_plain_average_precision():
    scores_BC, positive_BC = draw(5, tied=False)
    metric = see(scores_BC, positive_BC, 300, 64)
    np.testing.assert_allclose(metric.compute_per_class(), average_precision(scores_BC, positive_BC), atol=1e-12)


def test_a_perfect_ranking_has_one_with_fewer_and_with_more_positives_than_k():
    positive_BC = np.zeros((100, 2), dtype=bool)
    positive_BC[:3, 0] = positive_BC[:80, 1] = True
    assert see(positive_BC.astype(np.float32), positive_BC, 50, 9).compute() == 1.0


def test_among_equal_scores_negatives_come_first_whatever_the_order():
    scores_BC, positive_BC = np.zeros((60, 1), dtype=np.float32), np.zeros((60, 1), dtype=bool)
    positive_BC[:10] = True
    assert see(scores_BC, positive_BC, 50, 7).compute() == 0.0
    assert see(scores_BC, positive_BC[::-1], 50, 7).compute() == 0.0


def test_a_score_of_minus_infinity_is_in_no_list_but_its_positive_is_missed():
    scores_BC = np.array([[-np.inf], [1.0], [-np.inf]], dtype=np.float32)
    metric = see(scores_BC, np.array([[True], [True], [False]]), 50, 3)
    assert metric.compute() == 0.5


def test_classes_looked_at_in_blocks_are_all_looked_at(monkeypatch):
    scores_BC, positive_BC = draw(6, tied=True)
    expected = see(scores_BC, positive_BC, 50, 32).compute_per_class()
    monkeypatch.setitem(ranking.SCORES_PER_BLOCK, "cpu", 32 * 5)
    np.testing.assert_array_equal(see(scores_BC, positive_BC, 50, 32).compute_per_class(), expected)


def test_small_batches_do_not_sort_what_is_kept_again_and_again(monkeypatch):
    num_sorted, sort = [], ranking._sort
    monkeypatch.setattr(ranking, "_sort", lambda key_N: num_sorted.append(len(key_N)) or sort(key_N))
    scores_BC, positive_BC = draw(8, tied=False, num_samples=3200)
    metric = see(scores_BC, positive_BC, 50, batch_size=4)
    expected = reference_ap_at_k(scores_BC, positive_BC, 50)
    np.testing.assert_allclose(metric.compute_per_class(), expected, rtol=0, atol=1e-12)
    # What is kept is full after 50 samples, and then competes each time that the samples have doubled: 50, 100, ... 3200.
    assert sum(num_sorted) < 4 * 7 * metric.score_CK.numel()


def test_candidates_that_wait_are_bounded(monkeypatch):
    scores_BC, positive_BC = draw(9, tied=True)
    expected = see(scores_BC, positive_BC, 50, 32).state()
    monkeypatch.setattr(ranking, "MOST_WAITING", 40)
    monkeypatch.setitem(ranking.SCORES_PER_BLOCK, "cpu", 32 * 5)
    metric = see(scores_BC, positive_BC, 50, 32)
    assert metric._num_waiting < 40
    for name, array in metric.state().items():
        np.testing.assert_array_equal(array, expected[name])
