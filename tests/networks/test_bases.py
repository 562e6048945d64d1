"""Base networks: sizes and parameter counts against TF-slim's and torchvision's, and what is refused."""

import math
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d

from concentration.errors import ConfigError
from concentration.networks.bases import (
    BaseConfig,
    InceptionV2Config,
    SmallBaseConfig,
    TimmConfig,
    build_base,
)
from concentration.networks.bases.inception_v2 import MIXED, Mixed
from concentration.schema import Config, parse_config

CONF = Path(__file__).parents[2] / "conf" / "base"

# The shapes that TF-slim's own test expects of a 224-pixel image: tensorflow/models research/slim/nets/inception_v2_test.py.
SLIM_SHAPES = {
    "conv1a": (64, 112, 112),
    "pool2a": (64, 56, 56),
    "conv2b": (64, 56, 56),
    "conv2c": (192, 56, 56),
    "pool3a": (192, 28, 28),
    "mixed3b": (256, 28, 28),
    "mixed3c": (320, 28, 28),
    "mixed4a": (576, 14, 14),
    "mixed4b": (576, 14, 14),
    "mixed4c": (576, 14, 14),
    "mixed4d": (576, 14, 14),
    "mixed4e": (576, 14, 14),
    "mixed5a": (1024, 7, 7),
    "mixed5b": (1024, 7, 7),
    "mixed5c": (1024, 7, 7),
}


class Verb(Config):
    """Stands for a verb's config, in which a base is one component."""

    base: BaseConfig


@pytest.fixture(autouse=True)
def _one_thread_a_seed_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def draw_images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size)


def sum_weights(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, kind))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SmallBaseConfig(), 32),
        (SmallBaseConfig(channels=(4, 6), norm="group"), 20),
        (SmallBaseConfig(channels=(5,), norm="none"), 10),
        (InceptionV2Config(end_point="mixed3b"), 64),
        (InceptionV2Config(), 100),
        (TimmConfig(name="test_resnet"), 64),
        (TimmConfig(name="test_vit"), 64),
    ],
)
def test_every_base_gives_as_many_features_as_it_says_and_trains_all_parameters(config: Any, size: int) -> None:
    base = build_base(config, size)
    features_BD = base(draw_images(2, size))
    assert features_BD.shape == (2, base.num_features)
    features_BD.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in base.parameters())
    assert base.training
    assert len(base.mean) == len(base.std) == 3


@pytest.mark.parametrize(
    "config", [SmallBaseConfig(), InceptionV2Config(end_point="mixed4a"), TimmConfig(name="test_vit")]
)
def test_in_evaluation_features_of_an_image_do_not_depend_on_its_batch(config: Any) -> None:
    base = build_base(config, 64).eval()
    images = draw_images(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(base(images)[1:2], base(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SmallBaseConfig(), InceptionV2Config(end_point="mixed3c")])
def test_he_initialisation_keeps_the_features_of_a_new_base_in_scale(config: Any) -> None:
    features_BD = build_base(config, 64)(draw_images(8, 64))
    assert 0.1 < features_BD.square().mean().sqrt() < 10
    assert (features_BD > 0).any(dim=0).float().mean() > 0.9  # hardly a dead feature


def test_small_base_is_its_formula() -> None:
    base = build_base(SmallBaseConfig(channels=(8, 16), norm="none"), 16)
    images = draw_images(2, 16)
    first, second = (module for module in base.modules() if isinstance(module, nn.Conv2d))
    maps = F.max_pool2d(F.conv2d(images, first.weight, first.bias, padding=1).clamp(min=0), 2)
    maps = F.max_pool2d(F.conv2d(maps, second.weight, second.bias, padding=1).clamp(min=0), 2)
    torch.testing.assert_close(base(images), maps.reshape(2, 16 * 4 * 4))


def test_small_base_has_512_features_for_drawings_of_32_pixels() -> None:
    assert build_base(SmallBaseConfig(), 32).num_features == 512


def test_small_base_without_batch_statistics_is_the_same_however_a_batch_is_split() -> None:
    base = build_base(SmallBaseConfig(norm="group"), 32)
    images = draw_images(4, 32)
    torch.testing.assert_close(base(images), torch.cat([base(images[:1]), base(images[1:])]))


def test_small_base_refuses_a_size_that_it_cannot_halve() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size=30 does not fit .* multiple of 8"):
        build_base(SmallBaseConfig(), 30)


def test_inception_v2_has_as_many_parameters_as_tf_slim_says() -> None:
    base = build_base(InceptionV2Config(), 224)
    num_convolution = sum_weights(base, nn.Conv2d)
    num_normalised = sum_weights(base, nn.BatchNorm2d)
    assert num_convolution == 10_143_384  # 10.1M, more than the paper's totals leave for its base (docs/costs.md)
    # inception_v2_test.py of TF-slim expects 10,173,112 model variables: the convolutions, the bias of the first one, and an
    # offset, a mean and a variance for each normalised channel. Ours has a scale beside them.
    assert num_convolution + 64 + 3 * num_normalised == 10_173_112
    assert sum(parameter.numel() for parameter in base.parameters()) == num_convolution + 64 + 2 * num_normalised


def test_inception_v2_has_the_shapes_of_tf_slim_at_every_end_point() -> None:
    base = build_base(InceptionV2Config(), 224).eval()
    shapes, maps = {}, draw_images(1, 224)
    with torch.no_grad():
        for name, layer in base.layers.named_children():
            maps = layer(maps)
            shapes[name] = tuple(maps.shape[1:])
    assert shapes == SLIM_SHAPES


@pytest.mark.parametrize("end_point", [name for name in SLIM_SHAPES if name.startswith("mixed")])
def test_inception_v2_features_are_the_channels_of_its_end_point(end_point: Any) -> None:
    with torch.device("meta"):
        base = build_base(InceptionV2Config(end_point=end_point), 224)
        features_BD = base(torch.empty(2, 3, 224, 224))
    expected = 9216 if end_point == "mixed5c" else SLIM_SHAPES[end_point][0]
    assert base.num_features == features_BD.shape[1] == expected
    assert [name for name, _ in base.layers.named_children()][-1] == end_point


def test_inception_v2_pools_mixed5c_as_the_paper_does() -> None:
    base = build_base(InceptionV2Config(), 224).eval()
    maps = torch.randn(2, 1024, 7, 7)
    cells = [maps[:, :, row : row + 3, column : column + 3].mean((2, 3)) for row in (0, 2, 4) for column in (0, 2, 4)]
    torch.testing.assert_close(base.pool(maps).flatten(1), torch.stack(cells, dim=2).reshape(2, 9216))


@pytest.mark.parametrize("size", [65, 96, 97, 160, 299])
def test_inception_v2_num_features_follows_the_image_size(size: int) -> None:
    with torch.device("meta"):
        base = build_base(InceptionV2Config(), size)
        assert base(torch.empty(1, 3, size, size)).shape == (1, base.num_features)


def test_inception_v2_refuses_images_whose_last_map_is_smaller_than_the_kernel() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size=64 is too small"):
        build_base(InceptionV2Config(), 64)


def test_inception_v2_convolutions_are_torchvisions() -> None:
    base = build_base(InceptionV2Config(end_point="mixed3b", batch_norm_momentum=0.1), 64)
    ours = base.layers.conv2c
    theirs = BasicConv2d(64, 192, kernel_size=3, padding=1)
    theirs.load_state_dict(
        {f"{('conv', 'bn')[int(key[0])]}{key[1:]}": value.clone() for key, value in ours.state_dict().items()}
    )
    maps = torch.randn(2, 64, 8, 8) * 1e-2  # so small that the epsilon of the norm, 1e-3, is seen
    torch.testing.assert_close(ours(maps), theirs(maps))
    torch.testing.assert_close(ours[1].running_var, theirs.bn.running_var)


def test_inception_v2_pools_by_maximum_where_it_halves_and_in_its_last_module_only() -> None:
    assert [name for name, row in MIXED.items() if row.pool == "maximum"] == ["mixed4a", "mixed5a", "mixed5c"]
    assert [name for name, row in MIXED.items() if row.stride == 2] == ["mixed4a", "mixed5a"]


@pytest.mark.parametrize("name", ["mixed3b", "mixed4a", "mixed5c"])
def test_an_inception_module_is_its_branches_side_by_side(name: str) -> None:
    row, in_channels = MIXED[name], 40
    module = Mixed(in_channels, row, momentum=0.1).eval()
    maps = torch.randn(1, in_channels, 7, 7)
    convolutions = iter([layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)])

    def convolve(inputs: Tensor, stride: int = 1) -> Tensor:
        weight = next(convolutions)
        outputs = F.conv2d(inputs, weight, stride=stride, padding=weight.shape[-1] // 2)
        return (outputs / math.sqrt(1 + 1e-3)).clamp(min=0)  # a new batch norm only divides, in evaluation

    expected = [convolve(maps)] if row.single else []
    expected.append(convolve(convolve(maps), row.stride))
    expected.append(convolve(convolve(convolve(maps)), row.stride))
    if row.pool == "average":
        weights = F.conv2d(torch.ones(1, 1, 7, 7), torch.ones(1, 1, 3, 3), padding=1)  # 9 inside, 6 and 4 at the border
        pooled = F.conv2d(maps, torch.ones(in_channels, 1, 3, 3), padding=1, groups=in_channels) / weights
    else:
        pooled = F.max_pool2d(F.pad(maps, (1, 1, 1, 1), value=-math.inf), 3, row.stride)
    expected.append(convolve(pooled) if row.projection else pooled)
    with torch.no_grad():
        outputs = module(maps)
    torch.testing.assert_close(outputs, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert outputs.shape[1] == row.num_outputs(in_channels)
    assert next(convolutions, None) is None


def test_timm_base_is_the_timm_network_without_its_classifier() -> None:
    import timm

    base = build_base(TimmConfig(name="test_resnet"), 64).eval()
    reference = timm.create_model("test_resnet").eval()
    reference.load_state_dict(base.network.state_dict(), strict=False)
    images = draw_images(2, 64)
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)
        torch.testing.assert_close(base(images), expected)


def test_timm_num_features_is_what_comes_out_even_where_timm_says_otherwise() -> None:
    base = build_base(TimmConfig(name="mobilenetv3_small_050"), 32).eval()
    assert base.network.num_features == 288
    assert base.num_features == base(draw_images(1, 32)).shape[1] == 1024


def test_a_vision_transformer_is_built_for_the_image_size() -> None:
    assert build_base(TimmConfig(name="test_vit"), 96).network.patch_embed.img_size == (96, 96)


def test_timm_normalisation_is_that_of_the_pretrained_network_unless_given() -> None:
    base = build_base(TimmConfig(name="resnet18", std=(1, 1, 1)), 32)
    assert base.mean == (0.485, 0.456, 0.406)
    assert base.std == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"name": "resnet5O"}, 32, "base.name=resnet5O: timm has no such network; did you mean 'resnet50'?"),
        ({"name": "resnet18.a1_in2k"}, 32, "timm has no such weights; did you mean 'resnet18.a1_in1k'?"),
        ({"name": "botnet50ts_256", "pretrained": True}, 32, "give base.pretrained=false"),
        ({"name": "test_vit"}, 33, "base.name=test_vit does not take data.image_size=33"),
        ({"name": "inception_v3"}, 32, "base.name=inception_v3 does not take data.image_size=32"),
    ],
)
def test_timm_says_what_is_wrong_and_what_would_be_valid(options: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_base(TimmConfig(**options), size)
    assert message in str(caught.value)


def test_a_failed_download_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"weights could not be loaded .* base\.checkpoint=FILE"):
        build_base(TimmConfig(name="test_resnet", pretrained=True), 64)


def test_two_sources_of_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="two sources of weights"):
        parse_config(Verb, {"base": {"kind": "timm", "name": "x", "pretrained": True, "checkpoint": "runs/x"}})


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_the_group_names_all_options_with_their_defaults(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    if values["kind"] == "timm":
        assert values.pop("name") == "???"  # Hydra's "must be given"
        values["name"] = "resnet18"
    config = parse_config(Verb, {"base": values}).base
    assert set(values) == set(type(config).model_fields)
    chosen = {"kind": config.kind, "name": values.get("name"), "end_point": values.get("end_point")}
    defaults = type(config)(**{key: value for key, value in chosen.items() if value is not None})
    assert config == defaults


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"kind": "small", "chanels": [8]}, "unknown key 'base.chanels'; did you mean 'base.channels'?"),
        (
            {"kind": "smal"},
            "base.kind=smal: expected 'small', 'inception_v2', 'googlenet', 'timm'; did you mean 'small'?",
        ),
        ({"kind": "small", "std": [1, 1, 0]}, "base.std.2=0: Input should be greater than 0"),
        ({"kind": "small", "channels": []}, "base.channels=[]"),
    ],
)
def test_a_wrong_option_is_named_as_a_user_writes_it(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Verb, {"base": base})
    assert message in str(caught.value)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_small_base_pools_what_a_relu_before_the_pooling_would_have_given(norm):
    base = build_base(SmallBaseConfig(norm=norm), image_size=32)
    images = torch.randn(6, 3, 32, 32)
    images[1] = 0.0  # without a norm all its numbers tie at 0
    expected = images.contiguous(memory_format=torch.channels_last)
    for convolution, normalise, *_ in base.blocks:
        expected = F.max_pool2d(F.relu(normalise(convolution(expected))), 2)
    weight_BD = torch.randn(6, base.num_features)
    found = base(images)
    # Both forwards update the batch norms' averages, which training does not use.
    gradients = [torch.autograd.grad((y.flatten(1) * weight_BD).sum(), base.parameters()) for y in (expected, found)]
    assert torch.equal(found, expected.flatten(1))
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
