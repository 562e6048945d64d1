"""A network with fewer verticals says of the classes that are left what it said."""

import itertools

import numpy as np
import pytest
import torch

from concentration.errors import ConfigError
from concentration.networks.bases import SmallBaseConfig
from concentration.networks.extension import extend_student
from concentration.networks.pace import PaceConfig
from concentration.networks.regrouping import compute_square_norms, regroup_student
from concentration.networks.student import NetworkConfig, Student, load_student
from concentration.networks.top_layers import TopConfig
from concentration.targets import SoftTargets

SIZES = {"birds": 4, "cars": 3, "fish": 5}
TOPS = [
    {"kind": "fc_fc", "top1": 16, "top2": 16},
    {"kind": "fc_sc", "top1": 16, "top2": 16},
    {"kind": "sc_sc", "top1": 16, "top2": 16},
    {"kind": "fc_sc_generic", "top1": 16, "top2": 32, "generic": 16},
    {"kind": "linear"},
]
PACES = [
    {"kind": "none"},
    {"kind": "fixed"},
    {"kind": "vertical", "log": True, "offset": "class"},
    {"kind": "vertical", "offset": "vertical"},
    {"kind": "class", "log": True, "offset": "class"},
]
#: birds and fish as one vertical, their classes by turns as a taxonomy may have them; then cars.
MERGED = {"animals": ("birds", "fish"), "cars": ("cars",)}
OUTPUT = np.array([0, 7, 1, 8, 9, 2, 3, 10, 11, 4, 5, 6])


def build(top: dict, pace: dict, norm: str = "layer") -> Student:
    torch.manual_seed(0)
    config = NetworkConfig(
        base=SmallBaseConfig(channels=(4, 6), norm="batch"),
        top=TopConfig(norm="none" if top["kind"] == "linear" else norm, **top),
        pace=PaceConfig(**pace),
        image_size=16,
        verticals=SIZES,
    )
    student = Student(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in student.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
    return student.eval()


def measure_norms(student: Student, images: torch.Tensor) -> dict[str, float]:
    return dict(zip(SIZES, compute_square_norms(student, images).mean(0).sqrt().tolist(), strict=True))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("top", "pace"), list(itertools.product(TOPS, PACES)), ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_what_is_left_is_bit_by_bit_what_it_was(top, pace, norm, images):
    old = build(top, pace, norm)
    new = regroup_student(old, {"birds": ("birds",), "fish": ("fish",)}, np.array([0, 1, 2, 3, 7, 8, 9, 10, 11]), {})
    assert new.config.verticals == {"birds": 4, "fish": 5}
    with torch.inference_mode():
        assert torch.equal(new(images), old(images)[:, [0, 1, 2, 3, 7, 8, 9, 10, 11]])


def test_of_sizes_that_no_vector_has_the_weights_stay_bit_by_bit_and_the_logits_to_the_last(images):
    """The library sums the end of a matrix in another order than its middle, and the end is elsewhere now."""
    old = build({"kind": "fc_sc", "top1": 8, "top2": 5}, PACES[2])
    new = regroup_student(old, {"cars": ("cars",), "fish": ("fish",)}, np.arange(4, 12), {})
    assert torch.equal(new.top.top2.weight, old.top.top2.weight[5:])
    assert torch.equal(new.top.classifiers[1].weight, old.top.classifiers[2].weight)
    assert torch.equal(new.pace.compute_gamma(), old.pace.compute_gamma()[1:])
    with torch.inference_mode():
        torch.testing.assert_close(new(images), old(images)[:, 4:], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("top", "pace"), list(itertools.product(TOPS, PACES)), ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@torch.no_grad()
def test_merged_verticals_have_the_logits_of_their_parts_and_one_norm(top, pace, norm, images):
    old = build(top, pace, norm)
    raw = old.top(old.base(old.normalise_images(images)))
    norms = measure_norms(old, images)
    new = regroup_student(old, MERGED, OUTPUT, norms)
    was, (merged, cars) = old(images), new.compute_logits(images)
    assert torch.equal(cars, was[:, 4:7]), "a vertical that is not merged stays"
    assert new.num_outputs == old.num_outputs
    if pace["kind"] == "none":
        torch.testing.assert_close(merged, was[:, OUTPUT[:9]], atol=1e-5, rtol=1e-5)
        return
    # By hand: each part's raw logits by its usual norm, times its gamma, then one norm over both.
    gammas = {v: g for v, (g, _) in zip(SIZES, old.pace.by_vertical(), strict=True)}
    strength = {v: g.square().mean().sqrt() for v, g in gammas.items()}
    scaled = {v: strength[v] * raw[n] / norms[v] for n, v in enumerate(SIZES)}
    length_B1 = torch.cat([scaled["birds"], scaled["fish"]], 1).norm(dim=1, keepdim=True)
    total = (strength["birds"] ** 2 + strength["fish"] ** 2).sqrt()
    offsets = {v: o for v, (_, o) in zip(SIZES, old.pace.by_vertical(), strict=True)}
    expected = torch.cat([scaled[v] * (gammas[v] / strength[v]) for v in ("birds", "fish")], 1) * total / length_B1
    if pace.get("offset") == "class":
        expected = expected + torch.cat([offsets["birds"], offsets["fish"]])
    elif pace.get("offset") == "vertical":
        expected = expected + (4 * offsets["birds"] + 5 * offsets["fish"]) / 9
    by_part = np.argsort(np.where(OUTPUT[:9] < 4, OUTPUT[:9], OUTPUT[:9] + 100))
    torch.testing.assert_close(merged[:, by_part], expected, atol=1e-4, rtol=1e-4)


def test_an_image_whose_parts_have_their_usual_norms_keeps_its_logits(images):
    old = build(TOPS[1], PACES[2])
    with torch.inference_mode():
        new = regroup_student(old, MERGED, OUTPUT, measure_norms(old, images[:1]))
        torch.testing.assert_close(new(images[:1]), old(images[:1])[:, OUTPUT], atol=1e-4, rtol=1e-4)


def test_a_merged_network_is_trained_saved_merged_again_and_extended(images, tmp_path):
    old = build(TOPS[1], PACES[2])
    new = regroup_student(old, MERGED, OUTPUT, dict.fromkeys(SIZES, 1.0))
    assert new.config.num_blocks == {"animals": 2}
    assert new.top.classifiers[0].in_features == 32
    weight = new.top.classifiers[0].weight.detach()
    is_bird = OUTPUT[:9] < 4
    assert not weight[is_bird, 16:].any(), "block-diagonal at first"
    assert not weight[~is_bird, :16].any()
    new.save(tmp_path / "merged.safetensors", {})
    again = load_student(tmp_path / "merged.safetensors")
    with torch.inference_mode():
        assert torch.equal(again(images), new(images))
    optimizer = torch.optim.Adagrad(new.train().parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        new(images, SoftTargets.from_labels([[0], [1], [2], [9], [4], [5]])).sum().backward()
        optimizer.step()
    assert new.top.classifiers[0].weight[is_bird, 16:].any(), "the zeros are trained"
    larger = extend_student(again, {"animals": 9, "cars": 3, "trees": 2}, torch.full((14,), 0.1), seed=0).eval()
    with torch.inference_mode():
        torch.testing.assert_close(larger(images)[:, :12], again(images), atol=2e-5, rtol=1e-4)
        whole = regroup_student(
            again, {"all": ("animals", "cars")}, np.arange(12), dict.fromkeys(again.config.verticals, 1.0)
        )
        assert whole.config.num_blocks == {"all": 3}
        assert whole(images).isfinite().all()
        alone = regroup_student(again, {"animals": ("animals",)}, np.arange(9), {})
        assert alone.config.num_blocks == {"animals": 2}
        assert torch.equal(alone(images), again(images)[:, :9])


def test_a_softmax_says_what_it_would_if_the_others_were_not_there(images):
    student = build(TOPS[1], PACES[0])
    old = Student(student.config.model_copy(update={"loss": "softmax"}))
    old.load_state_dict(student.state_dict())
    new = regroup_student(old.eval(), {"birds": ("birds",), "cars": ("cars",)}, np.arange(7), {})
    with torch.inference_mode():
        was = old(images).sigmoid()[:, :7]
        torch.testing.assert_close(new(images).sigmoid(), was / was.sum(1, keepdim=True))


def test_a_grown_network_is_refused():
    old = build(TOPS[1], PACES[0])
    old.augmentations.append(torch.nn.Identity())
    with pytest.raises(ConfigError, match="grown by auxiliary heads"):
        regroup_student(old, {"birds": ("birds",)}, np.arange(4), {})
