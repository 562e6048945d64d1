"""Auxiliary heads: hidden layers beside a network's own, one stack for each group of classes, connected to its outputs alone.

    logits of group g  =  W_g h + U_g a_g + b_g        h: the network's last hidden layer, a_g: the head's

Shapes: B batch, D features, C all classes, G classes of one group, S the last hidden layer of a head.

Source: Warde-Farley, Rabinovich and Anguelov 2014, section 2 and Figure 1.
"""

from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.top_layers import Layer
from concentration.schema import Config

#: Weight of the newest batch in a head's mean output.
_MEAN_MOMENTUM = 0.01


class HeadConfig(Config):
    """One head: the classes of its group, and the sizes of its hidden ReLU layers."""

    num_classes: pydantic.PositiveInt
    hidden: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]


class HeadsConfig(Config):
    """The heads of one augmentation.

    layer: where they begin: at the base network's features (the paper), or at the top-1 outputs.
    heads: the head of each group; every class is in one group.
    convolutions: channels of the 3x3 convolutions, on the base network's last map, that each head has before its hidden layers.
    norm: the normalisation before each ReLU.
    """

    layer: Layer = "base"
    heads: dict[str, HeadConfig]
    convolutions: tuple[pydantic.PositiveInt, ...] = ()
    norm: Literal["none", "layer"] = "none"


class AuxiliaryHeads(nn.Module):
    """All heads of one augmentation: from features (B, D) to what they add to the logits, (B, C).

    Args:
        num_features: D.
        feature_map: channels, height and width, where the features are a flattened map.

    Raises:
        ConfigError: convolutions are asked for, but the features are no map.
    """

    def __init__(self, num_features: int, feature_map: tuple[int, int, int] | None, config: HeadsConfig):
        super().__init__()
        self.config = config
        if config.convolutions and (config.layer != "base" or feature_map is None):
            raise ConfigError(
                f"convolutions={list(config.convolutions)} need a map of more than one place, and there is none at "
                f"layer={config.layer} of this network; remove them, or use another base network"
            )
        self.heads = nn.ModuleList(
            AuxiliaryHead(num_features, feature_map, head, config) for head in config.heads.values()
        )
        #: (C,) for each output, its place among the concatenated outputs of the heads.
        self.register_buffer("place_C", torch.arange(sum(head.num_classes for head in config.heads.values())))

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.sort([head(features_BD) for head in self.heads])

    def sort(self, added: list[Tensor]) -> Tensor:
        """(B, C) in the order of the outputs, from (B, G) of each head."""
        return torch.cat(added, dim=1).index_select(1, self.place_C)

    def set_groups(self, group_C: Tensor) -> None:
        """Assigns outputs to heads: `group_C` has the number of each output's head."""
        order_C = torch.sort(group_C, stable=True).indices
        self.place_C.copy_(torch.empty_like(order_C).scatter_(0, order_C, torch.arange(len(order_C))))

    def classifier_names(self) -> list[str]:
        """The names of those parameters that belong to the network's classifier."""
        return [f"heads.{number}.classify.weight" for number in range(len(self.heads))]


class AuxiliaryHead(nn.Module):
    """Convolutions, hidden layers, and the weights U to the outputs of one group; their bias is the network's own."""

    def __init__(
        self, num_features: int, feature_map: tuple[int, int, int] | None, head: HeadConfig, config: HeadsConfig
    ):
        super().__init__()
        layers: list[nn.Module] = []
        if config.convolutions:
            channels, height, width = feature_map
            layers.append(nn.Unflatten(1, feature_map))
            for size in config.convolutions:
                layers += [nn.Conv2d(channels, size, 3, padding=1), *_activate(config.norm, size, is_map=True)]
                channels = size
            layers.append(nn.Flatten())
            num_features = channels * height * width
        for size in head.hidden:
            layers += [nn.Linear(num_features, size), *_activate(config.norm, size)]
            num_features = size
        self.hidden = nn.Sequential(*layers)
        self.classify = nn.Linear(num_features, head.num_classes, bias=False)
        #: (S,) the running mean of the last hidden layer: what a head stands at where it is not evaluated.
        self.register_buffer("mean_S", torch.zeros(num_features))
        self.apply(_initialise)
        nn.init.xavier_normal_(self.classify.weight)

    def forward(self, features_BD: Tensor) -> Tensor:
        hidden_BS = self.hidden(features_BD)
        if self.training:
            self.mean_S.lerp_(hidden_BS.detach().float().mean(0), _MEAN_MOMENTUM)
        return self.classify(hidden_BS)

    def add_mean(self) -> Tensor:
        """(G,) what the head adds where it is not evaluated."""
        return self.classify.weight @ self.mean_S


def _activate(norm: str, size: int, is_map: bool = False) -> list[nn.Module]:
    norms = [nn.GroupNorm(1, size) if is_map else nn.LayerNorm(size)] if norm == "layer" else []
    return [*norms, nn.ReLU()]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
