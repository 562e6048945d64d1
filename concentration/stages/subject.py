"""What `evaluate` and `calibrate` look at: networks, the classes they answer for, and the samples they are asked about.

Shapes: B batch, C outputs of the subject.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concentration.data.index import Split
from concentration.data.loader import SampleReader, StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.sample_targets import LabelTargets
from concentration.networks.classifier import Classifier
from concentration.progress import Progress
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

    def score_all(self, batch_size: int, num_workers: int, progress: Progress) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Logits (B, C) of all samples whose image can be decoded, batch by batch, and their ordinals (B,)."""
        order = SequentialOrder(self.ordinals)
        loaders = {}
        for size, reader in self.build_readers().items():
            batches = StepBatches(reader, order, min(batch_size, len(order)), accumulate=1, rank=0, world_size=1)
            loaders[size] = build_loader(batches, range(batches.steps_per_epoch), num_workers)
        for of_size in zip(*loaders.values(), strict=True):
            batch = of_size[0]  # the others hold the same samples
            is_real_B = torch.stack([each.weight_B > 0 for each in of_size]).all(0)
            scores_BC = self.score({size: each.images for size, each in zip(loaders, of_size, strict=True)})
            yield scores_BC[is_real_B], batch.ordinal_B[is_real_B].numpy()
            progress.advance(batch.global_count)

    def labels(self, ordinal: int) -> list[int]:
        """The sample's own labels among the subject's outputs."""
        inside = [output - self.first_output for output in self.split.labels(ordinal)]
        return [output for output in inside if 0 <= output < self.taxonomy.num_classes]

    def build_readers(self) -> dict[int, SampleReader]:
        """By size: what reads centre views. Each network sees images as `targets` shows them to it: decoded at its own size."""
        targets = LabelTargets(self.split, smear=False)
        sizes = sorted({network.image_size for network in self.networks})
        return {size: SampleReader(self.split, targets, size, views=None, seed=0) for size in sizes}
