"""The evaluator against a slow, dense, obvious reference with scikit-learn, and against itself in parts."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score
from torchmetrics.retrieval import RetrievalPrecision, RetrievalRecall

from concentration.errors import DataError
from concentration.metrics import evaluation, vertical_samples
from concentration.metrics.evaluation import Evaluator, measure_kept_bytes
from concentration.metrics.ranking import MeanAveragePrecisionAtK
from concentration.schema import flatten
from concentration.taxonomy import Taxonomy, TaxonomyClass

# Two verticals that share a parent across the border, a class with two parents (a DAG), verticals interleaved in the
# file, and one vertical that no sample of these tests has.
PARENTS = {
    "food/any": [],
    "bird/any": [],
    "bird/water": ["bird/any"],
    "food/meat": ["food/any"],
    "bird/duck": ["bird/water", "bird/game"],
    "bird/game": ["bird/any", "food/meat"],
    "bird/swan": ["bird/water"],
    "food/roast": ["food/meat"],
    "food/soup": ["food/any"],
    "food/ham": ["food/meat"],
    "bird/grouse": ["bird/game"],
    "car/van": [],
    "car/cab": [],
}
TAXONOMY = Taxonomy(
    [TaxonomyClass(class_id, class_id, tuple(parents), class_id.split("/")[0]) for class_id, parents in PARENTS.items()]
)
IDS = [TAXONOMY.class_of_output(output).id for output in range(TAXONOMY.num_classes)]


def outputs(*class_ids):
    return [TAXONOMY.output(class_id) for class_id in class_ids]


def draw(seed, num_samples=120, tied=False):
    """Scores, and labels in no, one or two verticals, leaves or not, but never of a car, of soup, or of all food."""
    rng = np.random.default_rng(seed)
    scores_BC = rng.standard_normal((num_samples, TAXONOMY.num_classes)).astype(np.float32)
    if tied:
        scores_BC = np.round(scores_BC)
    usable = [o for o in range(TAXONOMY.num_classes) if IDS[o] not in ("car/van", "car/cab", "food/soup")]
    return scores_BC, [rng.choice(usable, rng.integers(0, 4), replace=False).tolist() for _ in range(num_samples)]


def evaluate(scores_BC, labels, batch_size=16, train_counts_C=None):
    return show(Evaluator(TAXONOMY, train_counts_C, finds_map_at_50=True), scores_BC, labels, batch_size)


def evaluate_twice(scores_BC, labels, train_counts_C=None):
    evaluator = show(Evaluator(TAXONOMY, train_counts_C, num_passes=2, finds_map_at_50=True), scores_BC, labels)
    evaluator.begin_second_pass()
    return show(evaluator, scores_BC, labels)


def show(evaluator, scores_BC, labels, batch_size=16):
    for first in range(0, len(labels), batch_size):
        evaluator.update(scores_BC[first : first + batch_size], labels[first : first + batch_size])
    return evaluator


def assert_same(left, right):
    left, right = flatten(asdict(left)), flatten(asdict(right))
    np.testing.assert_allclose(left.pop("ap_of_class"), right.pop("ap_of_class"), rtol=0, atol=1e-12)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], abs=1e-12, nan_ok=True), name


def ancestors_inside(class_id):
    """By walking up, independently of Taxonomy."""
    found = set()
    for parent in PARENTS[class_id]:
        if parent.split("/")[0] == class_id.split("/")[0]:
            found |= {parent} | ancestors_inside(parent)
    return found


def reference_pvap(scores_BC, labels, vertical, smeared=True, softmax=False):
    columns = [o for o, class_id in enumerate(IDS) if class_id.startswith(vertical)]
    rows = [row for row, own in enumerate(labels) if set(own) & set(columns)]
    pruned = scores_BC[np.ix_(rows, columns)].astype(np.float64)
    if softmax:
        pruned = log_softmax(pruned, axis=1)
    ap = []
    for number, column in enumerate(columns):
        positive = []
        for row in rows:
            names = {IDS[o] for o in labels[row]}
            if smeared:
                names = names.union(*(ancestors_inside(name) for name in names))
            positive.append(IDS[column] in names)
        if any(positive):
            ap.append(average_precision_score(positive, pruned[:, number]))
    return np.mean(ap), len(columns) - len(ap)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_pvap_is_scikit_learns_average_precision_on_the_pruned_and_smeared_samples(seed, tied):
    scores_BC, labels = draw(seed, tied=tied)
    result = evaluate(scores_BC, labels).compute()
    assert list(result.pvap) == ["food", "bird"]
    for vertical in result.pvap:
        expected, num_missing = reference_pvap(scores_BC, labels, vertical)
        assert result.pvap[vertical] == pytest.approx(expected, abs=1e-9)
        assert result.num_classes_without_positive[vertical] == num_missing
    assert result.mpvap == pytest.approx(np.mean([reference_pvap(scores_BC, labels, v)[0] for v in result.pvap]))


def test_log_softmax_over_the_pruned_outputs_and_direct_labels_are_measured_beside_it():
    scores_BC, labels = draw(3)
    result = evaluate(scores_BC, labels).compute()
    for vertical in result.pvap:
        softmax, _ = reference_pvap(scores_BC, labels, vertical, softmax=True)
        assert result.pvap_log_softmax[vertical] == pytest.approx(softmax, abs=1e-9)
        assert abs(softmax - result.pvap[vertical]) > 1e-3
    assert result.mpvap_log_softmax == pytest.approx(np.mean(list(result.pvap_log_softmax.values())))
    direct = [reference_pvap(scores_BC, labels, v, smeared=False)[0] for v in result.pvap]
    assert result.mpvap_unsmeared == pytest.approx(np.mean(direct), abs=1e-9)
    assert abs(result.mpvap_unsmeared - result.mpvap) > 1e-3


def test_a_level_added_to_all_scores_of_a_sample_moves_pvap_but_not_its_log_softmax():
    scores_BC, labels = draw(4)
    level_B1 = np.random.default_rng(0).integers(-3, 4, (len(labels), 1)).astype(np.float32)
    plain, moved = evaluate(scores_BC, labels).compute(), evaluate(scores_BC + level_B1, labels).compute()
    assert moved.pvap_log_softmax == pytest.approx(plain.pvap_log_softmax, abs=1e-6)
    assert (moved.top1, moved.top5) == (plain.top1, plain.top5)
    assert abs(moved.mpvap - plain.mpvap) > 1e-3


def test_a_level_added_to_a_vertical_moves_top1_but_not_pvap():
    scores_BC, labels = draw(5)
    moved_BC = scores_BC.copy()
    moved_BC[:, TAXONOMY.vertical_slice("car")] += 100
    plain, moved = evaluate(scores_BC, labels).compute(), evaluate(moved_BC, labels).compute()
    assert moved.pvap == plain.pvap
    assert moved.top1_in_vertical == plain.top1_in_vertical > 0
    assert moved.top1 == 0 < plain.top1


def test_verticals_without_a_sample_and_classes_without_a_positive_are_left_out_and_counted():
    result = evaluate(*draw(6)).compute()
    assert "car" not in result.pvap
    assert result.num_verticals_without_sample == 1
    assert result.num_classes_without_positive == {"food": 1, "bird": 0, "car": 2}
    assert {IDS[o] for o in np.flatnonzero(np.isnan(result.ap_of_class))} == {"food/soup", "car/van", "car/cab"}


def test_ap_of_class_is_by_output_and_averages_to_pvap():
    result = evaluate(*draw(7)).compute()
    assert result.ap_of_class.shape == (TAXONOMY.num_classes,)
    for vertical, pvap in result.pvap.items():
        assert np.nanmean(result.ap_of_class[TAXONOMY.vertical_slice(vertical)]) == pytest.approx(pvap)


def test_a_sample_of_two_verticals_counts_in_each_as_two_samples_of_one_would():
    scores_BC, _ = draw(8, num_samples=3)
    both = [outputs("bird/duck", "food/ham"), outputs("bird/swan"), outputs("food/roast")]
    apart_BC = scores_BC[[0, 0, 1, 2]]
    apart = [outputs("bird/duck"), outputs("food/ham"), *both[1:]]
    both_result, apart_result = evaluate(scores_BC, both).compute(), evaluate(apart_BC, apart).compute()
    assert both_result.pvap == apart_result.pvap
    assert both_result.top1_in_vertical == apart_result.top1_in_vertical
    assert (both_result.num_samples, apart_result.num_samples) == (3, 4)


def test_ancestors_are_reached_over_all_parents_but_not_across_verticals():
    scores_BC = np.zeros((2, TAXONOMY.num_classes), dtype=np.float32)
    result = evaluate(scores_BC, [outputs("bird/duck"), outputs("bird/swan")]).compute()
    ap = dict(zip(IDS, result.ap_of_class, strict=True))
    # Constant scores: AP is the share of positives. Game is a parent of duck alone, and meat, its parent, is food.
    assert (ap["bird/any"], ap["bird/water"], ap["bird/game"]) == (1.0, 1.0, 0.5)
    assert np.isnan(ap["food/meat"])


@pytest.mark.parametrize("tied", [False, True])
def test_top_k_counts_the_samples_whose_best_leaf_label_has_under_k_wrong_leaves_at_or_above_it(tied):
    scores_BC, labels = draw(9, tied=tied)
    leaves = [o for o, class_id in enumerate(IDS) if not any(class_id in parents for parents in PARENTS.values())]
    ranks, ranks_in_vertical = [], []
    for scores_C, own in zip(scores_BC, labels, strict=True):
        own_leaves = sorted(set(own) & set(leaves))
        if own_leaves:
            best = max(scores_C[own_leaves])
            ranks.append(sum(scores_C[o] >= best for o in leaves if o not in own_leaves))
        for vertical in ("food", "bird"):
            inside = [o for o in own_leaves if IDS[o].startswith(vertical)]
            if inside:
                others = [o for o in leaves if IDS[o].startswith(vertical) and o not in inside]
                ranks_in_vertical.append(sum(scores_C[o] >= max(scores_C[inside]) for o in others))
    result = evaluate(scores_BC, labels).compute()
    assert result.top1 == pytest.approx(np.mean(np.array(ranks) < 1))
    assert result.top5 == pytest.approx(np.mean(np.array(ranks) < 5))
    assert result.top1_in_vertical == pytest.approx(np.mean(np.array(ranks_in_vertical) < 1))
    assert result.num_samples_without_leaf == len(labels) - len(ranks) > 0


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4])
def test_samples_without_a_leaf_are_never_right_however_few_leaves_there_are(num_leaves):
    leaves = [TaxonomyClass(f"leaf{number}", f"leaf{number}", ("root",), "v") for number in range(num_leaves)]
    taxonomy = Taxonomy([TaxonomyClass("root", "root", (), "v"), *leaves])
    rng = np.random.default_rng(num_leaves)
    scores_BC = rng.standard_normal((40, taxonomy.num_classes))
    labels = [rng.choice(taxonomy.num_classes, rng.integers(0, 3), replace=False).tolist() for _ in range(40)]
    is_right = {1: [], 5: []}
    for scores_C, own in zip(scores_BC, labels, strict=True):
        own_leaves = [output for output in own if taxonomy.is_leaf[output]]
        if not own_leaves:
            continue
        best = max(scores_C[own_leaves])
        num_before = sum(scores_C[o] >= best for o in np.flatnonzero(taxonomy.is_leaf) if o not in own_leaves)
        for k in is_right:
            is_right[k].append(num_before < k)
    result = show(Evaluator(taxonomy), scores_BC, labels).compute()
    assert result.num_samples_without_leaf == 40 - len(is_right[5]) > 0
    assert (result.top1, result.top5) == pytest.approx((np.mean(is_right[1]), np.mean(is_right[5])))


@pytest.mark.parametrize("k", evaluation.CUTOFFS)
def test_precision_and_recall_at_k_are_those_of_torchmetrics_over_the_leaves(k):
    scores_BC, labels = draw(21, num_samples=200)
    leaves = [o for o, class_id in enumerate(IDS) if not any(class_id in parents for parents in PARENTS.values())]
    own_BL = np.array([[leaf in own for leaf in leaves] for own in labels])
    has_leaf_B = own_BL.any(axis=1)
    assert (own_BL.sum(axis=1) > 1).any()
    rows = torch.arange(len(labels))[:, None].expand(-1, len(leaves))[has_leaf_B].flatten()
    # NOTE: probabilities, since torchmetrics leaves out what has a negative score.
    probability_BL = torch.from_numpy(scores_BC[:, leaves][has_leaf_B]).sigmoid()
    shown = probability_BL.flatten(), torch.from_numpy(own_BL[has_leaf_B]).flatten()
    result = evaluate(scores_BC, labels).compute()
    assert result.precision_at_k[str(k)] == pytest.approx(float(RetrievalPrecision(top_k=k)(*shown, rows)), abs=1e-6)
    assert result.recall_at_k[str(k)] == pytest.approx(float(RetrievalRecall(top_k=k)(*shown, rows)), abs=1e-6)
    assert result.labels_per_sample == pytest.approx(own_BL[has_leaf_B].sum(axis=1).mean())


def test_with_one_label_a_sample_recall_at_k_is_top_k_accuracy():
    scores_BC, _ = draw(22)
    leaves = np.flatnonzero(TAXONOMY.is_leaf)
    labels = [[int(o)] for o in np.random.default_rng(0).choice(leaves, len(scores_BC))]
    result = evaluate(scores_BC, labels).compute()
    assert result.recall_at_k["1"] == result.precision_at_k["1"] == result.top1
    assert result.recall_at_k["5"] == pytest.approx(result.top5)
    assert result.precision_at_k["5"] == pytest.approx(result.top5 / 5)


def test_map_at_50_is_over_all_classes_with_smeared_positives():
    scores_BC, labels = draw(10)
    positive_BC = np.zeros(scores_BC.shape, dtype=bool)
    for row, own in enumerate(labels):
        names = {IDS[o] for o in own}
        for name in names.union(*(ancestors_inside(name) for name in names)):
            positive_BC[row, TAXONOMY.output(name)] = True
    expected = MeanAveragePrecisionAtK(TAXONOMY.num_classes, k=50)
    expected.update(scores_BC, *np.nonzero(positive_BC))
    assert evaluate(scores_BC, labels).compute().map_at_50 == expected.compute()


def test_without_map_at_50_all_else_is_the_same_and_a_state_is_smaller():
    scores_BC, labels = draw(10)
    with_map, without = evaluate(scores_BC, labels), show(Evaluator(TAXONOMY), scores_BC, labels)
    assert with_map.state().keys() > without.state().keys()
    without = Evaluator.from_state(TAXONOMY, without.state()).compute()
    assert np.isnan(without.map_at_50)
    assert_same(without, replace(with_map.compute(), map_at_50=np.nan))


@pytest.mark.parametrize("tied", [False, True])
def test_order_batches_merging_and_travelling_as_state_change_nothing(tied):
    scores_BC, labels = draw(11, tied=tied)
    counts_C = np.arange(TAXONOMY.num_classes) * 15
    whole = evaluate(scores_BC, labels, batch_size=len(labels), train_counts_C=counts_C)
    merged = Evaluator(TAXONOMY, counts_C, finds_map_at_50=True)
    for part in np.array_split(np.random.default_rng(1).permutation(len(labels)), 3):
        rank = evaluate(scores_BC[part], [labels[row] for row in part], batch_size=7)
        merged.merge(Evaluator.from_state(TAXONOMY, rank.state()))
    assert_same(merged.compute(), whole.compute())


@pytest.mark.parametrize("max_waiting_rows", [5, 4096])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_two_passes_are_one(seed, tied, max_waiting_rows, monkeypatch):
    monkeypatch.setattr(evaluation, "MIN_WAITING_ROWS", 1)
    monkeypatch.setattr(evaluation, "MAX_WAITING_ROWS", max_waiting_rows)
    scores_BC, labels = draw(seed, tied=tied)
    scores_BC[7, :5] = scores_BC[8] = -np.inf
    counts_C = np.arange(TAXONOMY.num_classes) * 15
    once, twice = evaluate(scores_BC, labels, 16, counts_C), evaluate_twice(scores_BC, labels, counts_C)
    assert once.compute().to_json() == twice.compute().to_json()


@pytest.mark.parametrize("tied", [False, True])
def test_two_passes_of_several_ranks_merged_are_one_pass(tied):
    scores_BC, labels = draw(21, tied=tied)
    merged = Evaluator(TAXONOMY, num_passes=2, finds_map_at_50=True)
    for pass_number in range(2):
        ranks = [Evaluator.from_state(TAXONOMY, merged.state()) for _ in range(3)]
        for rank, part in zip(
            ranks, np.array_split(np.random.default_rng(pass_number).permutation(len(labels)), 3), strict=True
        ):
            show(rank, scores_BC[part], [labels[row] for row in part], batch_size=7)
            merged.merge(Evaluator.from_state(TAXONOMY, rank.state()))
        if pass_number == 0:
            merged.begin_second_pass()
    assert_same(merged.compute(), evaluate(scores_BC, labels).compute())


def test_a_second_pass_that_was_left_out_or_saw_other_labels_is_an_error():
    scores_BC, labels = draw(22)
    evaluator = show(Evaluator(TAXONOMY, num_passes=2), scores_BC, labels)
    with pytest.raises(DataError, match="second pass saw 0 samples"):
        evaluator.compute()
    evaluator.begin_second_pass()
    show(evaluator, scores_BC, [*labels[1:], labels[0]])
    with pytest.raises(DataError, match="second"):
        evaluator.compute()


def test_what_one_pass_keeps_is_known_before():
    scores_BC, labels = draw(23)
    counts = [
        len({row for row, own in enumerate(labels) for o in own if IDS[o].startswith(v)}) for v in TAXONOMY.verticals
    ]
    held = [array.nbytes for name, array in evaluate(scores_BC, labels).state().items() if name.endswith("scores_NV")]
    assert measure_kept_bytes(TAXONOMY.vertical_sizes, counts) == sum(held) + max(held)


def test_a_state_is_a_copy_that_can_go_on_counting():
    scores_BC, labels = draw(12)
    first = evaluate(scores_BC[:60], labels[:60])
    before = first.compute()
    resumed = Evaluator.from_state(TAXONOMY, first.state())
    resumed.update(scores_BC[60:], labels[60:])
    assert_same(first.compute(), before)
    assert_same(resumed.compute(), evaluate(scores_BC, labels).compute())


def test_a_state_is_not_searched_anew_for_every_vertical():
    searched = []

    class State(dict):
        def items(self):
            searched.append(len(self))
            return super().items()

    classes = [TaxonomyClass(f"{v}/{n}", f"{v}/{n}", (), f"v{v}") for v in range(30) for n in range(2)]
    evaluator = Evaluator(Taxonomy(classes))
    scores_BC = np.random.default_rng(0).standard_normal((60, 60))
    evaluator.update(scores_BC, [[output] for output in range(60)])
    resumed = Evaluator.from_state(Taxonomy(classes), State(evaluator.state()))
    assert_same(resumed.compute(), evaluator.compute())
    assert len(searched) <= 2


def test_tensors_of_any_float_type_are_taken():
    scores_BC, labels = draw(13)
    halves = torch.from_numpy(scores_BC).bfloat16()
    assert_same(
        evaluate(halves, labels).compute(), evaluate(halves.double().numpy(), [tuple(own) for own in labels]).compute()
    )


def test_log_sum_exp_in_blocks_of_samples_is_that_of_all(monkeypatch):
    scores_BC, labels = draw(14)
    expected = evaluate(scores_BC, labels).compute()
    monkeypatch.setattr(vertical_samples, "ROWS_PER_BLOCK", 7)
    assert_same(evaluate(scores_BC, labels).compute(), expected)


def test_classes_that_were_not_computed_are_ranked_last():
    scores_BC, labels = draw(15)
    unrouted = scores_BC.copy()
    unrouted[:40] = -np.inf
    low = scores_BC.copy()
    low[:40] = -1e4
    left, right = evaluate(unrouted, labels).compute(), evaluate(low, labels).compute()
    assert (left.pvap, left.top1, left.top5) == (right.pvap, right.top1, right.top5)


def test_log_softmax_of_a_sample_without_any_score_ranks_it_last():
    scores_BC = np.zeros((2, TAXONOMY.num_classes), dtype=np.float32)
    scores_BC[0] = -np.inf
    result = evaluate(scores_BC, [outputs("bird/duck"), outputs("bird/swan")]).compute()
    # Bird, water and swan are right at the first place, duck and its other parent, game, at the second.
    assert result.pvap_log_softmax["bird"] == pytest.approx((3 * 1 + 2 * 0.5) / 5)


def test_ap_by_frequency_is_there_when_training_counts_are():
    scores_BC, labels = draw(16)
    counts_C = np.full(TAXONOMY.num_classes, 500)
    counts_C[outputs("bird/duck", "bird/swan")] = 3
    result = evaluate(scores_BC, labels, train_counts_C=counts_C).compute()
    assert result.ap_by_frequency["few"].num_classes == 2
    assert result.ap_by_frequency["few"].ap == pytest.approx(
        np.mean(result.ap_of_class[outputs("bird/duck", "bird/swan")])
    )
    assert result.ap_by_frequency["many"].num_classes == TAXONOMY.num_classes - 2 - 3
    assert evaluate(scores_BC, labels).compute().ap_by_frequency is None


def test_to_json_is_json_with_null_for_nan():
    result = evaluate(*draw(17), train_counts_C=np.zeros(TAXONOMY.num_classes)).compute()
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["mpvap"] == result.mpvap
    assert content["ap_of_class"][TAXONOMY.output("car/van")] is None
    assert content["ap_by_frequency"]["many"] == {"ap": None, "num_classes": 0}


def test_samples_without_any_leaf_label_give_nan_and_not_zero():
    scores_BC = np.zeros((2, TAXONOMY.num_classes))
    result = evaluate(scores_BC, [outputs("bird/any"), []]).compute()
    assert np.isnan([result.top1, result.top5, result.top1_in_vertical]).all()
    assert result.num_samples_without_leaf == result.num_samples == 2
    assert result.to_json()["top1"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_numbers_are_an_error_that_says_where(value):
    scores_BC, labels = draw(18, num_samples=4)
    scores_BC[2, 5] = value
    with pytest.raises(DataError, match="sample 2 of the batch for output 5"):
        Evaluator(TAXONOMY).update(scores_BC, labels)


@pytest.mark.parametrize("label", [-1, TAXONOMY.num_classes])
def test_a_label_that_is_no_output_is_an_error_and_changes_nothing(label):
    scores_BC, labels = draw(19, num_samples=4)
    evaluator = Evaluator(TAXONOMY)
    with pytest.raises(DataError, match=f"sample 1 of the batch has the label {label}"):
        evaluator.update(scores_BC, [labels[0], [label], *labels[2:]])
    with pytest.raises(DataError, match="no sample"):
        evaluator.compute()


def test_scores_of_another_taxonomy_are_an_error():
    with pytest.raises(DataError, match="a taxonomy of 13 classes"):
        Evaluator(TAXONOMY).update(np.zeros((2, 5)), [[0], [1]])
    with pytest.raises(DataError, match="one per class"):
        Evaluator(TAXONOMY, np.zeros(5))
