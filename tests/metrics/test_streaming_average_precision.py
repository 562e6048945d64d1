"""Average precision in two passes: against scikit-learn, against the scores kept, and whatever the order and the split."""

import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import average_precision_score

from concentration.errors import DataError
from concentration.metrics import streaming_average_precision
from concentration.metrics.average_precision import average_precision_of_pairs
from concentration.metrics.streaming_average_precision import StreamingAveragePrecision


def draw_scores(rng, shape, kind):
    if kind == "tied":  # seven values, so that every column is full of ties
        return rng.integers(0, 7, shape).astype(np.float32)
    if kind == "constant":
        return np.zeros(shape, dtype=np.float32)
    if kind == "infinite":  # a third of the classes were not computed, some are sure
        return rng.choice([-np.inf, -1.0, 0.0, -0.0, 1.5, np.inf], shape, p=[0.3, 0.2, 0.1, 0.1, 0.2, 0.1])
    return rng.standard_normal(shape).astype(kind)


def draw(seed, kind="float32", share=None):
    """(B, V) scores and positives."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 200)), int(rng.integers(1, 150)))
    return draw_scores(rng, shape, kind), rng.random(shape) < (share or rng.choice([0.01, 0.2, 0.9]))


def show(metric, scores_BV, positive_BV, rows=None, batch_size=16, offset_B=None, is_direct_BV=None):
    """One pass over these rows, in this order."""
    rows = np.arange(len(scores_BV)) if rows is None else np.asarray(rows)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        pairs = np.nonzero(positive_BV[batch])
        metric.update(
            scores_BV[batch],
            *pairs,
            is_direct_P=None if is_direct_BV is None else is_direct_BV[batch][pairs],
            offset_B=None if offset_B is None else offset_B[batch],
        )
    return metric


def see_twice(scores_BV, positive_BV, dtype=np.float64, **options):
    metric = StreamingAveragePrecision(scores_BV.shape[1], dtype)
    show(metric, scores_BV, positive_BV, **options)
    metric.begin_second_pass()
    return show(metric, scores_BV, positive_BV, **options)


def reference_ap(scores_BV, positive_BV):
    """scikit-learn, class by class; NaN without a positive. It refuses infinities, so scores are given as ranks."""
    ranks_BV = np.unique(scores_BV, return_inverse=True)[1].reshape(scores_BV.shape)
    return np.array(
        [
            average_precision_score(positive_B, ranks_B) if positive_B.any() else np.nan
            for ranks_B, positive_B in zip(ranks_BV.T, positive_BV.T, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "tied", "constant", "infinite"])
@pytest.mark.parametrize("seed", range(4))
def test_two_passes_are_scikit_learn(seed, kind):
    scores_BV, positive_BV = draw(seed, kind)
    found_V = see_twice(scores_BV, positive_BV).compute()
    np.testing.assert_allclose(found_V, reference_ap(scores_BV, positive_BV), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found_V, average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV)))


@pytest.mark.parametrize("seed", range(4))
def test_an_offset_per_sample_is_subtracted_in_both_passes(seed):
    scores_BV, positive_BV = draw(seed)
    offset_B = np.random.default_rng(seed).standard_normal(len(scores_BV))
    np.testing.assert_array_equal(
        see_twice(scores_BV, positive_BV, offset_B=offset_B).compute(),
        average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV), offset_B=offset_B),
    )


@pytest.mark.parametrize("kind", ["float32", "tied"])
def test_direct_positives_are_measured_as_the_only_ones(kind):
    scores_BV, positive_BV = draw(5, kind, share=0.2)
    is_direct_BV = positive_BV & (np.random.default_rng(0).random(positive_BV.shape) < 0.5)
    metric = see_twice(scores_BV, positive_BV, np.float32, is_direct_BV=is_direct_BV)
    for found_V, of_BV in ((metric.compute(), positive_BV), (metric.compute_direct(), is_direct_BV)):
        np.testing.assert_array_equal(found_V, average_precision_of_pairs(scores_BV, *np.nonzero(of_BV)))


@pytest.mark.parametrize("good_by", [0.0, 3.0, 9.0])
def test_large_blocks_with_few_and_with_many_samples_at_the_lowest_positive_are_counted_alike(good_by, monkeypatch):
    rng = np.random.default_rng(0)
    positive_BV = rng.random((3000, 70)) < 0.005
    scores_BV = (rng.standard_normal(positive_BV.shape) + good_by * positive_BV).astype(np.float32)
    expected_V = average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV))
    assert np.ptp(expected_V) > 0 or good_by == 9
    np.testing.assert_array_equal(see_twice(scores_BV, positive_BV, np.float32, batch_size=3000).compute(), expected_V)
    monkeypatch.setattr(streaming_average_precision, "ROWS_PER_BLOCK", 700)
    monkeypatch.setattr(streaming_average_precision, "ROWS_PER_TURN", 64)
    np.testing.assert_array_equal(see_twice(scores_BV, positive_BV, np.float32, batch_size=3000).compute(), expected_V)


@st.composite
def splits_of_two_passes(draw):
    """Few scores of few values, positives, and for each pass an order, a number of processes and a batch size."""
    shape = (draw(st.integers(1, 30)), draw(st.integers(1, 4)))
    values = st.sampled_from([-np.inf, -1.0, 0.0, -0.0, 0.5, np.float32(0.1), 2.0, np.inf])
    scores_BV = draw(hypothesis.extra.numpy.arrays(np.float32, shape, elements=values))
    positive_BV = draw(hypothesis.extra.numpy.arrays(bool, shape))
    orders = [draw(st.permutations(range(shape[0]))) for _ in range(2)]
    return scores_BV, positive_BV, orders, draw(st.integers(1, 4)), draw(st.integers(1, 9))


@given(splits_of_two_passes())
def test_no_order_split_or_merge_changes_anything(drawn):
    scores_BV, positive_BV, orders, num_ranks, batch_size = drawn
    num_classes = scores_BV.shape[1]
    whole = StreamingAveragePrecision(num_classes)
    for rows in np.array_split(orders[0], num_ranks):
        rank = show(StreamingAveragePrecision(num_classes), scores_BV, positive_BV, rows.astype(int), batch_size)
        whole.merge(StreamingAveragePrecision.from_state(num_classes, rank.state()))
    whole.begin_second_pass()
    ranks = [StreamingAveragePrecision.from_state(num_classes, whole.state()) for _ in range(num_ranks)]
    for rank, rows in zip(ranks, np.array_split(orders[1], num_ranks), strict=True):
        show(rank, scores_BV, positive_BV, rows.astype(int), batch_size + 1)
        whole.merge(StreamingAveragePrecision.from_state(num_classes, rank.state()))
    np.testing.assert_array_equal(whole.compute(), average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV)))


def test_a_positive_is_counted_though_its_score_is_rounded_otherwise_in_the_second_pass():
    """Compared with itself, a positive that lost its last bit would not be at its own place: 0 of 0 or 0 of 3."""
    scores_BV, positive_BV = np.full((4, 2), 1.0, dtype=np.float32), np.zeros((4, 2), dtype=bool)
    scores_BV[1:, 0] = [5, 4, 3]
    positive_BV[0], positive_BV[1, 0] = True, True
    metric = show(StreamingAveragePrecision(2), scores_BV, positive_BV)
    metric.begin_second_pass()
    lower_BV = np.where(positive_BV, np.nextafter(scores_BV, np.float32(0)), scores_BV)
    np.testing.assert_allclose(show(metric, lower_BV, positive_BV).compute(), [(1 + 2 / 4) / 2, 1 / 4])


def test_rounding_moves_average_precision_by_no_more_than_the_negatives_beside_a_positive():
    rng = np.random.default_rng(0)
    scores_BV, positive_BV = rng.standard_normal((2000, 5)).astype(np.float32), rng.random((2000, 5)) < 0.02
    metric = show(StreamingAveragePrecision(5), scores_BV, positive_BV)
    metric.begin_second_pass()
    noisy_BV = (scores_BV * (1 + rng.uniform(-1e-6, 1e-6, scores_BV.shape))).astype(np.float32)
    assert (noisy_BV != scores_BV).mean() > 0.5
    expected_V = average_precision_of_pairs(scores_BV, *np.nonzero(positive_BV))
    np.testing.assert_allclose(show(metric, noisy_BV, positive_BV).compute(), expected_V, atol=1e-4)


def begin_second(scores_BV, positive_BV):
    metric = show(StreamingAveragePrecision(scores_BV.shape[1]), scores_BV, positive_BV)
    metric.begin_second_pass()
    return metric


def test_passes_over_other_numbers_of_samples_are_an_error():
    scores_BV, positive_BV = np.zeros((5, 2)), np.eye(5, 2, dtype=bool)
    with pytest.raises(DataError, match="second pass saw 0 samples and the first 5"):
        show(StreamingAveragePrecision(2), scores_BV, positive_BV).compute()
    with pytest.raises(DataError, match="second pass saw 4 samples and the first 5"):
        show(begin_second(scores_BV, positive_BV), scores_BV[:4], positive_BV[:4]).compute()


def test_positives_that_changed_their_class_are_an_error():
    scores_BV, positive_BV = np.zeros((5, 3)), np.eye(5, 3, dtype=bool)
    moved_BV = positive_BV.copy()
    moved_BV[2] = [False, True, False]
    with pytest.raises(DataError, match="class 1 had 2 positives in the second pass and 1 in the first"):
        show(begin_second(scores_BV, positive_BV), scores_BV, moved_BV).compute()


@pytest.mark.parametrize("value", [1.2, 7.0, np.inf, -np.inf])
def test_a_positive_that_is_not_where_it_was_is_an_error(value):
    scores_BV, positive_BV = np.ones((70, 3)), np.eye(70, 3, dtype=bool)
    changed_BV = scores_BV.copy()
    changed_BV[1, 1] = value
    with pytest.raises(
        DataError, match=f"positive of class 1 scored 1 in the first pass and {value:.6g} in the second"
    ):
        show(begin_second(scores_BV, positive_BV), changed_BV, positive_BV).compute()


def test_parts_of_second_passes_after_other_first_passes_are_an_error():
    scores_BV, positive_BV = np.zeros((5, 2)), np.eye(5, 2, dtype=bool)
    metric, other = begin_second(scores_BV, positive_BV), begin_second(scores_BV + 1, positive_BV)
    with pytest.raises(DataError, match="began with other positives"):
        metric.merge(other)


def test_nan_scores_are_an_error_that_says_where():
    scores_BV, positive_BV = np.zeros((6, 70)), np.eye(6, 70, dtype=bool)
    scores_BV[4, 66] = np.nan  # in the second block of columns, and without a positive: the second pass finds it
    with pytest.raises(DataError, match="sample 4 for class 66"):
        show(begin_second(scores_BV, positive_BV), scores_BV, positive_BV)
    scores_BV[4, 4] = np.nan
    with pytest.raises(DataError, match="sample 4 for class 4"):
        show(StreamingAveragePrecision(70), scores_BV, positive_BV)


def test_a_split_without_a_positive_is_nan_for_every_class():
    assert np.isnan(see_twice(np.zeros((3, 2)), np.zeros((3, 2), dtype=bool)).compute()).all()
    assert np.isnan(see_twice(np.zeros((0, 2)), np.zeros((0, 2), dtype=bool)).compute()).all()


def test_the_scores_of_a_batch_are_left_as_they_were():
    scores_BV, positive_BV = draw(3, share=0.2)
    before = scores_BV.copy()
    see_twice(scores_BV, positive_BV, np.float32)
    np.testing.assert_array_equal(scores_BV, before)


def test_what_is_kept_grows_with_positives_and_not_with_samples():
    rng = np.random.default_rng(0)

    def measure_bytes(num_samples):
        positive_BV = np.zeros((num_samples, 40), dtype=bool)
        positive_BV[:100, 3] = True
        state = see_twice(rng.random(positive_BV.shape), positive_BV).state()
        return sum(array.nbytes for array in state.values())

    assert measure_bytes(4000) == measure_bytes(400) < 100 * 50
