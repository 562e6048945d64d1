"""The Lightning module: a step of training, a step of validation, and what is kept for logs.

Shapes: B samples of a rank's micro-batch, G samples of a step's global batch.
"""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from concentration.data.loader import Batch
from concentration.data.order import random_bits
from concentration.data.resident import ResidentImages
from concentration.distributed import gather_objects, rank, sum_over_ranks
from concentration.metrics.evaluation import Evaluator
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.networks.student import Student
from concentration.taxonomy import Taxonomy
from concentration.training.backward_updates import BackwardUpdates
from concentration.training.head_files import drop_head, list_head_names, restore_head
from concentration.training.optimizers import RunLength, ScheduleConfig, build_optimizer, build_schedule


class StudentModule(pl.LightningModule):
    """Trains a `Student`: a student, a generalist, or a teacher.

    Args:
        student: the network. Later stages read its own file, not Lightning's checkpoint.
        optimizer: the optimizer's config.
        taxonomy: the taxonomy of the network's outputs, for validation.
        length: the length of the whole run.
        seed: for dropout and the like. The step is mixed in, so that a resumed step draws what it would have drawn.
        accumulate: micro-batches per step.
        teachers: they make the targets of each batch from its labels; None where the batch has its targets.
        resident: the training images, where batches come without them; None where batches have images.
        update_in_backward: step each classifier inside the backward pass; see `BackwardUpdates`.
    """

    def __init__(
        self,
        student: Student,
        optimizer: ScheduleConfig,
        taxonomy: Taxonomy,
        length: RunLength,
        seed: int,
        accumulate: int,
        teachers: RoutedTeachers | None = None,
        resident: ResidentImages | None = None,
        update_in_backward: bool = False,
    ):
        super().__init__()
        self.student = student
        self._optimizer = optimizer
        self._taxonomy = taxonomy
        self._length = length
        self._seed = seed
        self._accumulate = accumulate
        self._teachers = teachers
        self._resident = resident
        self._updates = None
        if update_in_backward:
            self._updates = BackwardUpdates(student, optimizer, length, lambda: self.trainer.global_step)
        #: (B,) the losses of the latest micro-batch, 0 for samples of weight 0: for the checks and logs of callbacks.
        self.latest_loss_B: Tensor | None = None
        self.latest_batch: Batch | None = None
        #: Set where a validation is stopped before its last batch, so that it has no result; on all ranks before the same batch.
        self.is_validation_cut = False
        #: val/mpvap of the latest validation that was not stopped.
        self.latest_mpvap = float("nan")

    def configure_optimizers(self):
        left_out = self._updates.weights if self._updates else ()
        # NOTE: torch's fused steps do the gradient scaler's work themselves, and then gradients cannot be clipped before.
        fused = False if self.trainer.precision == "16-mixed" else None
        optimizer = build_optimizer(self._optimizer, self.student, left_out, fused)
        schedule = build_schedule(self._optimizer, optimizer, self._length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self._teachers is not None:
            self._teachers.to(self.device)
        if self._resident is not None:
            self._resident.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self._updates:
            checkpoint["backward_updates"] = self._updates.state_dict()
        if self.student.sharding is not None:
            drop_head(checkpoint, self.student, self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if self._updates:
            self._updates.load_state_dict(checkpoint["backward_updates"])
        if self.student.sharding is not None:
            optimizer = build_optimizer(self._optimizer, self.student)
            restore_head(checkpoint, Path(self.trainer.ckpt_path), self.student, optimizer)

    def gradient_norm(self) -> Tensor:
        """The norm () of the gradients of the whole network; all ranks call it together."""
        own = {f"student.{name}" for name in (list_head_names(self.student) if self.student.sharding else ())}
        shared = [p.grad for name, p in self.named_parameters() if p.grad is not None and name not in own]
        norm = torch.nn.utils.get_total_norm(shared)
        if self.student.sharding is not None:
            norm = (norm.square() + sum_over_ranks(self.student.held_square_norm())).sqrt()
        return norm

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # NOTE: not left to Lightning, which refuses torch's fused steps in mixed precision (even in bf16, where nothing is
        # scaled), and sees only this rank's part of a head that is spread.
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.gradient_norm())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed = int(random_bits(self._seed, batch_idx, rank()) >> np.uint64(1))
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed spends 1 ms on GPUs that are not there
        else:
            torch.manual_seed(seed)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return batch if batch.images.ndim == 4 else batch._replace(images=self._resident.view(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch.targets if self._teachers is None else self._teachers(batch.images, batch.targets)
        share = share_of_sample(batch.global_count, self.trainer.world_size, self._accumulate)
        loss_B = self.student(batch.images, targets, batch.weight_B * share)
        self.latest_loss_B, self.latest_batch = loss_B.detach() / share, batch
        return loss_B.sum()

    def on_validation_epoch_start(self) -> None:
        # NOTE: in one pass, which keeps the scores of the samples in their verticals; `evaluate` can take two passes instead.
        self._evaluator = Evaluator(self._taxonomy)
        self.is_validation_cut = False

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        kept = batch.weight_B > 0
        labels = [row[row >= 0].tolist() for row in labels_of(batch)[kept.cpu()]]
        self._evaluator.update(self.student(batch.images)[kept], labels)

    def on_validation_epoch_end(self) -> None:
        evaluator = self._evaluator
        del self._evaluator
        if self.is_validation_cut:
            return
        first, *others = (Evaluator.from_state(self._taxonomy, state) for state in gather_objects(evaluator.state()))
        for other in others:
            first.merge(other)
        evaluation = first.compute(self.device)
        values = {"val/mpvap": evaluation.mpvap, "val/top1": evaluation.top1}
        values |= {f"val/{vertical}/ap": ap for vertical, ap in evaluation.pvap.items()}
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        self.latest_mpvap = evaluation.mpvap


def labels_of(batch: Batch) -> Tensor:
    """(B, K) int64 outputs of hard labels on the CPU, -1 where a place is unused."""
    return torch.where(batch.targets.probability_BK > 0, batch.targets.index_BK, -1).cpu()


def share_of_sample(global_count: int, world_size: int, accumulate: int) -> float:
    """The factor of a sample's loss with which the step's gradient is that of the mean loss over the global batch.

    DistributedDataParallel divides by the world size, and Lightning by the number of micro-batches. Both are undone here,
    and the sum is divided by the global count instead: a mean of rank means is wrong where ranks hold uneven counts.
    A head that is spread over ranks is outside DistributedDataParallel, but its gradients are means over ranks as well
    (`ShardedHead.loss_by_vertical`), so the same factor is right for them.
    """
    return world_size * accumulate / global_count
