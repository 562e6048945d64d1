"""What a teacher says of samples, in batches: of their centre view, or of each of their stored views.

Shapes: B batch, V classes of the teacher's vertical.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from concentration.data.loader import build_loader
from concentration.data.order import SequentialOrder
from concentration.data.prefetch import Prefetch, check_room
from concentration.data.reader import ReadSamples, SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.views import ViewConfig
from concentration.networks.classifier import Classifier


class Answers(NamedTuple):
    """On the CPU.

    group: which of the lists of samples these are of.
    probability_BV: sigmoids, float32; 0 where an image cannot be decoded: it teaches nothing.
    view_BV: (B, 13) uint8, what the teacher saw.
    skipped_B: bool, where the image cannot be decoded.
    """

    group: int
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
    def ask(self, groups: Sequence[np.ndarray]) -> Iterator[Answers]:
        """List after list; in each, all samples in their first view, then all in their second, and so on."""
        views = self.view if self.num_views else None
        targets = LabelTargets(self.split, smear=False)
        reader = SampleReader(self.split, targets, self.network.image_size, views, seed=0)
        batches = _GroupBatches(reader, groups, max(1, self.num_views), self.batch_size)
        for number, read in enumerate(build_loader(batches, range(len(batches)), self.num_workers)):
            probability_BV = self.network(read.images.to(self.network.device)).sigmoid().cpu()
            probability_BV[read.skipped_B] = 0
            yield Answers(batches.group_of(number), probability_BV, read.view_BV, read.skipped_B)


class _GroupBatches(torch.utils.data.Dataset):
    """Batches of one list and one view each, one after the other, so that one loader reads all lists."""

    def __init__(self, reader: SampleReader, groups: Sequence[np.ndarray], num_views: int, batch_size: int):
        self._reader = reader
        self._order = SequentialOrder(np.concatenate(groups)) if groups else None
        starts = itertools.accumulate((len(ordinals) for ordinals in groups), initial=0)
        #: By batch: its list, its view, and its first and last place in all lists.
        self._plan = [
            (group, view, start + first, start + min(first + batch_size, len(ordinals)))
            for group, (start, ordinals) in enumerate(zip(starts, groups, strict=False))
            for view in range(num_views)
            for first in range(0, len(ordinals), batch_size)
        ]
        if reader.cache is not None and self._plan:
            check_room(reader.split, self._order, reader.cache)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> ReadSamples:
        _, view, first, last = self._plan[number]
        return self._reader.read(self._order.take(0, np.arange(first, last)), epoch=view)

    def group_of(self, number: int) -> int:
        return self._plan[number][0]

    def begin_prefetch(self, numbers: range) -> Prefetch | None:
        """As `StepBatches` does."""
        if self._reader.cache is None or not numbers:
            return None
        return Prefetch(self._reader.split, self._order, self._reader.cache, (0, len(self._order)))

    def locate(self, number: int) -> tuple[int, int]:
        return 0, self._plan[number][2]
