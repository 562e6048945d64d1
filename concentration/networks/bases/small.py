"""A few convolutions, for drawings of 32 x 32 pixels on a CPU: the base network of the demo.

Letters in shapes: B batch, H height, W width, D features.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig

Norm = Literal["batch", "group", "none"]


class SmallBaseConfig(BaseNetworkConfig):
    """Options of `SmallBase`."""

    kind: Literal["small"] = "small"

    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16, 32)
    """Output channels of each block; each block halves the height and the width."""

    norm: Norm = "batch"
    """`group` does not depend on how a batch is split over processes; `batch` does."""


class SmallBase(BaseNetwork):
    """Blocks of 3x3 convolution, norm, 2x2 max-pooling and ReLU, then flattened.

    Images (B, 3, H, W) become features (B, D) with D = channels[-1] * (H / 2^blocks) * (W / 2^blocks): 512 by default
    at 32 pixels.

    Raises:
        ConfigError: `image_size` cannot be halved once per block.
    """

    def __init__(self, config: SmallBaseConfig, image_size: int) -> None:
        super().__init__()
        shrinkage = 2 ** len(config.channels)
        if image_size % shrinkage:
            raise ConfigError(
                f"data.image_size={image_size} does not fit base.channels={list(config.channels)}: {len(config.channels)} "
                f"blocks halve it {len(config.channels)} times, so it must be a multiple of {shrinkage}"
            )
        inputs = (3, *config.channels[:-1])
        self.blocks = nn.Sequential(
            *(_build_block(i, o, config.norm) for i, o in zip(inputs, config.channels, strict=True))
        )
        side = image_size // shrinkage
        self.feature_map = (config.channels[-1], side, side)
        self.num_features = config.channels[-1] * side**2
        self.mean, self.std = config.mean, config.std

    def forward(self, images: Tensor) -> Tensor:
        # NOTE: channels_last activations nearly halve the time of a step on one CPU thread (17 to 9 ms at batch 64). The
        # parameters gain nothing from it, and stay contiguous for DDP's buckets and for checkpoints.
        return self.blocks(images.contiguous(memory_format=torch.channels_last)).flatten(1)


def _build_block(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    # ReLU after the pooling, of a quarter of the numbers, has the same outputs and gradients as before it.
    return nn.Sequential(convolution, _build_norm(norm, out_channels), nn.MaxPool2d(2), nn.ReLU(inplace=True))


def _build_norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(4, channels), channels)  # four groups wherever they divide the channels
    return nn.Identity()
