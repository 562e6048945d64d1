"""A network that is extended says of the old classes what it said, whatever its structure."""

import itertools

import pytest
import torch

from concentration.errors import ConfigError
from concentration.networks.bases import SmallBaseConfig
from concentration.networks.extension import extend_student, hold_old_parameters
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student
from concentration.networks.top_layers import TopConfig
from concentration.targets import SoftTargets

BEFORE = {"birds": 4, "cars": 3}
NOW = {"birds": 6, "cars": 3, "fish": 5}
#: Outputs of the old classes in the new network.
OLD = [0, 1, 2, 3, 6, 7, 8]

TOPS = [
    {"kind": "fc_fc"},
    {"kind": "fc_sc"},
    {"kind": "sc_sc"},
    {"kind": "fc_sc_generic", "generic": 3},
]
PACES = [
    {"kind": "none"},
    {"kind": "fixed"},
    {"kind": "vertical", "log": True, "offset": "class"},
    {"kind": "class", "offset": "vertical"},
]


def build(top: dict, pace: dict, norm: str = "layer") -> Student:
    torch.manual_seed(0)
    config = NetworkConfig(
        base=SmallBaseConfig(channels=(4, 6), norm="batch"),
        top=TopConfig(top1=8, top2=5, norm=norm, **top),
        pace=PaceConfig(**pace),
        image_size=16,
        verticals=BEFORE,
    )
    student = Student(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


FREQUENCY = torch.linspace(0.01, 0.2, 14)


@pytest.mark.parametrize(("top", "pace"), list(itertools.product(TOPS, PACES)), ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_old_classes_keep_their_logits_and_new_ones_have_an_output(top, pace, norm, images):
    old = build(top, pace, norm)
    new = extend_student(old, NOW, FREQUENCY, seed=3).eval()
    assert new.num_outputs == 14
    with torch.no_grad():
        torch.testing.assert_close(new(images)[:, OLD], old(images), atol=2e-5, rtol=1e-4)
        assert new(images).isfinite().all()
    again = extend_student(old, NOW, FREQUENCY, seed=3)
    assert all(torch.equal(*pair) for pair in zip(new.state_dict().values(), again.state_dict().values(), strict=True))


def test_new_classes_start_at_their_frequencies(images):
    new = extend_student(build(TOPS[1], PACES[2]), NOW, FREQUENCY, seed=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(new(images)[:, 4:6].sigmoid(), FREQUENCY[4:6].expand(6, 2), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(new.pace.offset[9:].detach(), FREQUENCY[9:].logit())


@pytest.mark.parametrize(("top", "pace"), list(itertools.product(TOPS, PACES)), ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_what_is_held_does_not_move_and_all_that_is_new_does(top, pace, norm, images):
    old = build(top, pace, norm)
    new = extend_student(old, NOW, FREQUENCY, seed=0)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    hold_old_parameters(old, new)
    optimizer = torch.optim.Adagrad(new.parameters(), lr=0.1)
    new.train()
    for _ in range(3):
        optimizer.zero_grad()
        new(images, SoftTargets.from_labels([[4], [9], [10], [0], [13], [5]])).sum().backward()
        optimizer.step()
    moved = {name: (tensor != before[name]) for name, tensor in new.state_dict().items()}
    for number, rows in enumerate((4, 3)):
        assert not moved[f"top.classifiers.{number}.weight"][:rows].any()
    assert not any(moved[name].any() for name in moved if name.startswith("base.")), "statistics of batches neither"
    assert moved["top.classifiers.0.weight"][4:].any(dim=1).all()
    assert moved["top.classifiers.2.weight"].any()
    if top["kind"] != "fc_fc":
        assert moved["top.top2.weight"].any()
    if "offset" in pace:
        assert not moved["pace.offset"][OLD if pace["offset"] == "class" else [0, 1]].any()
        assert moved["pace.offset"][-1].any()
    with torch.no_grad():
        after, was = new.eval()(images), old(images)
    torch.testing.assert_close(after[:, 6:9], was[:, 4:7], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_extended_is_refused():
    old = build(TOPS[1], PACES[0])
    for verticals, message in (
        ({"cars": 3, "birds": 4}, "verticals may only be added behind the others"),
        ({"birds": 4}, "verticals may only be added behind the others"),
        ({"birds": 3, "cars": 3}, "has 4 classes in birds, and is to have 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            extend_student(old, verticals, FREQUENCY, seed=0)
