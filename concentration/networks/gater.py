"""The gater: features of a network that was trained before, and the rule that ranks the experts by them.

Shapes: B batch, D features, E all experts, R experts that see an image (1 or 2), N numbers of an answer, P (image, expert) pairs.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import pydantic
import torch
from torch import Tensor, nn

from concentration.grouping.sample_groups import CentroidRouter, prepare_features
from concentration.networks.bases import BaseConfig, build_base
from concentration.networks.bases.base_network import normalise_images
from concentration.networks.top_layers import TopConfig, TopLayers
from concentration.schema import Config


class CentroidRuleConfig(Config):
    """The expert of the nearest centroid: the rule that made the groups."""

    kind: Literal["centroid"] = "centroid"


class RouterRuleConfig(Config):
    """A small network that has learned the groups.

    hidden: units of its one hidden layer; None is without one.
    """

    kind: Literal["router"] = "router"
    hidden: pydantic.PositiveInt | None = 64


RuleConfig = Annotated[CentroidRuleConfig | RouterRuleConfig, pydantic.Field(discriminator="kind")]


class TrunkConfig(Config):
    """The part of a trained network that gives a gater its features.

    top: that network's top layers, where features are the outputs of top-1; None where they are the base network's.
    """

    base: BaseConfig
    image_size: pydantic.PositiveInt
    num_verticals: pydantic.PositiveInt
    top: TopConfig | None = None


class GaterConfig(Config):
    """Everything that fixes the gater's architecture.

    normalise: features are brought to length 1 first.
    top_experts: R, how many experts see an image.
    """

    trunk: TrunkConfig
    rule: RuleConfig
    num_experts: pydantic.PositiveInt
    normalise: bool
    top_experts: Literal[1, 2] = 1

    @pydantic.model_validator(mode="after")
    def _check_top_experts(self):
        if self.top_experts > self.num_experts:
            raise ValueError(f"top_experts={self.top_experts}, but there is {self.num_experts} expert; give 1")
        return self


class Choice(NamedTuple):
    """The chosen experts, int64 and the best first, and the weights of their answers, float32 with the sum 1."""

    expert_BR: Tensor
    weight_BR: Tensor


class Gater(nn.Module):
    """`gater(images)` chooses the experts. It is never trained with them: experts are trained on fixed groups.

    Images are (B, 3, H, W), uint8 or float in [0, 1]. With two experts, a router's probabilities weigh them; nearest
    centroids count the same.

    Source: Gross, Ranzato and Szlam 2017 (the abstract): each data point is assigned to a single expert.
    """

    def __init__(self, config: GaterConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.trunk)
        num_features = self.trunk.num_features
        if config.rule.kind == "centroid":
            self.register_buffer("centroid_ED", torch.zeros(config.num_experts, num_features))
            self.register_buffer("price_E", torch.zeros(config.num_experts))
        else:
            self.router = _build_router(num_features, config.rule.hidden, config.num_experts)

    def forward(self, images: Tensor) -> Choice:
        return self.choose(self.compute_features(images))

    def compute_features(self, images: Tensor) -> Tensor:
        """(B, D) float32: what the gater sees."""
        return prepare_features(self.trunk(images), self.config.normalise)

    def choose(self, features_BD: Tensor) -> Choice:
        """The choice by the features of `compute_features`."""
        rank = self.config.top_experts
        if self.config.rule.kind == "router":
            best = self.router(features_BD).topk(rank, dim=1)
            return Choice(best.indices, best.values.softmax(dim=1))
        # NOTE: a product of matrices, which counts among the multiply-adds, unlike `torch.cdist`.
        cost_BE = self.centroid_ED.square().sum(1) + self.price_E - 2 * features_BD @ self.centroid_ED.T
        expert_BR = cost_BE.topk(rank, dim=1, largest=False).indices
        return Choice(expert_BR, torch.full(expert_BR.shape, 1 / rank, device=features_BD.device))

    def take_centroids(self, router: CentroidRouter) -> None:
        """The centroids of a grouping as the gater's."""
        self.centroid_ED.copy_(router.centroids.centroid_KD)
        self.price_E.copy_(router.centroids.price_K)

    def train(self, mode: bool = True) -> Self:
        """Always as in evaluation, whatever `mode`: its batch statistics are those it was trained with."""
        return super().train(False)


class Trunk(nn.Module):
    """Features (B, D) of images (B, 3, H, W), uint8 or float in [0, 1]: the base network's, or the top-1 layer's of it."""

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.base = build_base(config.base, config.image_size)
        self.num_features = self.base.num_features
        self.top1, self.top1_norm = None, None
        if config.top is not None:
            top = TopLayers(self.base.num_features, [1] * config.num_verticals, config.top)
            self.top1, self.top1_norm = top.top1, top.top1_norm
            self.num_features = top.top1.out_features
        mean, std = self.base.mean, self.base.std
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features_BD = self.base(normalise_images(images, self.mean, self.std))
        return features_BD if self.top1 is None else torch.relu(self.top1_norm(self.top1(features_BD)))

    def take(self, base: nn.Module, top: TopLayers) -> None:
        """The weights of a trained network's base and, where they are asked for, its top-1 layer's."""
        self.base.load_state_dict(base.state_dict())
        if self.top1 is not None:
            self.top1.load_state_dict(top.top1.state_dict())
            self.top1_norm.load_state_dict(top.top1_norm.state_dict())


def run_chosen(choice: Choice, experts: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' answers, (B, N); each expert sees all of its images of the batch together.

    An expert without images in the batch is not run. An exported program cannot branch like this: there all experts see all
    images, and those that were not chosen have weight 0.
    """
    expert_BR, weight_BR = choice
    if torch.compiler.is_exporting():
        weight_BE = weight_BR.new_zeros(images.shape[0], len(experts)).scatter_add(1, expert_BR, weight_BR)
        return sum(weight_BE[:, number, None] * expert(images) for number, expert in enumerate(experts))
    answer_BN: Tensor | None = None
    for number in torch.unique(expert_BR).tolist():
        row_P, rank_P = (expert_BR == number).nonzero(as_tuple=True)
        answer_PN = experts[number](images[row_P])
        if answer_BN is None:
            answer_BN = answer_PN.new_zeros(len(images), answer_PN.shape[1])
        answer_BN = answer_BN.index_add(0, row_P, answer_PN * weight_BR[row_P, rank_P, None].to(answer_PN.dtype))
    assert answer_BN is not None, "a batch without images"
    return answer_BN


def _build_router(num_features: int, hidden: int | None, num_experts: int) -> nn.Sequential:
    """The router, from (B, D) to (B, E). It first normalises each sample's features, whose scale may be anything."""
    sizes = [num_features, num_experts] if hidden is None else [num_features, hidden, num_experts]
    layers: list[nn.Module] = [nn.LayerNorm(num_features), nn.Linear(*sizes[:2])]
    if hidden is not None:
        layers += [nn.ReLU(), nn.Linear(hidden, num_experts)]
    return nn.Sequential(*layers)
