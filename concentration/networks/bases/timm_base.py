"""Any network of the timm library as a base network, with or without its pretrained weights.

Letters in shapes: B batch, H height, W width, D features.
"""

from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig, PerChannel, PerChannelPositive
from concentration.schema import suggest


class TimmConfig(BaseNetworkConfig):
    """Options of `TimmBase`."""

    kind: Literal["timm"] = "timm"

    name: str
    """As timm lists it: `resnet50`, or with one of its sets of weights, `resnet50.a1_in1k`."""

    pretrained: bool = False
    """Start from timm's weights, which are downloaded unless they are in the cache of the Hugging Face hub."""

    mean: PerChannel | None = None
    """Of the input normalisation; by default the one that this network was pretrained with."""

    std: PerChannelPositive | None = None
    """As `mean`."""

    def starting_from(self, checkpoint: str) -> Self:
        return self.model_copy(update={"checkpoint": checkpoint, "pretrained": False})

    @model_validator(mode="after")
    def _check_one_source_of_weights(self) -> Self:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(
                f"base.pretrained=true and base.checkpoint={self.checkpoint} are two sources of weights: give one of them"
            )
        return self


class TimmBase(BaseNetwork):
    """The timm network `name` without its classifier: images (B, 3, H, W) become its pooled features (B, D).

    Raises:
        ConfigError: timm has no such network or no weights for it, the weights cannot be had, or the network does not take
            images of `image_size`.
    """

    def __init__(self, config: TimmConfig, image_size: int) -> None:
        super().__init__()
        cfg = _find_pretrained_cfg(config.name)
        self.network = _create(config, cfg, image_size)
        self.num_features = _measure_num_features(self.network, config.name, image_size)
        self.mean = config.mean if config.mean is not None else cfg.mean
        self.std = config.std if config.std is not None else cfg.std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def _find_pretrained_cfg(name: str) -> Any:
    """timm's description of the network (image size, normalisation, where its weights are)."""
    import timm  # takes seconds to import, so only when a network of it is asked for

    if not timm.is_model(name):
        raise ConfigError(f"base.name={name}: timm has no such network{suggest(name, timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ConfigError(f"base.name={name}: timm has no such weights{suggest(name, known)}") from None


def _create(config: TimmConfig, cfg: Any, image_size: int) -> nn.Module:
    import timm

    if config.pretrained and not cfg.has_weights:
        raise ConfigError(f"base.name={config.name}: timm has no weights for it; give base.pretrained=false")
    # NOTE: a vision transformer is built for one image size; other networks refuse the argument.
    size = {"img_size": image_size} if cfg.fixed_input_size else {}
    try:
        return timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, in_chans=3, **size)
    # A download that fails is an OSError of the hub's or urllib's; the others are assertions about sizes inside networks.
    except (OSError, AssertionError, RuntimeError, ValueError) as error:
        if not config.pretrained:
            raise ConfigError(_describe_refusal(config.name, image_size, error)) from error
        raise ConfigError(
            f"base.name={config.name}: its pretrained weights could not be loaded ({type(error).__name__}: {error}). Start once "
            f"where there is a network (they stay in the cache of the Hugging Face hub), or give base.pretrained=false "
            f"base.checkpoint=FILE"
        ) from error


def _measure_num_features(network: nn.Module, name: str, image_size: int) -> int:
    """D, from the features of a black image.

    timm's own `num_features` is the size before a last hidden layer, which some networks keep without their classifier
    (MobileNet-V3: 960 there, and 1280 come out).
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            features = network(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(_describe_refusal(name, image_size, error)) from error
    network.train(was_training)
    if features.ndim != 2:
        raise ConfigError(f"base.name={name} gives features of shape {tuple(features.shape)}, expected (B, D)")
    return features.shape[1]


def _describe_refusal(name: str, image_size: int, error: Exception) -> str:
    return f"base.name={name} does not take data.image_size={image_size}: {error}"
