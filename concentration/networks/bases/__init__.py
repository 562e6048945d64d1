"""The base networks: `BaseConfig` is the configuration of any of them, `build_base` makes it.

To add one: a module with a subclass of `BaseNetwork` and of `BaseNetworkConfig` with a `kind` of its own, a line in each of
the two places below, and a file in `conf/base/`.
"""

from typing import Annotated

from pydantic import Field

from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig
from concentration.networks.bases.googlenet import GoogLeNet, GoogLeNetConfig
from concentration.networks.bases.inception_v2 import InceptionV2, InceptionV2Config
from concentration.networks.bases.small import SmallBase, SmallBaseConfig
from concentration.networks.bases.timm_base import TimmBase, TimmConfig

__all__ = [
    "BaseConfig",
    "BaseNetwork",
    "BaseNetworkConfig",
    "GoogLeNetConfig",
    "InceptionV2Config",
    "SmallBaseConfig",
    "TimmConfig",
    "build_base",
]

BaseConfig = Annotated[SmallBaseConfig | InceptionV2Config | GoogLeNetConfig | TimmConfig, Field(discriminator="kind")]

_BASES = {SmallBaseConfig: SmallBase, InceptionV2Config: InceptionV2, GoogLeNetConfig: GoogLeNet, TimmConfig: TimmBase}


def build_base(config: BaseNetworkConfig, image_size: int) -> BaseNetwork:
    """The base network that `config` describes, for square images of `image_size` pixels, with random or timm's weights.

    NOTE: `config.checkpoint` is not read here: files are the stages' business.

    Raises:
        ConfigError: the network does not take images of this size, or (timm) it or its weights are not to be had.
    """
    return _BASES[type(config)](config, image_size)
