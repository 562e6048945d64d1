"""Outputs and classes against sums and maxima that are taken one by one."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concentration.errors import ConfigError, DataError
from concentration.networks.external.class_map import (
    LARGEST_LOGIT,
    ClassMap,
    check_outputs,
    check_softmax_is_left,
    load_class_ids,
)

KINDS = ("softmax_logits", "softmax_probabilities", "sigmoid_logits", "sigmoid_probabilities")
BIRDS = ("bird", "seabird", "osprey", "raptor", "gull")  # in the order of the outputs


def is_below(taxonomy, class_id: str, ancestor: str) -> bool:
    """Whether `ancestor` is an ancestor of the class inside the vertical, by asking each class for its parents."""
    parents = taxonomy.classes[taxonomy.position[class_id]].parents
    return any(parent == ancestor or is_below(taxonomy, parent, ancestor) for parent in parents)


def combine_slowly(outputs_O, kind, class_ids, taxonomy, smear) -> list[float]:
    """The probability of every bird: the sum of a softmax's, the largest of the sigmoids'."""
    values = [float(value) for value in outputs_O]
    if kind == "softmax_logits":
        total = sum(math.exp(value) for value in values)
        values = [math.exp(value) / total for value in values]
    elif kind == "sigmoid_logits":
        values = [1 / (1 + math.exp(-value)) for value in values]
    found = []
    for bird in BIRDS:
        own = [value for value, class_id in zip(values, class_ids, strict=True) if class_id == bird]
        if not own and smear:
            own = [
                value
                for value, class_id in zip(values, class_ids, strict=True)
                if class_id is not None and is_below(taxonomy, class_id, bird)
            ]
        found.append((sum(own) if kind.startswith("softmax") else max(own)) if own else 0.0)
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(
    class_ids=st.lists(st.sampled_from((None, *BIRDS)), min_size=1, max_size=9).filter(any),
    smear=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_class_gets_the_sum_or_the_largest_of_its_outputs(taxonomy, kind, class_ids, smear, seed):
    outputs_BO = torch.randn(3, len(class_ids), generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "softmax_probabilities":
        outputs_BO = outputs_BO.softmax(1)
    elif kind == "sigmoid_probabilities":
        outputs_BO = outputs_BO.sigmoid()
    class_map = ClassMap.build(class_ids, taxonomy.restrict("birds"), smear)
    logit_BV = class_map.compute_logits(outputs_BO, kind)
    expected = [combine_slowly(outputs_O, kind, class_ids, taxonomy, smear) for outputs_O in outputs_BO]
    np.testing.assert_allclose(logit_BV.sigmoid(), expected, atol=1e-6)
    assert logit_BV.dtype == torch.float32
    assert (logit_BV.abs() <= LARGEST_LOGIT).all(), "finite"
    missing = {BIRDS[number] for number in class_map.find_missing()}
    assert missing == {bird for bird, values in zip(BIRDS, zip(*expected, strict=True), strict=True) if not any(values)}


def test_a_class_with_two_parents_counts_once_for_their_common_ancestor(taxonomy):
    """An osprey is a raptor and a seabird, and both are birds."""
    class_map = ClassMap.build(["osprey", None], taxonomy.restrict("birds"), smear=True)
    probability_V = class_map.compute_logits(torch.tensor([[0.75, 0.25]]), "softmax_probabilities").sigmoid()[0]
    by_bird = dict(zip(BIRDS, probability_V.tolist(), strict=True))
    assert by_bird == pytest.approx({"bird": 0.75, "seabird": 0.75, "osprey": 0.75, "raptor": 0.75, "gull": 0.0})


def test_a_certain_answer_keeps_its_rank():
    """float32 would round all of these probabilities to 1."""
    outputs_BO = torch.tensor([[20.0, 0.0], [25.0, 0.0], [30.0, 0.0], [1000.0, -1000.0]])
    for kind in ("softmax_logits", "sigmoid_logits"):
        logit_BV = ClassMap.identity(2).compute_logits(outputs_BO, kind)
        assert logit_BV[:, 0].tolist() == sorted(logit_BV[:, 0].tolist())
        assert logit_BV[:3, 0].tolist() == pytest.approx([20, 25, 30], abs=0.01)
        assert torch.isfinite(logit_BV).all()


@given(st.integers(0, 99))
def test_logits_of_sigmoids_stay_what_they_are(seed):
    outputs_BO = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * 9
    assert torch.equal(ClassMap.identity(6).compute_logits(outputs_BO, "sigmoid_logits"), outputs_BO)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(kind, value):
    with pytest.raises(DataError, match="it: gives NaN or infinity"):
        check_outputs(torch.tensor([[0.5, value]]), kind, "it")


def test_minus_infinity_is_a_probability_of_0_but_not_of_all_outputs_of_a_softmax():
    nothing_BO = torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]])
    check_outputs(nothing_BO[:1], "softmax_logits", "it")
    check_outputs(nothing_BO, "sigmoid_logits", "it")
    with pytest.raises(DataError, match="it: gives NaN or infinity"):
        check_outputs(nothing_BO, "softmax_logits", "it")


@pytest.mark.parametrize(
    ("outputs", "kind", "expected"),
    [
        ([0.5, -3.0], "softmax_probabilities", "lie between -3 and 0.5.*external.output=softmax_logits"),
        ([0.5, 1.2], "sigmoid_probabilities", "external.output=sigmoid_logits"),
        ([0.5, 0.9], "softmax_probabilities", "do not add up to 1.*external.output=sigmoid_probabilities"),
    ],
)
def test_outputs_that_are_no_probabilities_are_refused(outputs, kind, expected):
    with pytest.raises(DataError, match=expected):
        check_outputs(torch.tensor([outputs]), kind, "it")


def test_rounding_does_not_make_probabilities_wrong():
    check_outputs(torch.tensor([[0.9996, 0.0009]], dtype=torch.float16), "softmax_probabilities", "it")
    check_outputs(torch.tensor([[1.0002, -0.0001]]), "sigmoid_probabilities", "it")
    check_outputs(torch.tensor([[-torch.inf, 3.0]]), "softmax_logits", "it")


def test_a_softmax_that_is_in_the_model_already_is_refused():
    outputs_BO = torch.randn(3, 5).softmax(1)
    with pytest.raises(DataError, match=r"give external\.output=softmax_probabilities"):
        check_softmax_is_left(outputs_BO, "softmax_logits", "it")
    check_softmax_is_left(outputs_BO * 2, "softmax_logits", "it")
    check_softmax_is_left(outputs_BO, "sigmoid_logits", "it")


@pytest.fixture
def load(taxonomy, tmp_path):
    """(content of the map, names): the class of each of the model's 3 outputs."""

    def load_map(content, names=()):
        (tmp_path / "map.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return load_class_ids(str(tmp_path / "map.json"), 3, names, taxonomy, "birds")

    return load_map


@pytest.mark.parametrize(
    ("content", "names", "expected"),
    [
        (["gull", None, "gull"], (), ("gull", None, "gull")),
        ({"2": "gull", "0": "bird"}, (), ("bird", None, "gull")),
        ({"b": "gull", "c": None}, ("a", "b", "c"), (None, "gull", None)),
        ({"b": "gull", "0": "bird"}, ("a", "b", "c"), ("bird", "gull", None)),
        ({"2": "gull"}, ("2", "1", "0"), ("gull", None, None)),
    ],
)
def test_a_map_is_a_list_or_an_object_of_positions_or_names(load, content, names, expected):
    assert load(content, names) == expected


def test_identity_is_the_order_of_the_vertical(taxonomy):
    assert load_class_ids("identity", 5, (), taxonomy, "birds") == BIRDS
    with pytest.raises(ConfigError, match="the model has 4 outputs, the vertical 'birds' 5 classes"):
        load_class_ids("identity", 4, (), taxonomy, "birds")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["gull", None], "2 entries, but the model has 3 outputs"),
        (["gull", None, 7], "output 2 has 7, expected a class id or null"),
        (["gul", None, None], "output 0 has the class 'gul', which is not in the taxonomy; did you mean 'gull'?"),
        (["taxi", None, None], "output 0 has the class 'taxi' of the vertical 'cars', expected one of 'birds'"),
        ([None, None, None], "names no class"),
        ({}, "names no class"),
        ({"3": "gull"}, "no output '3'; expected positions of the model's outputs, 0 to 2"),
        ({"-1": "gull"}, "no output '-1'"),
        ({"1" * 5000: "gull"}, "no output '111"),
        ({"²": "gull"}, "no output '²'"),
        ({"1": "gull", "01": "bird"}, "'1' and '01' are both output 1"),
        ('{"1": "gull", "1": "bird"}', "the key '1' comes twice"),
        ("gull", "not JSON"),
        ('"gull"', "found str, expected a list"),
        ("3", "found int, expected a list"),
        ("[" * 100_000, "not JSON"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin-1"), "not JSON"),
    ],
)
def test_a_wrong_map_is_one_clear_error(load, content, expected):
    with pytest.raises(DataError, match=expected.replace("?", r"\?")) as caught:
        load(content)
    assert "\n" not in str(caught.value)


def test_names_that_several_outputs_have_are_refused(load):
    with pytest.raises(DataError, match="2 outputs have the name 'b'; give their positions"):
        load({"b": "gull"}, ("b", "b", "c"))
    with pytest.raises(DataError, match=r"no output 'd'.*names of the model's outputs.*did you mean 'dd'"):
        load({"d": "gull"}, ("a", "b", "dd"))


def test_a_map_that_is_not_there_is_named(taxonomy, tmp_path):
    for path in (tmp_path / "not_there.json", tmp_path):
        with pytest.raises(ConfigError, match=f"external.classes={path}: cannot be read"):
            load_class_ids(str(path), 3, (), taxonomy, "birds")
