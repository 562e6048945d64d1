"""A network and the samples that it is shown, batch by batch, for verbs that look at all samples without training.

Shapes: B batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from concentration.data.loader import Batch, StepBatches, build_loader
from concentration.data.order import Order
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.networks.student import Student


@dataclass(frozen=True)
class SampleStream:
    """Shows centre views to a network, on its device.

    Attributes:
        network: in eval mode.
        batch_size: samples of a batch, over all ranks that share it.
        num_workers: processes that read ahead.
    """

    network: Student
    batch_size: int
    num_workers: int

    def read(
        self, split: Split, order: Order, count: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator["ShownBatch"]:
        """This rank's shares of the batches in this order, up to `count` places of it; None means all."""
        reader = SampleReader(split, LabelTargets(split, smear=False), self.network.image_size, views=None, seed=0)
        batch_size = min(self.batch_size, len(order))
        batches = StepBatches(reader, order, batch_size, 1, rank, world_size)
        num_batches = -(-(len(order) if count is None else count) // batch_size)
        for batch in build_loader(batches, range(num_batches), self.num_workers):
            yield ShownBatch.of(batch, self.network.device)


@dataclass(frozen=True)
class ShownBatch:
    """The samples of a batch whose images can be decoded, and how many places it had over all ranks.

    Attributes:
        images: (B, 3, H, W) uint8.
        ordinal_B: which samples these are.
    """

    images: Tensor
    ordinal_B: np.ndarray
    global_count: int

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "ShownBatch":
        is_real_B = batch.weight_B > 0
        return cls(batch.images[is_real_B].to(device), batch.ordinal_B[is_real_B].numpy(), batch.global_count)
