"""The base network of a mixture with one shared decoder: a gater, and experts whose features have one form.

Shapes: B batch, D features of an expert.
"""

from typing import Annotated, Literal, Self

import pydantic
from torch import Tensor, nn

from concentration.networks.bases import BaseConfig, build_base
from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig, PerChannel, PerChannelPositive
from concentration.networks.gater import Gater, GaterConfig, Trunk, TrunkConfig, run_chosen


class RoutedConfig(BaseNetworkConfig):
    """A gater and as many experts as it chooses from, all of one architecture. The verb `mixture` alone makes it."""

    kind: Literal["routed"] = "routed"
    gater: GaterConfig
    expert: TrunkConfig
    #: Images come in [0, 1]: gater and experts each normalise them as they were trained.
    mean: PerChannel = (0.0, 0.0, 0.0)
    std: PerChannelPositive = (1.0, 1.0, 1.0)


#: Of a network file: what a user may choose, and what is made from it.
ServedBaseConfig = Annotated[BaseConfig | RoutedConfig, pydantic.Field(discriminator="kind")]


class RoutedBase(BaseNetwork):
    """The chosen experts' features, (B, D): what a shared decoder decodes, so that they lie in one space.

    Gater and experts are trained before and stay as they are, bit by bit: nothing of them takes a gradient, and their batch
    statistics do not move.

    Source: Gross, Ranzato and Szlam 2017 (the abstract): "a single decoding layer for all the experts, allowing a unified
        feature embedding space".
    """

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.gater = Gater(config.gater)
        self.experts = nn.ModuleList(Trunk(config.expert) for _ in range(config.gater.num_experts))
        self.num_features = self.experts[0].num_features
        self.mean, self.std = config.mean, config.std
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return run_chosen(self.gater(images), list(self.experts), images)

    def train(self, mode: bool = True) -> Self:
        """Always as in evaluation, whatever `mode`."""
        return super().train(False)


def build_served_base(config: BaseNetworkConfig, image_size: int) -> BaseNetwork:
    """The base network of any network file. Raises: as `build_base`."""
    return RoutedBase(config) if isinstance(config, RoutedConfig) else build_base(config, image_size)
