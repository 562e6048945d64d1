"""What every base network is: a module with `num_features`, `mean` and `std`, and a config with the same three options."""

import pydantic
from torch import Tensor, nn

from concentration.schema import Config

PerChannel = tuple[float, float, float]
PerChannelPositive = tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat]


class BaseNetworkConfig(Config):
    """What all base networks can be told; each adds `kind` and its own options."""

    checkpoint: str | None = None
    """A run directory or a file whose base weights to start from, instead of random ones."""

    mean: PerChannel = (0.5, 0.5, 0.5)
    """Subtracted from images in [0, 1], per channel (red, green, blue)."""

    std: PerChannelPositive = (0.5, 0.5, 0.5)
    """What the difference is then divided by."""


class BaseNetwork(nn.Module):
    """The interface: maps normalised float images (B, 3, H, W) to features (B, num_features).

    The caller normalises, with the `mean` and `std` found here: a config may leave them to the network.
    """

    num_features: int
    mean: PerChannel
    std: PerChannel

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError
