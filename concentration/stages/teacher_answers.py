"""What a teacher says of samples, in batches: of their centre view, or of each of their stored views.

Shapes: B batch, V classes of the teacher's vertical.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from concentration.data.index import Split
from concentration.data.loader import SampleReader, StepBatches, build_loader
from concentration.data.order import SequentialOrder
from concentration.data.sample_targets import LabelTargets
from concentration.data.views import ViewConfig
from concentration.networks.classifier import Classifier


class Answers(NamedTuple):
    """On the CPU.

    probability_BV: sigmoids, float32; 0 where an image cannot be decoded: it teaches nothing.
    view_BV: (B, 10) uint8, what the teacher saw.
    skipped_B: bool, where the image cannot be decoded.
    """

    probability_BV: Tensor
    view_BV: Tensor
    skipped_B: Tensor


@dataclass(frozen=True)
class TeacherAnswers:
    """A teacher and how it is asked.

    Attributes:
        network: the teacher, on its device.
        split: of the samples.
        num_views: 0 asks about the centre view.
        view: the augmentation of the others. They are drawn from the view's number and the sample alone, so that the
            teachers of all of a sample's verticals see the same.
    """

    network: Classifier
    split: Split
    num_views: int
    view: ViewConfig
    batch_size: int
    num_workers: int

    @torch.inference_mode()
    def ask(self, ordinals: np.ndarray) -> Iterator[Answers]:
        """All samples in their first view, then all in their second, and so on."""
        views = self.view if self.num_views else None
        targets = LabelTargets(self.split, smear=False)
        reader = SampleReader(self.split, targets, self.network.image_size, views, seed=0)
        batch_size = min(self.batch_size, len(ordinals))
        batches = StepBatches(reader, SequentialOrder(ordinals), batch_size, accumulate=1, rank=0, world_size=1)
        numbers = range(batches.steps_per_epoch * max(1, self.num_views))
        for batch in build_loader(batches, numbers, self.num_workers):
            real = slice(0, batch.global_count)
            probability_BV = self.network(batch.images.to(self.network.device)).sigmoid().cpu()[real]
            probability_BV[batch.skipped_B[real]] = 0
            yield Answers(probability_BV, batch.view_BV[real], batch.skipped_B[real])
