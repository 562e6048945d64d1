"""The top layers of Figure 3: top-1, top-2 and the classifiers, fully connected (FC) or structurally connected (SC).

    kind            Figure 3   top-1                 top-2
    fc_fc           (a)        one, shared           one, shared
    fc_sc           (b)        one, shared           one per vertical
    sc_sc           (c)        one per vertical      one per vertical
    fc_sc_generic   (d)        one, shared           a shared generic part of size x, and s2 - x per vertical
    linear          -          none                  none: the classifiers see the features, as in GoogLeNet

Shapes: B batch, D features of the base network, M verticals, V classes of one vertical, s1 and s2 the sizes of top-1 and top-2,
S what one classifier sees (s2, or D with `linear`), X the generic part of top-2, C all classes.

Source: Gao et al., section 3.2 and Figure 3.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from concentration.networks.head_plan import Part
from concentration.schema import Config

TopKind = Literal["fc_fc", "fc_sc", "sc_sc", "fc_sc_generic", "linear"]

#: Where features are taken: at the output of the base network, or of top-1.
Layer = Literal["base", "top1"]


class TopConfig(Config):
    """Sizes and structure of the top layers. Source: Gao et al., Figure 3.

    kind: the structure of Figure 3 (a to d); `linear` has classifiers on the features alone.
    top1, top2: the sizes of the two layers; that of an SC layer is the size for each vertical.
    generic: x of Figure 3 (d), from 0 (equal to fc_sc) to `top2` (equal to fc_fc).
    norm: the normalisation of top-1 and top-2 before their ReLU. `layer` normalises each vertical's block on its own; `batch`
        uses batch statistics, so that results depend on how a batch is split over processes.
    """

    kind: TopKind
    top1: pydantic.PositiveInt | None = None
    top2: pydantic.PositiveInt | None = None
    generic: pydantic.NonNegativeInt | None = None
    norm: Literal["none", "batch", "layer"] = "none"

    @pydantic.model_validator(mode="after")
    def _check_sizes(self):
        for name, size in (("top1", self.top1), ("top2", self.top2)):
            if self.kind != "linear" and size is None:
                raise ValueError(f"'top.{name}' is missing: give top.{name}=VALUE")
            if self.kind == "linear" and size is not None:
                raise ValueError(f"top.{name}={size} with top=linear: it has no such layer; remove it")
        if self.kind == "linear" and self.norm != "none":
            raise ValueError(f"top.norm={self.norm} with top=linear: there is nothing to normalise; remove it")
        return self

    @pydantic.model_validator(mode="after")
    def _check_generic(self):
        if (self.kind == "fc_sc_generic") != (self.generic is not None):
            raise ValueError(
                f"top.generic={self.generic} with top={self.kind}: give it with top=fc_sc_generic, only and always"
            )
        if self.generic is not None and self.generic > self.top2:
            raise ValueError(
                f"top.generic={self.generic} is larger than top.top2={self.top2}; expected 0 to {self.top2}"
            )
        return self


class Layers(NamedTuple):
    """The outputs of a network's layers for a batch.

    base: (B, D) features.
    top1: (B, s1), or (B, M*s1) where each vertical has its own; None with `linear`.
    top2: (B, X + M*(s2 - X)), the generic part first, then each vertical's own; the features with `linear`.
    """

    base: Tensor
    top1: Tensor | None
    top2: Tensor

    def at(self, layer: Layer) -> Tensor:
        return self.base if layer == "base" else self.top1


class TopLayers(nn.Module):
    """From base features (B, D) to raw logits (B, V) for each vertical. Activations are ReLUs.

    Args:
        num_features: D.
        vertical_sizes: V of each vertical.
        num_blocks: how many SC blocks each vertical has. It is 1, but for a vertical that was merged from several, which keeps
            all of theirs (see `regrouping`).
    """

    def __init__(
        self,
        num_features: int,
        vertical_sizes: Sequence[int],
        config: TopConfig,
        num_blocks: Sequence[int] | None = None,
    ):
        super().__init__()
        num_blocks = [1] * len(vertical_sizes) if num_blocks is None else num_blocks
        self.num_generic = num_features if config.kind == "linear" else _num_generic(config)
        self.block_size = 0 if config.kind == "linear" else config.top2 - self.num_generic
        #: For each classifier held here: how many top-2 outputs it alone sees.
        self.individual_sizes = [self.block_size * blocks for blocks in num_blocks]
        self.has_hidden = config.kind != "linear"
        if self.has_hidden:
            self._build_hidden(num_features, sum(num_blocks), config)
        # One parameter per vertical: under autograd, each slice of one flat weight costs a gradient of the full size.
        self.classifiers = nn.ModuleList(
            nn.Linear(seen, size) for seen, size in zip(self.seen_sizes, vertical_sizes, strict=True)
        )
        self._initialise()

    @property
    def seen_sizes(self) -> list[int]:
        """For each classifier held here: how many top-2 outputs it sees, S."""
        return [self.num_generic + size for size in self.individual_sizes]

    def _build_hidden(self, num_features: int, num_blocks: int, config: TopConfig) -> None:
        self.top1_blocks = num_blocks if config.kind == "sc_sc" else 1
        num_top2 = self.num_generic + num_blocks * self.block_size
        self.top1 = nn.Linear(num_features, self.top1_blocks * config.top1)
        self.top1_norm = _build_norm(config.norm, [config.top1] * self.top1_blocks)
        if config.kind == "sc_sc":
            self.top2 = BlockLinear(num_blocks, config.top1, config.top2)
        else:
            # All verticals' top-2 layers share their input, so they are ONE product: 7 times faster than M of them.
            self.top2 = nn.Linear(config.top1, num_top2)
        generic_block = [self.num_generic] if self.num_generic else []
        self.top2_norm = _build_norm(
            config.norm, generic_block + [self.block_size] * (num_blocks if self.block_size else 0)
        )

    def forward(self, features_BD: Tensor) -> list[Tensor]:
        """Raw logits, (B, V) per vertical."""
        return self.classify(self.compute_top2(features_BD))

    def classify(self, top2: Tensor) -> list[Tensor]:
        """Raw logits, (B, V) for each classifier held here, from the top-2 outputs that these see."""
        hidden = self.split_top2(top2)
        return [classify(hidden_BS) for classify, hidden_BS in zip(self.classifiers, hidden, strict=True)]

    def hidden(self, features_BD: Tensor) -> list[Tensor]:
        """What each vertical's classifier sees, (B, S)."""
        return self.split_top2(self.compute_top2(features_BD))

    def compute_top2(self, features_BD: Tensor) -> Tensor:
        """The top-2 outputs of all verticals side by side: see `Layers`."""
        return self.compute_layers(features_BD).top2

    def compute_layers(self, features_BD: Tensor) -> Layers:
        """The outputs of all layers."""
        if not self.has_hidden:
            return Layers(features_BD, None, features_BD)
        top1 = self.compute_top1(features_BD)
        return Layers(features_BD, top1, torch.relu(self.top2_norm(self.top2(top1))))

    def compute_top1(self, features_BD: Tensor) -> Tensor:
        """The top-1 outputs: (B, s1), or (B, M*s1) where each vertical has its own."""
        return torch.relu(self.top1_norm(self.top1(features_BD)))

    def split_top2(self, top2: Tensor) -> list[Tensor]:
        """What each classifier held here sees, (B, S): the generic part and its own blocks."""
        generic_BX, individual = top2[:, : self.num_generic], top2[:, self.num_generic :]
        if not self.block_size:
            return [generic_BX] * len(self.classifiers)
        blocks = individual.split(self.individual_sizes, dim=1)
        return [torch.cat([generic_BX, block], dim=1) for block in blocks] if self.num_generic else list(blocks)

    @torch.no_grad()
    def keep(self, parts: Sequence[Part]) -> None:
        """Keeps only these parts of the classifiers, each as a classifier of its own."""
        self.individual_sizes = [self.individual_sizes[part.vertical] for part in parts]
        kept = []
        for part in parts:
            classify, rows = self.classifiers[part.vertical], slice(part.start, part.stop)
            for parameter in (classify.weight, classify.bias):
                parameter.data = parameter.data[rows].clone()
            classify.out_features = len(part)
            kept.append(classify)
        self.classifiers = nn.ModuleList(kept)

    def set_prior(self, logit_C: Tensor) -> None:
        """Sets the output biases to these logits (C,), which are in the order of the output index."""
        with torch.no_grad():
            for classify, logit_V in zip(
                self.classifiers, logit_C.split([c.out_features for c in self.classifiers]), strict=True
            ):
                classify.bias.copy_(logit_V)

    def _initialise(self) -> None:
        if self.has_hidden:
            nn.init.kaiming_normal_(self.top1.weight, nonlinearity="relu")
            nn.init.zeros_(self.top1.bias)
            if isinstance(self.top2, nn.Linear):
                nn.init.kaiming_normal_(self.top2.weight, nonlinearity="relu")
                nn.init.zeros_(self.top2.bias)
        for classify in self.classifiers:
            nn.init.xavier_normal_(classify.weight)
            nn.init.zeros_(classify.bias)


class BlockLinear(nn.Module):
    """A linear layer for each block of the input: from (B, M*I) to (B, M*O), output block m sees input block m alone."""

    def __init__(self, num_blocks: int, num_in: int, num_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_blocks, num_in, num_out) * (2 / num_in) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(num_blocks * num_out))  # one axis, as all biases: they do not decay

    def forward(self, x: Tensor) -> Tensor:
        blocks_MBI = x.unflatten(1, self.weight.shape[:2]).transpose(0, 1)
        bias_M1O = self.bias.view(len(self.weight), 1, -1).to(blocks_MBI.dtype)
        return torch.baddbmm(bias_M1O, blocks_MBI, self.weight).transpose(0, 1).flatten(1)


class BlockLayerNorm(nn.Module):
    """Layer normalisation of each block of the last axis on its own. Blocks may differ in size."""

    def __init__(self, block_sizes: Sequence[int]):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in block_sizes)
        self.block_sizes = list(block_sizes)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.split(self.block_sizes, dim=1)
        return torch.cat([norm(block) for norm, block in zip(self.norms, blocks, strict=True)], dim=1)


def count_top_parameters(config: TopConfig, num_features: int, num_classes: int, num_verticals: int) -> int:
    """The weights of the top layers, without biases and norms, by the formulas of section 3.2 (Gao et al.).

    `num_features` is the paper's s_b, `num_classes` its N, `num_verticals` its M.
    """
    if config.kind == "linear":
        return num_features * num_classes
    top1, top2, generic = config.top1, config.top2, _num_generic(config)
    classifiers = top2 * num_classes
    if config.kind == "sc_sc":
        return classifiers + num_verticals * top2 * top1 + num_verticals * top1 * num_features
    return classifiers + num_verticals * (top2 - generic) * top1 + generic * top1 + top1 * num_features


def _num_generic(config: TopConfig) -> int:
    # (a) and (b) are the two ends of (d): FC(s1)-SC(s2, s2) and FC(s1)-SC(s2, 0).
    return {"fc_fc": config.top2, "fc_sc": 0, "sc_sc": 0, "fc_sc_generic": config.generic}[config.kind]


def _build_norm(norm: str, block_sizes: Sequence[int]) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(sum(block_sizes))
    return BlockLayerNorm(block_sizes) if norm == "layer" else nn.Identity()
