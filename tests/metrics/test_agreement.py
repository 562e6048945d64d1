"""Agreement of two networks, against a loop over samples."""

import numpy as np
import pytest

from concentration.metrics.agreement import LeafAnswers, compare_in_verticals, compare_overall, select_leaf_answers
from concentration.metrics.vertical_answers import VerticalAnswers


def answer(taxonomy, seed: int, labels: list[list[int]], rows: range) -> LeafAnswers:
    """In batches of 7, of a network that says something about each label."""
    finder, parts = VerticalAnswers(taxonomy), []
    for first in range(rows.start, rows.stop, 7):
        batch = range(first, min(first + 7, rows.stop))
        scores_BC = (
            np.random.default_rng([seed, first]).normal(size=(len(batch), taxonomy.num_classes)).astype(np.float32)
        )
        for place, row in enumerate(batch):
            scores_BC[place, labels[row]] += 1.5
        found = finder.find(scores_BC, [labels[row] for row in batch], np.array(batch))
        parts.append(select_leaf_answers(found, taxonomy.position_of_output))
    return LeafAnswers.join(parts)


@pytest.fixture(scope="module")
def labels(taxonomy) -> list[list[int]]:
    leaves = np.flatnonzero(taxonomy.is_leaf)
    rng = np.random.default_rng(0)
    return [rng.choice(leaves, rng.integers(1, 3), replace=False).tolist() for _ in range(60)]


def test_it_is_what_a_loop_over_the_samples_that_both_have_seen_counts(taxonomy, labels):
    first, second = answer(taxonomy, 1, labels, range(0, 50)), answer(taxonomy, 2, labels, range(20, 60))
    by_pair = [
        {(s, v): (c, r) for s, v, c, r in zip(a.sample_P, a.vertical_P, a.class_P, a.is_right_P, strict=True)}
        for a in (first, second)
    ]
    found = compare_in_verticals(first, second)
    assert found.keys() == {0, 1, 2}
    for number, agreement in found.items():
        pairs = [
            (by_pair[0][key], by_pair[1][key]) for key in by_pair[0].keys() & by_pair[1].keys() if key[1] == number
        ]
        assert agreement.num_samples == len(pairs) > 3
        assert agreement.same == sum(a[0] == b[0] for a, b in pairs)
        assert agreement.only_first_right == sum(a[1] and not b[1] for a, b in pairs)
        assert agreement.only_second_right == sum(b[1] and not a[1] for a, b in pairs)
    overall = compare_overall(first, second)
    assert overall.num_samples == 30
    assert 0 < overall.same < 30
    swapped = compare_overall(second, first)
    assert (swapped.only_first_right, swapped.same) == (overall.only_second_right, overall.same)


def test_an_answer_is_right_where_it_names_a_label_and_names_classes_by_their_position(taxonomy, labels):
    answers = answer(taxonomy, 3, labels, range(60))
    for sample, vertical, position, is_right in zip(
        answers.sample_P, answers.vertical_P, answers.class_P, answers.is_right_P, strict=True
    ):
        output = int(taxonomy.output_of_position[position])
        assert taxonomy.vertical_of_output[output] == vertical
        assert is_right == (output in labels[sample])
    itself = compare_overall(answers, answers)
    assert (itself.same, itself.only_first_right, itself.only_second_right) == (60, 0, 0)
