"""Trains a gater's router to send images where their groups are.

Shapes: B batch, E experts, N samples of the split.
"""

import numpy as np
import pydantic
import torch
from torch.nn.functional import cross_entropy

from concentration.data.loader import StepBatches, build_loader
from concentration.data.order import WindowOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import Split
from concentration.data.views import ViewConfig
from concentration.networks.gater import Gater
from concentration.progress import Progress
from concentration.schema import Config


class RouterTrainingConfig(Config):
    """AdamW on the cross-entropy of the groups. The trunk below the router is frozen.

    lr: the highest learning rate.
    max_epochs: passes over the training samples.
    batch_size: samples of a step.
    """

    lr: pydantic.PositiveFloat = 0.003
    max_epochs: pydantic.PositiveInt = 1
    batch_size: pydantic.PositiveInt = 128


def fit_router(
    gater: Gater,
    split: Split,
    group_N: np.ndarray,
    views: ViewConfig,
    config: RouterTrainingConfig,
    seed: int,
    num_workers: int,
    progress: Progress,
) -> None:
    """Trains `gater.router` in place, on the gater's device.

    Args:
        group_N: the group of every sample; samples with a negative one are left out.
        views: the augmentation, the same as the experts'.

    Raises:
        Preempted: a signal asked to stop; nothing is kept, and the next run starts anew.
    """
    order = WindowOrder(split.by_shard(np.flatnonzero(group_N >= 0)), seed, window_shards=16)
    reader = SampleReader(split, LabelTargets(split, smear=False), gater.config.trunk.image_size, views, seed)
    batches = StepBatches(reader, order, min(config.batch_size, len(order)), 1, rank=0, world_size=1)
    device = gater.trunk.mean.device
    gater.trunk.requires_grad_(False)
    optimizer = torch.optim.AdamW(gater.router.parameters(), lr=config.lr)
    for batch in build_loader(batches, range(config.max_epochs * batches.steps_per_epoch), num_workers):
        with torch.no_grad():
            features_BD = gater.compute_features(batch.images.to(device))
        group_B = torch.from_numpy(group_N[batch.ordinal_B.numpy()]).long().to(device)
        loss_B = cross_entropy(gater.router(features_BD), group_B, reduction="none")
        loss = (loss_B * batch.weight_B.to(device)).sum() / batch.global_count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(batch.global_count)
