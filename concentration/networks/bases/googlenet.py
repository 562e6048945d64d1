"""GoogLeNet: 22 layers of Inception modules, with auxiliary classifiers on two inner maps while it trains.

A 224-pixel image shrinks to 28x28 in the stem, then by pooling to 14x14 and 7x7, while its channels grow from 3 to 1024.

Source: Szegedy et al., "Going deeper with convolutions", arXiv 1409.4842: Table 1 (the sizes), Figures 2 (b) and 3 (the
modules, and where the response is normalised), section 5 (dropout, auxiliary classifiers).

Letters in shapes: B batch, H height, W width, D features.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig, Tap

Dropout = Annotated[float, Field(ge=0, lt=1)]


class InceptionRow(NamedTuple):
    """Output channels of one Inception module, in the order of Table 1; those of its four branches are concatenated."""

    single: int
    """A 1x1 convolution."""
    triple: tuple[int, int]
    """A 1x1 that reduces, then a 3x3."""
    quintuple: tuple[int, int]
    """A 1x1 that reduces, then a 5x5."""
    projection: int
    """A 3x3 maximum pooling of stride 1, then a 1x1."""

    @property
    def num_outputs(self) -> int:
        return self.single + self.triple[1] + self.quintuple[1] + self.projection

    def widened(self, widen: Callable[[int], int]) -> "InceptionRow":
        triple, quintuple = (tuple(map(widen, branch)) for branch in (self.triple, self.quintuple))
        return InceptionRow(widen(self.single), triple, quintuple, widen(self.projection))


# fmt: off
INCEPTION = {  #            1x1  1x1, 3x3    1x1, 5x5   1x1 after pooling
    "inception3a": InceptionRow( 64, ( 96, 128), (16,  32),  32),  # 28x28x256
    "inception3b": InceptionRow(128, (128, 192), (32,  96),  64),  # 28x28x480
    "inception4a": InceptionRow(192, ( 96, 208), (16,  48),  64),  # 14x14x512
    "inception4b": InceptionRow(160, (112, 224), (24,  64),  64),  # 14x14x512
    "inception4c": InceptionRow(128, (128, 256), (24,  64),  64),  # 14x14x512
    "inception4d": InceptionRow(112, (144, 288), (32,  64),  64),  # 14x14x528
    "inception4e": InceptionRow(256, (160, 320), (32, 128), 128),  # 14x14x832
    "inception5a": InceptionRow(256, (160, 320), (32, 128), 128),  # 7x7x832
    "inception5b": InceptionRow(384, (192, 384), (48, 128), 128),  # 7x7x1024
}
# fmt: on

#: The modules before which the map is halved.
_POOLED = {"inception4a": "pool3", "inception5a": "pool4"}
TAPPED = ("inception4a", "inception4d")
#: Of the pooling of an auxiliary classifier (`auxiliary_classifier`), which a tapped map must hold once.
_TAP_KERNEL = 5

# Krizhevsky et al. 2012 (the paper's [9]), section 3.3: x / (2 + 1e-4 * the sum of the squares of 5 channels)^0.75.
_NEIGHBOURS, _SHARE, _POWER, _CONSTANT = 5, 1e-4, 0.75, 2.0
# NOTE: that is for pixels of 0 to 255. Ours come as (pixel/255 - mean) / std, 255 * std times smaller, and on inputs that small
# the sum would vanish beside the constant. Multiplied by (255 * std)^2, the network is the same function but for a scale.

Norm = Literal["response", "batch"]


class GoogLeNetConfig(BaseNetworkConfig):
    """Options of `GoogLeNet`."""

    kind: Literal["googlenet"] = "googlenet"

    width: pydantic.PositiveFloat = 1.0
    """Multiplies the channels of every convolution: parameters and multiply-adds grow by about its square."""

    stem: Literal["full", "separable"] = "full"
    """The first layer: 7x7 over all colours (9.4K parameters, 118M multiply-adds), or 7x7 over each colour apart and a 1x1
    over the 24 results, which are the 2.7K and 34M that Table 1 prints."""

    norm: Norm = "response"
    """`response` is the paper's, after the first and the third convolution; `batch` normalises after every convolution in its
    place, as the authors did a year later: without, a new network needs thousands of steps before it learns anything."""

    dropout: Dropout = 0.4
    """Of the features, in training."""

    auxiliary_weight: pydantic.NonNegativeFloat = 0.3
    """Of the losses of the auxiliary classifiers, which need images of 79 pixels; 0: there are none."""

    auxiliary_dropout: Dropout = 0.7
    """Before the last layer of an auxiliary classifier, in training."""

    def without_taps(self) -> Self:
        return self.model_copy(update={"auxiliary_weight": 0.0})


class GoogLeNet(BaseNetwork):
    """Table 1 down to its dropout: images (B, 3, H, W) become features (B, D), D = 1024 at width 1.

    The last map, 7x7 at 224 pixels, is averaged whole, whatever its size. The linear layer and the softmax are the head's.

    Weights start as He et al. 2015 start them, biases at 0: the paper does not say how it did. A layer of stride 2 pads all
    sides alike, where the paper's software pads right and below.

    Raises:
        ConfigError: the image is too small for the network, or for its auxiliary classifiers.
    """

    def __init__(self, config: GoogLeNetConfig, image_size: int) -> None:
        super().__init__()

        def widen(channels: int) -> int:
            return max(1, round(channels * config.width))

        self.layers, self.num_features = _build_layers(config, widen)
        self.dropout = nn.Dropout(config.dropout)
        self.taps = _list_taps(config, image_size, widen)
        self.mean, self.std = config.mean, config.std
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self._pool(self.layers(images))

    def forward_with_taps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and the maps of 4a and 4d where there are auxiliary classifiers."""
        maps, tapped = images, []
        for name, layer in self.layers.named_children():
            maps = layer(maps)
            if self.taps and name in TAPPED:
                tapped.append(maps)
        return self._pool(maps), tapped

    def _pool(self, maps: Tensor) -> Tensor:
        return self.dropout(maps.mean((2, 3)))


class Inception(nn.Module):
    """Figure 2 (b): four branches over the same map (B, C, H, W), concatenated along the channels."""

    def __init__(self, in_channels: int, row: InceptionRow, norm: Norm) -> None:
        super().__init__()
        self.single = _build_convolution(in_channels, row.single, 1, norm)
        self.triple = _build_reduced(in_channels, row.triple, 3, norm)
        self.quintuple = _build_reduced(in_channels, row.quintuple, 5, norm)
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *_build_convolution(in_channels, row.projection, 1, norm)
        )

    def forward(self, maps: Tensor) -> Tensor:
        branches = (self.single, self.triple, self.quintuple, self.pooled)
        return torch.cat([branch(maps) for branch in branches], dim=1)


def _build_layers(config: GoogLeNetConfig, widen: Callable[[int], int]) -> tuple[nn.Sequential, int]:
    """All layers that are convolved or pooled, and how many channels come out of them."""
    first, second, norm = widen(64), widen(192), config.norm
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_build_first(config.stem, first, norm),
        pool1=_build_halving(),
        norm1=_build_response_norm(config),
        conv2=_build_reduced(first, (widen(64), second), 3, norm),
        norm2=_build_response_norm(config),
        pool2=_build_halving(),
    )
    channels = second
    for name, row in INCEPTION.items():
        if name in _POOLED:
            layers[_POOLED[name]] = _build_halving()
        widened = row.widened(widen)
        layers[name] = Inception(channels, widened, norm)
        channels = widened.num_outputs
    return nn.Sequential(layers), channels


def _list_taps(config: GoogLeNetConfig, image_size: int, widen: Callable[[int], int]) -> tuple[Tap, ...]:
    map_size = (image_size + 1) // 2 // 8  # of all modules 4a to 4e; `_build_halving` rounds down, the first layer up
    if map_size < 2:
        raise ConfigError(
            f"data.image_size={image_size} is too small for base=googlenet, which halves it five times: use at least 31 pixels "
            "(the paper: 224)"
        )
    if not config.auxiliary_weight:
        return ()
    if map_size < _TAP_KERNEL:
        raise ConfigError(
            f"data.image_size={image_size} is too small for the auxiliary classifiers of base=googlenet, which pool a "
            f"{map_size}x{map_size} map by a 5x5 kernel: use at least 79 pixels (the paper: 224), or base.auxiliary_weight=0"
        )
    channels = [INCEPTION[name].widened(widen).num_outputs for name in TAPPED]
    return tuple(Tap(c, map_size, config.auxiliary_weight, config.auxiliary_dropout) for c in channels)


def _build_convolution(in_channels: int, out_channels: int, kernel: int, norm: Norm, stride: int = 1) -> nn.Sequential:
    has_bias = norm == "response"
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=has_bias)
    if has_bias:
        return nn.Sequential(convolution, nn.ReLU(inplace=True))
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, eps=1e-3), nn.ReLU(inplace=True))


def _build_reduced(in_channels: int, channels: tuple[int, int], kernel: int, norm: Norm) -> nn.Sequential:
    """A 1x1 convolution that reduces, then one over a neighbourhood."""
    reduced, outputs = channels
    reduce, convolve = (
        _build_convolution(in_channels, reduced, 1, norm),
        _build_convolution(reduced, outputs, kernel, norm),
    )
    return nn.Sequential(*reduce, *convolve)


def _build_first(stem: Literal["full", "separable"], channels: int, norm: Norm) -> nn.Sequential:
    if stem == "full":
        return _build_convolution(3, channels, 7, norm, stride=2)
    # 8 filters for each colour, as in the first layer of TF-slim's Inception-V2, and no ReLU between: one layer of depth.
    apart = nn.Conv2d(3, 24, kernel_size=7, stride=2, padding=3, groups=3, bias=False)
    return nn.Sequential(apart, *_build_convolution(24, channels, 1, norm))


def _build_halving() -> nn.MaxPool2d:
    """3x3 of stride 2. Its last window may reach beyond the map, so that 112 becomes 56."""
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _build_response_norm(config: GoogLeNetConfig) -> nn.Module:
    if config.norm == "batch":
        return nn.Identity()
    pixels = 255 * sum(config.std) / len(config.std)
    # torch takes the mean of the squares, Krizhevsky their sum.
    return nn.LocalResponseNorm(_NEIGHBOURS, alpha=_NEIGHBOURS * _SHARE * pixels**2, beta=_POWER, k=_CONSTANT)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
