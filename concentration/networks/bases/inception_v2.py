"""Inception-V2: the base network of the Knowledge Concentration paper, whole or cut after its first module.

It is GoogLeNet with batch normalisation and with each 5x5 convolution replaced by two 3x3. A 224-pixel image shrinks to
28x28 in the stem, and to 14x14 and 7x7 in the two modules of stride 2, while its channels grow from 3 to 1024.

Sources: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, appendix (the architecture); TF-slim,
tensorflow/models research/slim/nets/inception_v2.py (the channel numbers and the names of the modules, "Mixed_3b" to
"Mixed_5c"); Gao et al., "Knowledge Concentration", arXiv 1711.07607, sections 4.1 and 4.2 (what is done with its output).

Letters in shapes: B batch, H height, W width, D features.
"""

import math
from collections import OrderedDict
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.bases.base_network import BaseNetwork, BaseNetworkConfig

EndPoint = Literal[
    "mixed3b", "mixed3c", "mixed4a", "mixed4b", "mixed4c", "mixed4d", "mixed4e", "mixed5a", "mixed5b", "mixed5c"
]


class MixedRow(NamedTuple):
    """Output channels of one Inception module; its branches are concatenated in this order. 0: there is no such layer."""

    single: int
    """A 1x1 convolution."""
    triple: tuple[int, int]
    """A 1x1 that reduces, then a 3x3."""
    double: tuple[int, int]
    """A 1x1 that reduces, then two 3x3, in the place of GoogLeNet's 5x5."""
    pool: Literal["average", "maximum"]
    """A 3x3 pooling..."""
    projection: int
    """...then a 1x1."""
    stride: int
    """Of the last layer of each branch: 2 halves the map."""

    def num_outputs(self, in_channels: int) -> int:
        """Channels of the module. A pooling without projection passes on all the channels that come in."""
        return self.single + self.triple[1] + self.double[1] + (self.projection or in_channels)


# fmt: off
MIXED = {  #         1x1  1x1, 3x3    1x1, 2 x 3x3  pool, 1x1       stride
    "mixed3b": MixedRow( 64, ( 64,  64), ( 64,  96), "average",  32, 1),  # 28x28x256
    "mixed3c": MixedRow( 64, ( 64,  96), ( 64,  96), "average",  64, 1),  # 28x28x320
    "mixed4a": MixedRow(  0, (128, 160), ( 64,  96), "maximum",   0, 2),  # 14x14x576
    "mixed4b": MixedRow(224, ( 64,  96), ( 96, 128), "average", 128, 1),  # 14x14x576
    "mixed4c": MixedRow(192, ( 96, 128), ( 96, 128), "average", 128, 1),  # 14x14x576
    "mixed4d": MixedRow(160, (128, 160), (128, 160), "average",  96, 1),  # 14x14x576
    "mixed4e": MixedRow( 96, (128, 192), (160, 192), "average",  96, 1),  # 14x14x576
    "mixed5a": MixedRow(  0, (128, 192), (192, 256), "maximum",   0, 2),  # 7x7x1024
    "mixed5b": MixedRow(352, (192, 320), (160, 224), "average", 128, 1),  # 7x7x1024
    "mixed5c": MixedRow(352, (192, 320), (192, 224), "maximum", 128, 1),  # 7x7x1024
}
# fmt: on


class InceptionV2Config(BaseNetworkConfig):
    """Options of `InceptionV2`."""

    kind: Literal["inception_v2"] = "inception_v2"

    end_point: EndPoint = "mixed5c"
    """The last module. `mixed5c` gives a grid of features, any other one their mean over the map."""

    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of the newest batch in the running statistics.

    TF-slim's is 0.0003, for runs of 1e5 steps and more: with it, runs of some thousand steps would be evaluated with
    statistics that are still near their start. Hence torch's own default.
    """


class InceptionV2(BaseNetwork):
    """Inception-V2 up to `end_point`: images (B, 3, H, W) become features (B, D).

    - `mixed5c`: its map is averaged by a 3x3 kernel of stride 2 and flattened. At 224 pixels 7x7x1024 becomes 3x3x1024,
      D = 9216 (section 4.1). D depends on the image size.
    - any other: its map is averaged whole. `mixed3b` gives 28x28x256, D = 256 (section 4.2, where the paper calls it
      "Mixed_3c"; in TF-slim that one has 320 channels).

    Two things differ from TF-slim, so its weights do not fit: a batch norm has a scale, as is usual in torch (the next
    convolution could absorb it), and a layer of stride 2 pads all sides alike, where TensorFlow pads right and below.

    Raises:
        ConfigError: the map of `mixed5c` is smaller than the 3x3 kernel.
    """

    def __init__(self, config: InceptionV2Config, image_size: int) -> None:
        super().__init__()
        self.layers, channels = _build_layers(config.end_point, config.batch_norm_momentum)
        self.pool, num_cells = _build_head(config.end_point, image_size)
        self.num_features = channels * num_cells
        if num_cells > 1:
            side = math.isqrt(num_cells)
            self.feature_map = (channels, side, side)
        self.mean, self.std = config.mean, config.std
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.layers(images)).flatten(1)


class Mixed(nn.Module):
    """One Inception module: three or four branches over the same map (B, C, H, W), concatenated along the channels."""

    def __init__(self, in_channels: int, row: MixedRow, momentum: float) -> None:
        super().__init__()

        def convolve(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
            return _build_convolution(inputs, outputs, kernel, stride, momentum)

        branches = []
        if row.single:
            branches.append(convolve(in_channels, row.single, 1))
        reduced, outputs = row.triple
        branches.append(nn.Sequential(convolve(in_channels, reduced, 1), convolve(reduced, outputs, 3, row.stride)))
        reduced, outputs = row.double
        branches.append(
            nn.Sequential(
                convolve(in_channels, reduced, 1),
                convolve(reduced, outputs, 3),
                convolve(outputs, outputs, 3, row.stride),
            )
        )
        pool = _build_pool(row.pool, row.stride)
        branches.append(nn.Sequential(pool, convolve(in_channels, row.projection, 1)) if row.projection else pool)
        self.branches = nn.ModuleList(branches)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.branches], dim=1)


def _build_layers(end_point: EndPoint, momentum: float) -> tuple[nn.Sequential, int]:
    """The stem and the modules up to `end_point`, named after TF-slim's, and how many channels come out of them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1a=_build_separable_convolution(),
        pool2a=_build_pool("maximum", 2),
        conv2b=_build_convolution(64, 64, 1, 1, momentum),
        conv2c=_build_convolution(64, 192, 3, 1, momentum),
        pool3a=_build_pool("maximum", 2),
    )
    channels = 192
    for name, row in MIXED.items():
        layers[name] = Mixed(channels, row, momentum)
        channels = row.num_outputs(channels)
        if name == end_point:
            break
    return nn.Sequential(layers), channels


def _build_head(end_point: EndPoint, image_size: int) -> tuple[nn.Module, int]:
    """The last pooling, and how many cells are left of the map."""
    if end_point != "mixed5c":
        return nn.AdaptiveAvgPool2d(1), 1
    map_size = math.ceil(image_size / 32)  # five layers of stride 2, each rounding up
    if map_size < 3:
        raise ConfigError(
            f"data.image_size={image_size} is too small for base.end_point=mixed5c, whose {map_size}x{map_size} map is "
            f"pooled by a 3x3 kernel: use at least 65 pixels (the paper: 224), or an earlier base.end_point"
        )
    return nn.AvgPool2d(kernel_size=3, stride=2), ((map_size - 3) // 2 + 1) ** 2


def _build_convolution(in_channels: int, out_channels: int, kernel: int, stride: int, momentum: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-3, momentum=momentum),
        nn.ReLU(inplace=True),
    )


def _build_separable_convolution() -> nn.Sequential:
    """The first layer: 7x7 over each colour apart (8 filters each), then 1x1 over the 24 results."""
    # NOTE: alone of all, this layer has a bias and no batch norm, as in TF-slim, whose normaliser is set for `conv2d` only.
    return nn.Sequential(
        nn.Conv2d(3, 24, kernel_size=7, stride=2, padding=3, groups=3, bias=False),
        nn.Conv2d(24, 64, kernel_size=1),
        nn.ReLU(inplace=True),
    )


def _build_pool(kind: Literal["average", "maximum"], stride: int) -> nn.Module:
    if kind == "maximum":
        return nn.MaxPool2d(kernel_size=3, stride=stride, padding=1)
    # As in TensorFlow, the padding is not counted: a constant map stays constant up to its border.
    return nn.AvgPool2d(kernel_size=3, stride=stride, padding=1, count_include_pad=False)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
