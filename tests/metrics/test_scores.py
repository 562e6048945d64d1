"""Metrics of scores on a GPU are those of the same scores on a CPU, which other tests hold against independent references."""

import json

import numpy as np
import pytest
import torch

from concentration.errors import DataError
from concentration.metrics.average_precision import _count_by_column, _count_on_device, average_precision_of_pairs
from concentration.metrics.evaluation import Evaluator
from concentration.metrics.ranking import rank_labels
from concentration.metrics.vertical_answers import VerticalAnswers
from concentration.taxonomy import Taxonomy, TaxonomyClass

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no GPU here")

#: Middle classes, a vertical without any, and more samples than the 50 that mAP@50 keeps.
TAXONOMY = Taxonomy(
    [TaxonomyClass(f"{v}/any", f"{v}/any", (), v) for v in ("bird", "food")]
    + [TaxonomyClass(f"{v}/{n}", f"{v}/{n}", (f"{v}/any",), v) for n in range(7) for v in ("food", "bird")]
    + [TaxonomyClass(f"car/{n}", f"car/{n}", (), "car") for n in range(2)]
)


def draw(seed: int, tied: bool, num_samples: int = 300) -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(seed)
    scores_BC = rng.standard_normal((num_samples, TAXONOMY.num_classes)).astype(np.float32)
    if tied:
        scores_BC = np.round(scores_BC)
    scores_BC[::7, 3:6] = -np.inf
    return scores_BC, [rng.permutation(TAXONOMY.num_classes)[: rng.integers(0, 4)].tolist() for _ in scores_BC]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("limit", [1, 1500, 1 << 24])
def test_many_columns_at_a_time_are_counted_as_one_after_the_other(tied, has_offset, limit, monkeypatch):
    monkeypatch.setattr("concentration.metrics.average_precision.SCORES_PER_SORT", limit)
    scores_BV, _ = draw(0, tied)
    rng = np.random.default_rng(1)
    offset_B = rng.standard_normal(len(scores_BV)) if has_offset else None
    row_P, column_P = np.nonzero((rng.random(scores_BV.shape) < 0.1) & (np.arange(scores_BV.shape[1]) % 4 > 0))
    score_P = scores_BV[row_P, column_P] - (0 if offset_B is None else offset_B[row_P])
    score_P = score_P[np.lexsort((score_P, column_P))]
    start_V = np.concatenate([[0], np.cumsum(np.bincount(column_P, minlength=scores_BV.shape[1]))])
    expected_P = _count_by_column(scores_BV, offset_B, score_P, start_V)
    found_P = _count_on_device(torch.from_numpy(scores_BV), offset_B, score_P, start_V)
    np.testing.assert_array_equal(found_P, expected_P)


def test_counting_names_a_score_that_is_nan():
    scores_BV = np.zeros((4, 700), dtype=np.float32)
    scores_BV[2, 600] = np.nan
    with pytest.raises(DataError, match="sample 2 for class 600 is NaN"):
        _count_on_device(torch.from_numpy(scores_BV), None, np.zeros(0), np.zeros(701, dtype=np.int64))


@needs_gpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_an_evaluation_on_a_gpu_is_that_on_a_cpu(tied, num_passes):
    scores_BC, labels = draw(2, tied)
    found = {}
    for device in map(torch.device, ("cpu", "cuda")):
        evaluator = Evaluator(TAXONOMY, np.arange(TAXONOMY.num_classes), num_passes, finds_map_at_50=True)
        for number in range(num_passes):
            if number:
                evaluator.begin_second_pass()
            for rows in np.array_split(np.arange(len(scores_BC)), 6):
                batch = torch.from_numpy(scores_BC[rows]).to(device)
                evaluator.update(batch, [labels[row] for row in rows])
        again = Evaluator.from_state(TAXONOMY, evaluator.state(), np.arange(TAXONOMY.num_classes))
        found[device.type] = evaluator.compute(device).to_json()
        assert again.compute().mpvap == pytest.approx(found[device.type]["mpvap"], abs=1e-12)
    names = [name for name in found["cpu"] if not (tied and "log_softmax" in name)]
    for name in names:
        assert _round(found["cuda"][name]) == _round(found["cpu"][name]), name
    # Of scores that are equal, one may be ahead after log-softmax, by a rounding that is another one on a GPU.
    assert found["cuda"]["mpvap_log_softmax"] == pytest.approx(found["cpu"]["mpvap_log_softmax"], abs=1e-4)


def _round(content: object) -> object:
    return json.loads(json.dumps(content), parse_float=lambda digits: round(float(digits), 12))


@needs_gpu
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_answers_and_precision_on_a_gpu_are_those_on_a_cpu(tied):
    scores_BC, labels = draw(3, tied)
    on_gpu_BC = torch.from_numpy(scores_BC).cuda()
    row_P, column_P = np.array([(row, label) for row, own in enumerate(labels) for label in own]).T
    np.testing.assert_array_equal(rank_labels(on_gpu_BC, row_P, column_P), rank_labels(scores_BC, row_P, column_P))
    offset_B = np.random.default_rng(4).standard_normal(len(scores_BC))
    for offset in (None, offset_B):
        found, expected = (average_precision_of_pairs(s, row_P, column_P, offset) for s in (on_gpu_BC, scores_BC))
        np.testing.assert_array_equal(found, expected)
    finder, ordinal_B = VerticalAnswers(TAXONOMY), np.arange(len(scores_BC))
    found, expected = (finder.find(scores, labels, ordinal_B) for scores in (on_gpu_BC, scores_BC))
    for name in ("ordinal_N", "score_NM", "is_right_NM", "is_labelled_NM"):  # of several best leaves, any may be named
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    if not tied:
        np.testing.assert_array_equal(found.output_NM, expected.output_NM)
