"""What a network costs, counted by hand for a network small enough."""

import pytest
import torch

from concentration.networks.cost import count_multiply_adds, count_parameters
from concentration.networks.student import NetworkConfig, Student
from concentration.schema import parse_config

# Images of 8 x 8 and one block of 4 channels: features of 4 channels x 4 x 4 pixels.
D = 64


def build(top: dict, pace: dict | None = None, norm: str = "group") -> Student:
    values = {
        "base": {"kind": "small", "channels": [4], "norm": norm},
        "top": {"top1": 6, "top2": 5, **top},
        "pace": pace or {"kind": "none"},
        "image_size": 8,
        "verticals": {"birds": 3, "cars": 2},
    }
    return Student(parse_config(NetworkConfig, values))


BASE = 3 * 4 * 3 * 3 + 4 + 4  # the convolution has no bias, the norm a scale and a shift per channel
CLASSIFIERS = (5 * 3 + 3) + (5 * 2 + 2)


@pytest.mark.parametrize(
    ("top", "pace", "expected_top"),
    [
        ({"kind": "fc_fc"}, {"kind": "none"}, (D * 6 + 6) + (6 * 5 + 5) + CLASSIFIERS),
        ({"kind": "fc_sc"}, {"kind": "vertical"}, (D * 6 + 6) + 2 * (6 * 5 + 5) + CLASSIFIERS + 2),
        ({"kind": "sc_sc"}, {"kind": "class"}, 2 * (D * 6 + 6) + 2 * (6 * 5 + 5) + CLASSIFIERS + 5),
        (
            {"kind": "fc_sc_generic", "generic": 1, "norm": "layer"},
            {"kind": "fixed", "offset": "class"},  # a fixed gamma is not trained: only the offsets count
            (D * 6 + 6) + (6 + 1) + 2 * (6 * 4 + 4) + CLASSIFIERS + 2 * 6 + 2 * (1 + 2 * 4) + 5,
        ),
    ],
)
def test_parameters_are_those_counted_by_hand(top, pace, expected_top):
    expected = {"base": BASE, "top": expected_top, "total": BASE + expected_top}
    assert count_parameters(build(top, pace)) == expected


@pytest.mark.parametrize(
    ("top", "expected_top"),
    [
        ({"kind": "fc_fc"}, D * 6 + 6 * 5),
        ({"kind": "fc_sc"}, D * 6 + 2 * 6 * 5),
        ({"kind": "sc_sc"}, 2 * D * 6 + 2 * 6 * 5),
        ({"kind": "fc_sc_generic", "generic": 1}, D * 6 + 6 * 1 + 2 * 6 * 4),
    ],
)
def test_multiply_adds_are_those_of_the_convolution_and_the_matrix_products(top, expected_top):
    convolution = (8 * 8) * 4 * (3 * 3 * 3)
    classifiers = 5 * 3 + 5 * 2
    assert count_multiply_adds(build(top, {"kind": "vertical"})) == convolution + expected_top + classifiers


def test_counting_leaves_a_network_in_training_as_it_was():
    student = build({"kind": "fc_sc", "norm": "batch"}, norm="batch").train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    count_multiply_adds(student)
    assert student.training
    assert student.top.top1_norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
