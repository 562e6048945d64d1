"""Gater and mixture: an image's answer is that of its expert alone, whatever else is in the batch, and only that is run."""

import functools

import pytest
import torch

from concentration.errors import DataError
from concentration.grouping.kmeans import Centroids
from concentration.grouping.sample_groups import CentroidRouter
from concentration.networks.cost import count_active_parameters, count_multiply_adds, count_parameters
from concentration.networks.mixture import Mixture, MixtureNetworkConfig, load_mixture
from concentration.networks.student import NetworkConfig, Student, load_student
from concentration.schema import parse_config
from concentration.stages.export_programs import trace_program
from concentration.targets import SoftTargets

NUM_EXPERTS, D = 3, 64
#: Products of float32 differ with the size of a batch, and the weights here make numbers of tens.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
BASE = {"kind": "small", "channels": [4], "norm": "batch"}
EXPERT = {
    "base": BASE,
    "top": {"kind": "fc_sc", "top1": 6, "top2": 5, "norm": "batch"},
    "pace": {"kind": "none"},
    "image_size": 8,
    "verticals": {"birds": 3, "cars": 2},
}
TRUNK = {"base": BASE, "image_size": 8, "num_verticals": 2}


def describe_gater(rule="centroid", top_experts=1, trunk=TRUNK, normalise=False) -> dict:
    return {
        "trunk": trunk,
        "rule": {"kind": rule},
        "num_experts": NUM_EXPERTS,
        "normalise": normalise,
        "top_experts": top_experts,
    }


def randomise(network: torch.nn.Module, seed: int) -> None:
    """Weights and batch statistics, so that no two parts are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.5 if "var" in name else values)


def build(**gater) -> Mixture:
    config = parse_config(MixtureNetworkConfig, {"gater": describe_gater(**gater), "experts": [EXPERT] * NUM_EXPERTS})
    mixture = Mixture(config)
    randomise(mixture, 0)
    return mixture.eval()


def build_shared(**gater) -> Student:
    routed = {"kind": "routed", "gater": describe_gater(**gater), "expert": TRUNK}
    student = Student(parse_config(NetworkConfig, {**EXPERT, "base": routed}))
    randomise(student, 1)
    return student


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", ["centroid", "router"])
@torch.inference_mode()
def test_an_image_gets_the_answer_of_its_expert_whatever_else_is_in_the_batch(rule, images):
    mixture = build(rule=rule)
    if rule == "router":  # biases at which no expert gets all
        mixture.gater.router[-1].bias -= mixture.gater.router(mixture.gater.compute_features(images)).mean(0)
    choice = mixture.gater(images)
    assert len(set(choice.expert_BR.flatten().tolist())) > 1
    logits_BC = mixture(images)
    for row, expert in enumerate(choice.expert_BR[:, 0].tolist()):
        alone = mixture.experts[expert](images[row : row + 1])[0]
        assert_close(logits_BC[row], alone)
        assert_close(mixture(images[row : row + 1])[0], alone)


@torch.inference_mode()
def test_two_experts_are_the_two_nearest_and_count_the_same(images):
    mixture = build(top_experts=2)
    feature_BD = mixture.gater.trunk(images)
    distance_BE = torch.cdist(feature_BD.double(), mixture.gater.centroid_ED.double()).square() + mixture.gater.price_E
    nearest_B2 = distance_BE.argsort(1)[:, :2]
    assert torch.equal(mixture.gater(images).expert_BR, nearest_B2)
    for row, pair in enumerate(nearest_B2.tolist()):
        expected = sum(mixture.experts[expert](images[row : row + 1])[0] for expert in pair) / 2
        assert_close(mixture(images)[row], expected)


@torch.inference_mode()
def test_a_router_weighs_two_experts_by_their_probabilities(images):
    mixture = build(rule="router", top_experts=2)
    choice = mixture.gater(images)
    probability_BE = mixture.gater.router(mixture.gater.compute_features(images)).softmax(1)
    assert_close(choice.weight_BR.sum(1), torch.ones(len(images)))
    ratio_B = choice.weight_BR[:, 0] / choice.weight_BR[:, 1]
    expected_B2 = probability_BE.gather(1, choice.expert_BR)
    assert_close(ratio_B, expected_B2[:, 0] / expected_B2[:, 1])


@pytest.mark.parametrize("layer", ["base", "top1"])
@pytest.mark.parametrize("normalise", [False, True])
@torch.inference_mode()
def test_the_gate_of_centroids_chooses_as_the_grouping_did(layer, normalise, images):
    student = Student(parse_config(NetworkConfig, EXPERT)).eval()
    randomise(student, 3)
    num_features = D if layer == "base" else 6
    generator = torch.Generator().manual_seed(4)
    centroids = Centroids(torch.randn(NUM_EXPERTS, num_features, generator=generator), torch.tensor([0.1, 0, -0.1]))
    router = CentroidRouter(centroids, layer, normalise, "hash")
    mixture = build(trunk={**TRUNK, "top": EXPERT["top"] if layer == "top1" else None}, normalise=normalise)
    mixture.gater.trunk.take(student.base, student.top)
    mixture.gater.take_centroids(router)
    expected_B = router.route(student.compute_features(images, layer))
    assert torch.equal(mixture.gater(images).expert_BR[:, 0], expected_B)


CONVOLUTION, EXPERT_TOP = 8 * 8 * 4 * 27, D * 6 + 6 * 10 + 5 * 3 + 5 * 2
GATER = CONVOLUTION + NUM_EXPERTS * D


@pytest.mark.parametrize("rank", [1, 2])
def test_one_image_costs_the_gate_and_the_experts_that_see_it(rank):
    mixture = build(top_experts=rank)
    assert count_multiply_adds(mixture) == GATER + rank * (CONVOLUTION + EXPERT_TOP)
    of_expert = count_parameters(mixture.experts[0])["total"]
    of_gater = sum(parameter.numel() for parameter in mixture.gater.parameters())
    assert count_parameters(mixture)["total"] == of_gater + NUM_EXPERTS * of_expert
    assert count_active_parameters(mixture) == of_gater + rank * of_expert
    shared = build_shared(top_experts=rank)
    assert count_multiply_adds(shared) == GATER + rank * CONVOLUTION + EXPERT_TOP
    assert count_active_parameters(shared) == count_parameters(shared)["total"] - (NUM_EXPERTS - rank) * (108 + 8)


def test_of_a_student_all_parameters_are_active():
    student = Student(parse_config(NetworkConfig, {**EXPERT, "pace": {"kind": "vertical", "offset": "class"}}))
    assert count_active_parameters(student) == count_parameters(student)["total"]


@torch.inference_mode()
def test_a_shared_decoder_sees_the_features_of_the_chosen_expert(images):
    student = build_shared().eval()
    base = student.base
    expert_B = base.gater(images / 255).expert_BR[:, 0].tolist()
    features = [base.experts[expert](images[row : row + 1])[0] for row, expert in enumerate(expert_B)]
    assert_close(base(images / 255), torch.stack(features))
    assert_close(student(images), torch.cat(student.pace(student.top(torch.stack(features))), dim=1))


def test_training_a_shared_decoder_leaves_gate_and_experts_as_they_are_bit_by_bit(images):
    student = build_shared().train()
    assert student.top.training
    assert not any(module.training for module in student.base.modules())
    before = {name: tensor.clone() for name, tensor in student.base.state_dict().items()}
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in [*student.top.parameters(), *student.pace.parameters()]}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    student(images, SoftTargets.from_labels([[0]] * len(images))).sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.base.state_dict().items())


@torch.inference_mode()
def test_a_saved_mixture_is_the_same(tmp_path, images):
    mixture = build(rule="router", top_experts=2)
    mixture.save(tmp_path / "model.safetensors", {"taxonomy": "x"})
    assert torch.equal(load_mixture(tmp_path / "model.safetensors")(images), mixture(images))
    shared = build_shared().eval()
    shared.save(tmp_path / "shared.safetensors", {})
    assert torch.equal(load_student(tmp_path / "shared.safetensors")(images), shared(images))
    with pytest.raises(DataError, match="describes no mixture"):
        load_mixture(tmp_path / "shared.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-4])
    with pytest.raises(DataError, match="damaged"):
        load_mixture(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("form", [build, build_shared])
@torch.inference_mode()
def test_an_exported_mixture_answers_as_it_does(form, rank, images):
    network = form(top_experts=rank).eval()
    program = trace_program(network, 8)
    for batch in (images, images[:3]):
        for found, expected in zip(program.module()(batch), network.answer(batch), strict=True):
            assert_close(found, expected)
