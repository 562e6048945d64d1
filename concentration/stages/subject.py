"""What `evaluate` and `calibrate` look at: networks, the classes they answer for, and the samples they are asked about.

Shapes: B batch, N crops of an image, C outputs of the subject.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concentration.data.crops import CropReader, NumCrops
from concentration.data.loader import StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.metrics.ensembles import Combination, combine_logits
from concentration.networks.classifier import Classifier
from concentration.progress import Progress
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True)
class Subject:
    """What is evaluated: networks, the classes that they answer for, and the samples that they are asked about.

    Attributes:
        models: each is asked about every sample, and their answers are combined. A model is one network, or several whose outputs
            side by side are its answer.
        checkpoint: a hash of the networks' files.
        taxonomy: the taxonomy of the outputs: the whole one, or one vertical's for a teacher.
        first_output: the first of these outputs in the whole taxonomy.
        split: where the samples are.
        ordinals: which of its samples, rising.
        num_crops: crops of each image, whose answers are combined too.
        combination: how answers are combined.
    """

    models: tuple[tuple[Classifier, ...], ...]
    checkpoint: str
    taxonomy: Taxonomy
    first_output: int
    split: Split
    ordinals: np.ndarray
    num_crops: NumCrops = 1
    combination: Combination = "mean"

    @property
    def networks(self) -> list[Classifier]:
        """All networks of all models."""
        return [network for model in self.models for network in model]

    @torch.inference_mode()
    def score(self, images: Mapping[int, Tensor]) -> Tensor:
        """Logits (B, C) on the networks' device, of the same images (B * N, 3, H, W), given at each network's size."""
        answers = [_ask(model, images) for model in self.models]
        if len(answers) * self.num_crops == 1:
            return answers[0]
        crops = [answer.unflatten(0, (-1, self.num_crops)) for answer in answers]
        return combine_logits(torch.cat(crops, dim=1), self.combination)

    def score_all(self, batch_size: int, num_workers: int, progress: Progress) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yields logits (B, C) on the networks' device, and ordinals (B,), of all samples whose image can be decoded.

        batch_size: how many crops a network is shown at a time.
        """
        order = SequentialOrder(self.ordinals)
        batch_size = max(1, batch_size // self.num_crops)
        loaders = {}
        for size, reader in self.build_readers().items():
            batches = StepBatches(reader, order, min(batch_size, len(order)), accumulate=1, rank=0, world_size=1)
            loaders[size] = build_loader(batches, range(batches.steps_per_epoch), num_workers)
        for of_size in zip(*loaders.values(), strict=True):
            batch = of_size[0]  # the others hold the same samples
            is_real_B = torch.stack([each.weight_B > 0 for each in of_size]).all(0)
            scores_BC = self.score({size: each.images for size, each in zip(loaders, of_size, strict=True)})
            yield (
                scores_BC if is_real_B.all() else scores_BC[is_real_B.to(scores_BC.device)],
                batch.ordinal_B[is_real_B].numpy(),
            )
            progress.advance(batch.global_count)

    def labels(self, ordinal: int) -> list[int]:
        """The sample's own labels among the subject's outputs."""
        inside = [output - self.first_output for output in self.split.labels(ordinal)]
        return [output for output in inside if 0 <= output < self.taxonomy.num_classes]

    def build_readers(self) -> dict[int, SampleReader | CropReader]:
        """By image size: a reader of centre views, or of crops. Each network sees images decoded at its own size."""
        targets = LabelTargets(self.split, smear=False)
        sizes = sorted({network.image_size for network in self.networks})
        if self.num_crops == 1:
            return {size: SampleReader(self.split, targets, size, views=None, seed=0) for size in sizes}
        return {size: CropReader(self.split, targets, size, self.num_crops) for size in sizes}


def _ask(model: Sequence[Classifier], images: Mapping[int, Tensor]) -> Tensor:
    """The logits of the model's networks, side by side."""
    return torch.cat([network(images[network.image_size].to(network.device)) for network in model], dim=1)
