"""The network: base network, top layers, pace. A student or generalist has all verticals, a teacher has one.

Shapes: B batch, H and W height and width of an image, D features, C all classes, V classes of one vertical, M verticals,
T all top-2 outputs, P parts of the head that this rank holds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from concentration.array_files import load_metadata
from concentration.errors import ConfigError, DataError
from concentration.networks.auxiliary_classifier import AuxiliaryClassifier
from concentration.networks.auxiliary_heads import AuxiliaryHeads, HeadsConfig
from concentration.networks.bases.base_network import normalise_images
from concentration.networks.network_file import check_fit, load_tensors, save_tensors
from concentration.networks.pace import Pace, PaceConfig
from concentration.networks.routed_base import ServedBaseConfig, build_served_base
from concentration.networks.sharded_head import ShardedHead
from concentration.networks.top_layers import Layer, Layers, TopConfig, TopLayers
from concentration.objectives.fused_block import HeadParameters
from concentration.objectives.fused_head import GradientTime, fused_loss_by_vertical
from concentration.objectives.sigmoid_cross_entropy import sigmoid_cross_entropy_by_vertical
from concentration.objectives.softmax_cross_entropy import compute_log_odds, softmax_cross_entropy_by_vertical
from concentration.schema import Config, check_choice, parse_config, parse_json
from concentration.targets import SoftTargets

#: `sigmoid`: classes are independent (Gao et al., Equations 1 and 2). `softmax`: of all classes of all verticals one is true.
LossKind = Literal["sigmoid", "softmax"]

#: With at most so many logits of a batch per vertical, in the mean over verticals, the readable form of the loss is faster on a
#: CPU than the fused one (docs/speed.md).
FEW_LOGITS = 1 << 16


class NetworkConfig(Config):
    """Everything that fixes the architecture. A network file carries it, so that it can be loaded without a run's config.

    verticals: the number of classes of each, in the order of the outputs.
    num_blocks: SC blocks of those verticals that were merged from several; every other vertical has one.
    """

    loss: LossKind = "sigmoid"
    base: ServedBaseConfig
    top: TopConfig
    pace: PaceConfig
    image_size: pydantic.PositiveInt
    verticals: dict[str, pydantic.PositiveInt]
    num_blocks: dict[str, pydantic.PositiveInt] = pydantic.Field(default_factory=dict)
    augmentations: tuple[HeadsConfig, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check_blocks(self):
        unknown = sorted(self.num_blocks.keys() - self.verticals.keys())
        if unknown:
            raise ValueError(f"num_blocks of {', '.join(unknown)}, which are no verticals")
        return self

    @pydantic.model_validator(mode="after")
    def _check_augmentations(self):
        for heads in self.augmentations:
            sizes = [head.num_classes for head in heads.heads.values()]
            if sum(sizes) != sum(self.verticals.values()):
                raise ValueError(f"heads of {sum(sizes)} classes for {sum(self.verticals.values())} outputs")
            if heads.layer == "top1" and self.top.kind == "linear":
                raise ValueError("heads at layer=top1 with top=linear, which has no top-1; give layer=base")
        return self

    @pydantic.model_validator(mode="after")
    def _check_loss(self):
        if self.loss == "softmax" and sum(self.verticals.values()) == 1:
            raise ValueError("loss=softmax with one class, whose probability is always 1; give loss=sigmoid")
        return self

    def list_num_blocks(self) -> list[int]:
        """For every vertical, how many SC blocks it has."""
        return [self.num_blocks.get(vertical, 1) for vertical in self.verticals]

    def without_auxiliaries(self) -> Self:
        """The same network without the taps for auxiliary classifiers: as it is saved and served."""
        return self.model_copy(update={"base": self.base.without_taps()})


class Student(nn.Module):
    """`student(images)` gives logits (B, C), `student(images, targets)` the loss of each sample, (B,).

    The sigmoids of the logits are the network's probabilities, also where it is trained with a softmax. In training mode the
    loss includes those of the auxiliary classifiers, where the base network has taps for them; they are not saved.

    `weight_B` multiplies the samples' losses. Afterwards the losses may only be multiplied by one number for all samples, as
    sum and mean do: see `fused_loss_by_vertical`, which also says what `gradients` chooses.

    Images are (B, 3, H, W), uint8 or float in [0, 1]. The base network's mean and deviation are applied here, so that a
    saved network needs no preprocessing beside it but the resize.

    The loss is computed inside `forward` so that DistributedDataParallel sees one call per step.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        vertical_sizes = list(config.verticals.values())
        self.base = build_served_base(config.base, config.image_size)
        self.top = TopLayers(self.base.num_features, vertical_sizes, config.top, config.list_num_blocks())
        self.pace = Pace(vertical_sizes, config.pace)
        self.auxiliaries = nn.ModuleList(AuxiliaryClassifier(tap, vertical_sizes) for tap in self.base.taps)
        self.augmentations = nn.ModuleList(self._build_heads(heads) for heads in config.augmentations)
        #: These stay in eval mode while the rest is trained; see `augmented.augment`.
        self.frozen_modules: list[nn.Module] = []
        mean, std = self.base.mean, self.base.std
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.register_buffer("class_weight_C", None, persistent=False)
        self.gradients: GradientTime = "forward"
        #: Set where each rank holds only a part of the head; see `shard_head`.
        self.sharding: ShardedHead | None = None
        # The latest step's loss by vertical, summed over samples. A buffer for logs: `forward` returns only what DDP should see.
        self.register_buffer("vertical_loss_M", torch.zeros(len(vertical_sizes)), persistent=False)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_outputs(self) -> int:
        return sum(self.config.verticals.values())

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    def forward(self, images: Tensor, targets: SoftTargets | None = None, weight_B: Tensor | None = None) -> Tensor:
        if targets is None:
            return self._join_logits(self.compute_logits(images))
        if weight_B is not None:
            targets = targets.weighted(weight_B, len(self.config.verticals))
        images = self.normalise_images(images)
        features_BD, tapped = self.base.forward_with_taps(images) if self.training else (self.base(images), ())
        loss_BM = self._compute_head_loss(self.top.compute_layers(features_BD), targets)
        self.vertical_loss_M.copy_(loss_BM.detach().sum(0))
        loss_B = loss_BM.sum(1)
        for auxiliary, maps in zip(self.auxiliaries, tapped, strict=False):
            loss_B = loss_B + auxiliary.loss_weight * self._compute_auxiliary_loss(auxiliary, maps, targets).sum(1)
        return loss_B

    def compute_logits(self, images: Tensor) -> list[Tensor]:
        """Paced logits, (B, V) per vertical; of a network with loss=softmax, what its softmax is taken of."""
        layers = self.compute_layers(images)
        if self.sharding is None:
            return self._compute_logits(layers)
        return self.sharding.compute_logits(layers.top2, self._compute_held_logits)

    def compute_layers(self, images: Tensor) -> Layers:
        """The outputs of the base network and the hidden top layers."""
        return self.top.compute_layers(self.base(self.normalise_images(images)))

    def finish_logits(self, raw_BC: Tensor) -> Tensor:
        """The network's logits (B, C) from the raw logits of its classifiers, (B, C)."""
        return self._join_logits(self.pace(raw_BC.split(list(self.config.verticals.values()), dim=1)))

    def compute_features(self, images: Tensor, layer: Layer) -> Tensor:
        """The features (B, D) of the base network, or the outputs of top-1.

        Raises:
            ConfigError: there is no such layer.
        """
        check_choice("layer", layer, Layer)
        if layer == "top1" and not self.top.has_hidden:
            raise ConfigError("layer=top1: a network with top=linear has no top-1; give layer=base")
        features_BD = self.base(self.normalise_images(images))
        return features_BD if layer == "base" else self.top.compute_top1(features_BD)

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and the top-2 outputs of all verticals (B, T), which the classifiers see. Needs the whole head."""
        layers = self.compute_layers(images)
        return self._join_logits(self._compute_logits(layers)), layers.top2.float()

    @property
    def classifier_weights(self) -> list[str]:
        """The names of the classifiers' weights, (V, S) each, in the `state_dict`."""
        return [f"top.classifiers.{number}.weight" for number in range(len(self.top.classifiers))]

    def head_parameters(self) -> list[HeadParameters]:
        """Classifier and pace of every vertical."""
        return [
            HeadParameters(classify.weight, classify.bias, gamma, offset)
            for classify, (gamma, offset) in zip(self.top.classifiers, self.pace.by_vertical(), strict=True)
        ]

    def shard_head(self) -> None:
        """Keeps this rank's part of classifiers and pace. All ranks call it together, with equal weights.

        Raises:
            ConfigError: there are fewer classes than ranks.
        """
        self.sharding = ShardedHead(
            list(self.config.verticals.values()), self.top.num_generic, self.top.individual_sizes
        )
        self.top.keep(self.sharding.parts)
        self.pace.keep(self.sharding.parts, self.sharding.ranges)

    def unshard_head(self) -> None:
        """Makes room for the whole head again, uninitialised: its values must be loaded next."""
        self.sharding = None
        sizes = list(self.config.verticals.values())
        self.top.individual_sizes = [self.top.block_size * blocks for blocks in self.config.list_num_blocks()]
        seen = self.top.seen_sizes
        self.top.classifiers = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, *pair) for pair in zip(seen, sizes, strict=True)
        )
        self.pace = Pace(sizes, self.config.pace)

    def gamma_by_vertical(self) -> Tensor:
        """gamma of every vertical, or its mean over the vertical's classes, (M,). For logs; all ranks call it together."""
        gamma_P = self.pace.gamma_by_vertical()
        if self.sharding is None:
            return gamma_P
        shares = [
            len(part) / classes.vertical_size
            for part, classes in zip(self.sharding.parts, self.sharding.ranges, strict=True)
        ]
        return self.sharding.sum_by_vertical(gamma_P * gamma_P.new_tensor(shares))

    def held_square_norm(self) -> Tensor:
        """The squared norm () of the gradients of this rank's part of the head; summed over ranks, every number counts once."""
        squares = [p.grad.square().sum() for p in self.top.classifiers.parameters() if p.grad is not None]
        for name, parameter in self.pace.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.square()
                if not self.pace.is_per_class(name):  # all ranks that hold parts of a vertical have the same number
                    square = square / square.new_tensor(self.sharding.num_holders)
                squares.append(square.sum())
        return torch.stack(squares).sum()

    def normalise_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as float32, normalised as the base network expects."""
        return normalise_images(images, self.mean, self.std)

    def set_prior(self, frequency_C: Tensor) -> None:
        """Starts all outputs, also those of auxiliary classifiers, at the classes' frequencies (C,) in [0, 1].

        With pace the offset takes them, without it the output bias: before a norm, a bias at the prior would drown the features.
        """
        frequency_C = frequency_C.double().clamp(1e-6, 1 - 1e-6)
        logit_C = (frequency_C.log() if self.config.loss == "softmax" else frequency_C.logit()).float()
        for auxiliary in self.auxiliaries:
            auxiliary.set_prior(logit_C)
        if self.config.pace.kind == "none":
            self.top.set_prior(logit_C)
        else:
            self.pace.set_prior(logit_C)

    def save(self, path: str | Path, metadata: Mapping[str, str]) -> None:
        """Writes weights and architecture, without auxiliary classifiers, as one safetensors file, whole or not at all."""
        assert self.sharding is None, "a part of a network is no network"
        header = {"network": self.config.without_auxiliaries().model_dump_json(), **metadata}
        served = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("auxiliaries.")}
        save_tensors(Path(path), served, header)

    def load_base(self, path: Path) -> None:
        """Takes the base network's weights from another network's file.

        Raises:
            ConfigError: that network has another base network.
            DataError: the file is missing, damaged or not a safetensors file.
        """
        prefix = "base."
        tensors = load_tensors(path)
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        expected = self.base.state_dict()
        for name in sorted(found.keys() | expected.keys()):
            have, want = (tuple(t[name].shape) if name in t else "nothing" for t in (found, expected))
            if have != want:
                raise ConfigError(
                    f"base.checkpoint={path}: another base network: {name!r} is {have}, expected {want}; give the same base=..."
                )
        self.base.load_state_dict(found)

    def _build_heads(self, config: HeadsConfig) -> AuxiliaryHeads:
        num_features = self.base.num_features if config.layer == "base" else self.top.top1.out_features
        return AuxiliaryHeads(num_features, self.base.feature_map, config)

    def _compute_head_loss(self, layers: Layers, targets: SoftTargets) -> Tensor:
        """The loss (B, M) of the top layers' classifiers, in the fastest form that fits."""
        is_softmax = self.config.loss == "softmax"
        if is_softmax or self.augmentations or self._takes_readable_form(layers.top2):
            assert self.sharding is None, "no rank has all classes of a sample's softmax, or of a head's group"
            compute_loss = softmax_cross_entropy_by_vertical if is_softmax else sigmoid_cross_entropy_by_vertical
            return compute_loss(self._compute_logits(layers), targets, self.class_weight_C)
        head = self.head_parameters(), targets, self.class_weight_C, self.gradients
        if self.sharding is None:
            return fused_loss_by_vertical(self.top.split_top2(layers.top2), *head)
        return self.sharding.loss_by_vertical(layers.top2, self.top.split_top2, *head)

    def _takes_readable_form(self, top2: Tensor) -> bool:
        """Whether logits are so few that the fused form's many small steps per vertical would take longer than the arithmetic."""
        if self.sharding is not None or self.gradients == "backward" or top2.device.type != "cpu":
            return False
        return len(top2) * self.num_outputs <= FEW_LOGITS * len(self.config.verticals)

    def _compute_auxiliary_loss(self, auxiliary: AuxiliaryClassifier, maps: Tensor, targets: SoftTargets) -> Tensor:
        """The loss (B, M) of one auxiliary classifier, before its weight. These classifiers are never spread over ranks."""
        hidden_BS = auxiliary(maps)
        if self.config.loss == "softmax":
            return softmax_cross_entropy_by_vertical(auxiliary.classify(hidden_BS), targets, self.class_weight_C)
        hidden, heads = [hidden_BS] * len(auxiliary.classifiers), auxiliary.head_parameters()
        return fused_loss_by_vertical(hidden, heads, targets, self.class_weight_C, self.gradients)

    def _join_logits(self, logits: Sequence[Tensor]) -> Tensor:
        """(B, C) from (B, V) of each vertical; with a softmax, the log-odds of each class."""
        logits_BC = torch.cat(list(logits), dim=1)
        if self.config.loss == "softmax":
            logits_BC = compute_log_odds(logits_BC.double().log_softmax(1))
        return logits_BC.float()

    def _compute_logits(self, layers: Layers) -> list[Tensor]:
        """Paced logits (B, V) of every vertical, including what auxiliary heads add."""
        if not self.augmentations:
            return self._compute_held_logits(layers.top2)
        added_BC = sum(heads(layers.at(heads.config.layer)) for heads in self.augmentations)
        added = added_BC.split(list(self.config.verticals.values()), dim=1)
        return self.pace([own + more for own, more in zip(self.top.classify(layers.top2), added, strict=True)])

    def _compute_held_logits(self, top2: Tensor) -> list[Tensor]:
        """Paced logits (B, V) of every vertical, or of those parts of verticals that are held here."""
        return self.pace(self.top.classify(top2))


def load_student(path: str | Path) -> Student:
    """A network from its file, in eval mode.

    Raises:
        DataError: the file is missing, damaged, or does not hold the network that its header describes.
    """
    path = Path(path)
    header = load_metadata(path)
    if "network" not in header:
        raise DataError(f"{path}: no network description in its header; expected a file written by `concentrate`")
    try:
        config = parse_config(NetworkConfig, parse_json(header["network"], "network"))
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: its header describes no network of this version ({error}); train it again") from None
    if getattr(config.base, "pretrained", False):  # the weights are in the file: nothing is to be fetched
        config = config.model_copy(update={"base": config.base.model_copy(update={"pretrained": False})})
    tensors = load_tensors(path)
    check_fit(lambda: Student(config), tensors, path)
    student = Student(config)
    student.load_state_dict(tensors)
    return student.eval()
