"""What every base network is: a module with `num_features`, `mean` and `std`, and a config with the same three options."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import pydantic
import torch
from torch import Tensor, nn

from concentration.errors import DataError
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

    def starting_from(self, checkpoint: str) -> Self:
        """The same network with other weights to start from."""
        return self.model_copy(update={"checkpoint": checkpoint})

    def without_taps(self) -> Self:
        """The same network as it is served."""
        return self


class Tap(NamedTuple):
    """A map (B, channels, size, size) inside a base network that an auxiliary classifier looks at while it trains.

    loss_weight: of the auxiliary classifier's loss, beside the network's own.
    dropout: of the auxiliary classifier.
    """

    channels: int
    size: int
    loss_weight: float
    dropout: float


class BaseNetwork(nn.Module):
    """The interface: maps normalised float images (B, 3, H, W) to features (B, num_features).

    `feature_map` is channels, height and width where the features are a map that was flattened; None where no place is left.

    The caller normalises, with the `mean` and `std` found here: a config may leave them to the network.
    """

    num_features: int
    feature_map: tuple[int, int, int] | None = None
    mean: PerChannel
    std: PerChannel
    taps: tuple[Tap, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_with_taps(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The features, and the map of each of `taps`."""
        return self(images), ()


def normalise_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) float32 images, uint8 or float in [0, 1], less their mean (3, 1, 1), over their deviation (3, 1, 1).

    Raises:
        DataError: they are of another type; a wider integer would be taken for a fraction.
    """
    if images.dtype == torch.uint8:
        # Loaders give images whose channels lie innermost; a base network chooses for itself.
        images = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
    elif not images.is_floating_point():
        raise DataError(f"images are {images.dtype}, expected torch.uint8, or floats in [0, 1]")
    return (images - mean) / std
