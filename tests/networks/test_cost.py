"""What a network costs, counted by hand for a network small enough."""

import pytest
import torch

from concentration.networks.cost import (
    build_without_weights,
    count_by_layer,
    count_multiply_adds,
    count_parameters,
    without_pretrained,
)
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import count_top_parameters
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


def without_weights(base: dict, image_size: int, top: dict, verticals: dict[str, int]) -> Student:
    values = {"base": base, "top": top, "pace": {"kind": "vertical"}, "image_size": image_size, "verticals": verticals}
    return build_without_weights(parse_config(NetworkConfig, values))


@pytest.mark.parametrize(
    ("base", "image_size"),
    [
        ({"kind": "small"}, 32),
        ({"kind": "inception_v2", "end_point": "mixed3b"}, 64),
        ({"kind": "timm", "name": "resnet18", "pretrained": True}, 64),  # of which no weights are fetched
        ({"kind": "timm", "name": "vit_tiny_patch16_224"}, 64),
        ({"kind": "timm", "name": "mobilenetv3_small_100"}, 64),
    ],
)
def test_the_layers_add_up_to_the_network_and_need_no_memory(base, image_size):
    top = {"kind": "fc_sc_generic", "top1": 6, "top2": 5, "generic": 2, "norm": "layer"}
    student = without_weights(base, image_size, top, {"birds": 3, "cars": 2})
    layers = count_by_layer(student)
    assert sum(layer.parameters for layer in layers) == count_parameters(student)["total"]
    assert sum(layer.multiply_adds for layer in layers) == count_multiply_adds(student)
    assert all(layer.multiply_adds >= 0 for layer in layers)
    found = {layer.name: (layer.parameters, layer.multiply_adds) for layer in layers}
    assert len(found) == len(layers)
    assert found["top.classifiers.cars"] == (5 * 2 + 2, 5 * 2)
    assert found["top.top2"] == (6 * 8 + 8, 6 * 8)
    assert found["pace"] == (2, 0)
    # The same on the CPU, whose own attention torch's counter does not know.
    real = Student(without_pretrained(student.config))
    assert count_multiply_adds(real) == count_multiply_adds(student)
    assert count_by_layer(real) == layers


@pytest.mark.parametrize(
    ("top", "millions"),
    [
        ({"kind": "fc_fc", "top1": 4096, "top2": 512}, 91.0),
        ({"kind": "fc_sc", "top1": 4096, "top2": 512}, 130.9),
        ({"kind": "sc_sc", "top1": 512, "top2": 512}, 150.8),
        ({"kind": "fc_sc_generic", "top1": 4096, "top2": 512, "generic": 128}, 120.9),
        ({"kind": "fc_sc_generic", "top1": 4096, "top2": 512, "generic": 256}, 111.0),
        ({"kind": "fc_sc_generic", "top1": 4096, "top2": 512, "generic": 384}, 101.0),
    ],
)
def test_the_top_layers_multiply_as_the_papers_formulas_say(top, millions):
    """Section 3.2 at the paper's sizes: a weight is one multiply-add an image, and biases are none."""
    verticals = {f"v{number}": 5000 for number in range(20)}
    student = without_weights({"kind": "inception_v2"}, 224, top, verticals)
    expected = count_top_parameters(student.config.top, 9216, num_classes=100_000, num_verticals=20)
    layers = [layer for layer in count_by_layer(student) if layer.name.startswith("top.")]
    assert sum(layer.multiply_adds for layer in layers) == expected
    assert round(expected / 1e6, 1) == millions
    biases = sum(p.numel() for name, p in student.top.named_parameters() if name.endswith("bias"))
    assert sum(layer.parameters for layer in layers) - biases == expected


def test_a_million_classes_are_counted_without_their_weights():
    verticals = {f"v{number}": 50_000 for number in range(20)}
    student = without_weights({"kind": "small"}, 32, {"kind": "fc_sc", "top1": 4096, "top2": 512}, verticals)
    classifiers = [layer for layer in count_by_layer(student) if layer.name.startswith("top.classifiers.")]
    assert sum(layer.multiply_adds for layer in classifiers) == 512_000_000
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
