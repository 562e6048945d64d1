"""What `evaluate` looks at: one network or several, the classes they answer for, and the samples they are asked about.

Shapes: B batch, C outputs of the subject.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concentration.data.index import Split
from concentration.data.loader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.networks.classifier import Classifier
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class Subject:
    """What is evaluated: networks, the classes that they answer for, and the samples that they are asked about.

    Attributes:
        networks: their outputs side by side are the subject's.
        checkpoint: a hash of their files.
        taxonomy: of the outputs: the whole, or one vertical's for a teacher.
        first_output: the place of the first of them in the whole taxonomy.
        split: where the samples are.
        ordinals: which samples, rising.
    """

    networks: tuple[Classifier, ...]
    checkpoint: str
    taxonomy: Taxonomy
    first_output: int
    split: Split
    ordinals: np.ndarray

    @torch.inference_mode()
    def score(self, images: Mapping[int, Tensor]) -> Tensor:
        """Logits, (B, C) on the CPU, of the same images at each network's size."""
        scores = [network(images[network.image_size].to(network.device)).cpu() for network in self.networks]
        return torch.cat(scores, dim=1)

    def labels(self, ordinal: int) -> list[int]:
        """The sample's own labels among the subject's outputs."""
        inside = [output - self.first_output for output in self.split.labels(ordinal)]
        return [output for output in inside if 0 <= output < self.taxonomy.num_classes]

    def build_readers(self) -> dict[int, SampleReader]:
        """By size: what reads centre views. Each network sees images as `targets` shows them to it: decoded at its own size."""
        targets = LabelTargets(self.split, smear=False)
        sizes = sorted({network.image_size for network in self.networks})
        return {size: SampleReader(self.split, targets, size, views=None, seed=0) for size in sizes}
