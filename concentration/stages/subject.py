"""What `evaluate` looks at: one network or several, the classes they answer for, and the samples they are asked about.

Shapes: B batch, C outputs of the subject.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concentration.data.index import Split
from concentration.data.loader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.networks.student import Student
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

    networks: tuple[Student, ...]
    checkpoint: str
    taxonomy: Taxonomy
    first_output: int
    split: Split
    ordinals: np.ndarray

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Logits, (B, C) on the CPU."""
        scores = [network(images.to(network.mean.device)).cpu() for network in self.networks]
        return torch.cat(scores, dim=1)

    def labels(self, ordinal: int) -> list[int]:
        """The sample's own labels among the subject's outputs."""
        inside = [output - self.first_output for output in self.split.labels(ordinal)]
        return [output for output in inside if 0 <= output < self.taxonomy.num_classes]

    def build_reader(self) -> SampleReader:
        """Reads centre views at the networks' size."""
        targets = LabelTargets(self.split, smear=False)
        return SampleReader(self.split, targets, self.networks[0].config.image_size, views=None, seed=0)
