"""A hard mixture of experts that have their own decoders: the gater sends an image to an expert, which answers for all classes.

With ONE shared decoder a mixture is a `Student` whose base network is a `RoutedBase`.

Shapes: B batch, C all classes.
"""

from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from torch import Tensor, nn

from concentration.array_files import load_metadata
from concentration.errors import ConfigError, DataError
from concentration.networks.gater import Gater, GaterConfig, run_chosen
from concentration.networks.network_file import check_fit, load_tensors, save_tensors
from concentration.networks.student import NetworkConfig, Student
from concentration.schema import Config, parse_config, parse_json

#: Where a mixture's description stands in the header of its file.
HEADER = "mixture"


class MixtureNetworkConfig(Config):
    """Everything that fixes the architecture; experts may differ from each other."""

    gater: GaterConfig
    experts: tuple[NetworkConfig, ...]

    @pydantic.model_validator(mode="after")
    def _check_experts(self):
        if len(self.experts) != self.gater.num_experts:
            raise ValueError(f"{len(self.experts)} experts for a gater that chooses from {self.gater.num_experts}")
        forms = {(expert.image_size, tuple(expert.verticals.items())) for expert in self.experts}
        if len(forms) > 1:
            raise ValueError("the experts differ in image size or classes; train them on the same data")
        return self


class Mixture(nn.Module):
    """`mixture(images)` gives logits (B, C) float32 of images (B, 3, H, W), uint8 or float in [0, 1].

    Only the gater and the chosen experts run; an expert sees its images of the batch together. With two experts the logits are
    the weighted mean of theirs. It is not trained: its parts are.

    Source: Gross, Ranzato and Szlam 2017 (the abstract).
    """

    def __init__(self, config: MixtureNetworkConfig):
        super().__init__()
        self.config = config
        self.gater = Gater(config.gater)
        self.experts = nn.ModuleList(Student(expert) for expert in config.experts)

    @property
    def image_size(self) -> int:
        return self.config.experts[0].image_size

    @property
    def num_outputs(self) -> int:
        return self.experts[0].num_outputs

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def forward(self, images: Tensor) -> Tensor:
        return run_chosen(self.gater(images), list(self.experts), images)

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and the gater's features (B, T): unlike the experts' own, these are comparable between all images."""
        features_BT = self.gater.compute_features(images)
        return run_chosen(self.gater.choose(features_BT), list(self.experts), images).float(), features_BT

    @property
    def classifier_weights(self) -> list[str]:
        """The names of the classifiers' weights of all experts."""
        return [f"experts.{n}.{name}" for n, expert in enumerate(self.experts) for name in expert.classifier_weights]

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes weights and architecture as one safetensors file, whole or not at all."""
        save_tensors(path, self.state_dict(), {HEADER: self.config.model_dump_json(), **metadata})


def load_mixture(path: Path) -> Mixture:
    """A mixture from its file, in eval mode.

    Raises:
        DataError: the file is missing, damaged, or does not hold the mixture that its header describes.
    """
    header = load_metadata(path)
    try:
        config = parse_config(MixtureNetworkConfig, parse_json(header.get(HEADER, ""), HEADER))
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: its header describes no mixture of this version ({error}); make it again") from None
    tensors = load_tensors(path)
    check_fit(lambda: Mixture(config), tensors, path)
    mixture = Mixture(config)
    mixture.load_state_dict(tensors)
    return mixture.eval()
