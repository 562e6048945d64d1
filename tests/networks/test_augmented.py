"""Auxiliary heads: what they add and to whom, that the old network stays as it was, what they cost, and doing without some."""

import pytest
import torch

from concentration.errors import ConfigError
from concentration.networks.augmented import ConditionalHeads, augment, choose_widths, count_head, list_classifier
from concentration.networks.auxiliary_heads import HeadConfig, HeadsConfig
from concentration.networks.bases import InceptionV2Config, SmallBaseConfig
from concentration.networks.cost import build_without_weights, count_by_layer, count_multiply_adds, count_parameters
from concentration.networks.pace import PaceConfig
from concentration.networks.student import NetworkConfig, Student, load_student
from concentration.networks.top_layers import TopConfig
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy
from concentration.targets import SoftTargets
from concentration.training.optimizers import SGDConfig, build_optimizer

VERTICALS = {"a": 3, "b": 4}
#: Groups across the verticals.
GROUP_C = torch.tensor([0, 1, 0, 1, 1, 2, 2])


def build(top="fc_sc", pace="none", **options) -> Student:
    torch.manual_seed(0)
    config = NetworkConfig(
        base=SmallBaseConfig(channels=(4, 6), norm="batch"),
        top=TopConfig(kind=top, top1=10, top2=8, norm="batch"),
        pace=PaceConfig(kind=pace),
        image_size=16,
        verticals=VERTICALS,
        **options,
    )
    student = Student(config)
    student(torch.rand(8, 3, 16, 16))  # moves the batch statistics
    return student


def heads_config(**options) -> HeadsConfig:
    sizes = torch.bincount(GROUP_C).tolist()
    heads = {f"group-{n}": HeadConfig(num_classes=size, hidden=(5, 6)) for n, size in enumerate(sizes)}
    return HeadsConfig(heads=heads, **options)


def grow(student: Student, **options) -> Student:
    torch.manual_seed(1)
    return augment(student, heads_config(**options), GROUP_C)


def draw_batch(seed=0) -> tuple[torch.Tensor, SoftTargets]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(8, 3, 16, 16, generator=generator), SoftTargets.from_labels([[n % 7] for n in range(8)])


@pytest.mark.parametrize("pace", ["none", "vertical"])
@pytest.mark.parametrize("layer", ["base", "top1"])
def test_each_head_adds_to_the_logits_of_its_group_alone(pace, layer):
    network = grow(build(pace=pace), layer=layer).eval()
    images, _ = draw_batch()
    with torch.no_grad():
        features = network.base(network.normalise_images(images))
        given = features if layer == "base" else network.top.compute_top1(features)
        raw_BC = torch.cat(network.top(features), dim=1)
        for group, head in enumerate(network.augmentations[0].heads):
            hidden = given
            for linear in head.hidden[::2]:
                hidden = torch.relu(hidden @ linear.weight.T + linear.bias)
            for row, output in enumerate((group == GROUP_C).nonzero()[:, 0]):
                raw_BC[:, output] += hidden @ head.classify.weight[row]
        expected = torch.cat(network.pace(raw_BC.split(list(VERTICALS.values()), dim=1)), dim=1)
        torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize("pace", ["none", "vertical"])
def test_the_loss_is_the_readable_one(pace):
    network = grow(build(pace=pace)).eval()
    images, targets = draw_batch()
    weight_B = torch.rand(8)
    expected = sigmoid_cross_entropy(network.compute_logits(images), targets) * weight_B
    torch.testing.assert_close(network(images, targets, weight_B), expected)


def train(network: Student, num_steps=5) -> None:
    optimizer = build_optimizer(SGDConfig(lr=0.1, weight_decay=0.1), network)
    network.train()
    for step in range(num_steps):
        images, targets = draw_batch(step)
        optimizer.zero_grad()
        network(images, targets).mean().backward()
        optimizer.step()


def test_what_is_old_stays_bit_by_bit_and_only_that():
    old = build()
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    once = grow(old.train())
    train(once)
    frozen = set(before) - set(list_classifier(old))
    assert {"base.blocks.0.1.running_mean", "top.top2_norm.running_var", "top.top1.weight"} < frozen
    for name, tensor in once.state_dict().items():
        if name in frozen:
            assert torch.equal(tensor, before[name]), name
    start = grow(build().train()).state_dict()
    changed = {name for name, tensor in once.state_dict().items() if not torch.equal(tensor, start[name])}
    parameters = {name for name, p in once.named_parameters() if p.requires_grad}
    assert parameters <= changed
    assert not {name for name in parameters if name.startswith(("base.", "top.top"))}
    # Once more: the first heads are old now, and their weights to the outputs belong to the classifier.
    middle = {name: tensor.clone() for name, tensor in once.state_dict().items()}
    twice = grow(once, layer="top1")
    train(twice)
    for name, tensor in middle.items():
        is_classifier = name.startswith("top.classifiers.") or name.endswith("classify.weight")
        assert torch.equal(twice.state_dict()[name], tensor) != is_classifier, name


def test_what_is_grown_twice_is_saved_and_loaded(tmp_path):
    network = grow(grow(build()), layer="top1", norm="layer").eval()
    network.save(tmp_path / "model.safetensors", {})
    loaded = load_student(tmp_path / "model.safetensors")
    images, _ = draw_batch()
    assert torch.equal(loaded(images), network(images))
    assert loaded.config == network.config


def test_convolutions_need_a_map():
    network = grow(build(), convolutions=[3], norm="layer").eval()
    images, _ = draw_batch()
    assert network(images).shape == (8, 7)
    layers = network.augmentations[0].heads[0].hidden
    assert layers[1].weight.shape == (3, 6, 3, 3)
    assert layers[5].in_features == 3 * 4 * 4
    with pytest.raises(ConfigError, match=r"convolutions=\[3\] need a map.*layer=top1"):
        grow(build(), convolutions=[3], layer="top1")


@pytest.mark.parametrize("options", [{}, {"convolutions": [3]}, {"layer": "top1"}])
def test_the_cost_is_that_of_the_heads(options):
    old, network = build(), grow(build(), **options)
    added = sum(count_head(head) for head in network.augmentations[0].heads)
    assert count_multiply_adds(network) - count_multiply_adds(old) == added
    by_layer = count_by_layer(network)
    assert sum(layer.multiply_adds for layer in by_layer) == count_multiply_adds(network)
    assert sum(layer.parameters for layer in by_layer) == count_parameters(network)["total"]


def test_the_papers_heads_cost_what_the_paper_says():
    """1.52 B multiply-adds; 6 heads: x1.026, 13 heads: x1.053; which fits 9,216 features, a 3x3x1024 grid, and not 1,024."""
    base = NetworkConfig(
        base=InceptionV2Config(),
        top=TopConfig(kind="fc_fc", top1=4096, top2=4096),
        pace=PaceConfig(kind="none"),
        image_size=224,
        verticals={"all": 17_000},
    )
    plain = count_multiply_adds(build_without_weights(base))
    for num_heads, factor in ((6, 1.026), (13, 1.053)):
        sizes = [17_000 // num_heads + (n < 17_000 % num_heads) for n in range(num_heads)]
        heads = {str(n): HeadConfig(num_classes=size, hidden=(512, 512)) for n, size in enumerate(sizes)}
        grown = base.model_copy(update={"augmentations": (HeadsConfig(heads=heads),)})
        added = count_multiply_adds(build_without_weights(grown)) - plain
        assert added == num_heads * (9216 * 512 + 512 * 512) + 17_000 * 512
        assert 1 + added / 1.52e9 == pytest.approx(factor, abs=0.005)


def test_heads_are_evaluated_where_their_group_is_likely():
    network = grow(build())
    for step in range(200):
        network.train()(*draw_batch(step))  # moves the mean outputs of the heads
    network.eval()
    images, _ = draw_batch()
    always = ConditionalHeads(network, 1e-9)
    with torch.inference_mode():
        torch.testing.assert_close(always(images), network(images))
        assert (always.mean_heads(), always.count_saved(), always.num_heads) == (3, 0, 3)
        middle = ConditionalHeads(network, 0.5)
        got_BC, mean_BC = middle(images), ConditionalHeads(network, 1.0)(images)
    added = sum(count_head(head) for head in network.augmentations[0].heads)
    assert 0 < middle.mean_heads() < 3
    assert 0 < middle.count_saved() < added
    for group in range(3):
        of_group = group == GROUP_C
        likely_B = mean_BC[:, of_group].sigmoid().amax(1) >= 0.5
        torch.testing.assert_close(got_BC[likely_B][:, of_group], network(images)[likely_B][:, of_group])
        torch.testing.assert_close(got_BC[~likely_B][:, of_group], mean_BC[~likely_B][:, of_group])
    with pytest.raises(ConfigError, match="no auxiliary heads"):
        ConditionalHeads(build(), 0.5)


def test_capacity_is_shared_out_with_the_same_mean():
    assert choose_widths((512, 256), "equal", [10, 30], [1, 1]) == [(512, 256)] * 2
    assert choose_widths((512, 256), "classes", [10, 30], [1, 1]) == [(256, 128), (768, 384)]
    assert choose_widths((512,), "samples", [10, 30], [700, 100]) == [(896,), (128,)]
    assert choose_widths((16,), "samples", [10, 30], [1000, 0]) == [(32,), (8,)]
