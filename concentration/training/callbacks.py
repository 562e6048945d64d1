"""What happens at the end of a batch: checks, logs, checkpoints by the clock, and an orderly stop on a signal."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from concentration import preemption
from concentration.data.loader import Batch
from concentration.data.reader import explain_skipped
from concentration.data.split import Split
from concentration.distributed import broadcast_flag, gather_objects, sum_over_ranks
from concentration.errors import DataError, DivergedError, Preempted
from concentration.files import append_text
from concentration.progress import Progress
from concentration.training.checkpoints import CheckpointDirectory
from concentration.training.module import StudentModule

#: With several ranks or on a GPU, checks that wait for the device or for other ranks are made once in so many steps.
SELDOM_STEPS = 20


def is_end_of_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_check_due(trainer: pl.Trainer) -> bool:
    """Whether ranks may wait for each other at this step. Every rank gets the same answer."""
    return is_cheap_to_check(trainer) or trainer.global_step % SELDOM_STEPS == 0 or trainer.is_last_batch


def is_cheap_to_check(trainer: pl.Trainer) -> bool:
    """Whether checks need not wait for a device or for other ranks."""
    return trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"


def is_validation_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch. A run resumed from a checkpoint made before it would skip it: so save after it."""
    return trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0


class LastValidation(Callback):
    """Validates after the last step too, where the run is no multiple of the interval: what is saved has been validated."""

    def on_train_start(self, trainer: pl.Trainer, module) -> None:
        # A run that was stopped in this validation resumes with it, and `on_train_batch_start` is not called again.
        self._make_due(trainer, trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_start(self, trainer: pl.Trainer, module, batch: Batch, batch_idx: int) -> None:
        self._make_due(trainer, batch_idx)

    def _make_due(self, trainer: pl.Trainer, batch_idx: int) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            trainer.val_check_batch = batch_idx + 1


class FiniteLoss(Callback):
    """Ends the run when a loss is not finite, before another checkpoint is written.

    Raises:
        DivergedError: a loss is not finite; names the step and the samples' keys.
    """

    def __init__(self, split: Split):
        self._split = split

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StudentModule, outputs, batch: Batch, batch_idx: int
    ) -> None:
        if not is_check_due(trainer):
            return
        is_bad_B = ~module.latest_loss_B.isfinite()
        if not sum_over_ranks(is_bad_B.sum()):
            return
        keys = [self._split.key(int(ordinal)) for ordinal in batch.ordinal_B[is_bad_B]]
        keys = [key for of_rank in gather_objects(keys) for key in of_rank]
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise DivergedError(
            f"step {trainer.global_step}: the loss is not finite for {', '.join(keys[:5])}{more}; the last good checkpoint "
            "is kept: lower optimizer.lr or set trainer.clip_norm, or look at these samples"
        )


class SkippedImages(Callback):
    """Lists undecodable images with the reasons in `skipped.txt`, and ends the run when there are too many.

    Raises:
        DataError: more than `max_share` of the samples were skipped, those before a resume included; a single one is allowed.
    """

    def __init__(self, split: Split, num_samples: int, path: Path, max_share: float):
        self._split = split
        self._allowed = max(1, max_share * num_samples)
        self._num_samples = num_samples
        self._max_share = max_share
        self._path = path
        # The keys that are listed already, perhaps by a run that was killed and is now continued.
        self._seen = {line.partition(": ")[0] for line in path.read_text().splitlines()} if path.exists() else set()
        self._pending: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StudentModule, outputs, batch: Batch, batch_idx: int
    ) -> None:
        self._pending += batch.ordinal_B[batch.skipped_B].tolist()
        if not is_check_due(trainer):
            return
        ordinals = {ordinal for of_rank in gather_objects(self._pending) for ordinal in of_rank}
        found = {self._split.key(ordinal): ordinal for ordinal in ordinals}
        new = sorted(found.keys() - self._seen)
        self._pending.clear()
        self._seen |= set(new)
        if new and trainer.is_global_zero:
            append_text(self._path, "".join(f"{key}: {explain_skipped(self._split, found[key])}\n" for key in new))
        if len(self._seen) > self._allowed:
            raise DataError(
                f"{len(self._seen)} of {self._num_samples} images cannot be decoded, more than "
                f"trainer.max_skipped_share={self._max_share}; they are listed in {self._path}: repair or remove them, or "
                "go on with a larger share"
            )


class BestNetwork(Callback):
    """Keeps the network of the best validation. It must come before `Preemption`, which may end the run after a validation."""

    def __init__(self, directory: CheckpointDirectory):
        self._directory = directory

    def on_validation_end(self, trainer: pl.Trainer, module: StudentModule) -> None:
        if not module.is_validation_cut:
            self._directory.save_if_best(trainer, module.latest_mpvap)


class ClockCheckpoint(Checkpoint):
    """Writes a checkpoint every so many seconds of rank 0's clock; Lightning calls a `Checkpoint` after all other callbacks."""

    def __init__(self, directory: CheckpointDirectory, every_seconds: float):
        self._directory = directory
        self._every_seconds = every_seconds
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int) -> None:
        if is_end_of_step(trainer, batch_idx) and is_check_due(trainer) and not is_validation_due(trainer, batch_idx):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module) -> None:
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        is_due = time.monotonic() - self._saved_at >= self._every_seconds
        if broadcast_flag(is_due, trainer.strategy.root_device):
            self._directory.save(trainer)
            self._saved_at = time.monotonic()


class Preemption(Callback):
    """On a signal that asks to stop, or SIGINT, all ranks agree, save, and end with exit code 75.

    They agree at the end of a step, or inside a validation, which is then cut short and repeated when the run is resumed.
    """

    def __init__(self, directory: CheckpointDirectory):
        self._directory = directory

    def on_train_start(self, trainer: pl.Trainer, module) -> None:
        self._on_interrupt = signal.getsignal(signal.SIGINT)
        preemption.note_signals(signal.SIGINT)
        if self._is_asked(trainer):  # the signal came while training was being set up
            raise Preempted(f"stopped by a signal before step {trainer.global_step + 1}; run the same command again")

    def on_train_end(self, trainer: pl.Trainer, module) -> None:
        signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int) -> None:
        if is_end_of_step(trainer, batch_idx) and is_check_due(trainer) and not is_validation_due(trainer, batch_idx):
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module) -> None:
        # NOTE: this takes back the mark of a validation that was cut (see below), which would otherwise be in every later
        # checkpoint.
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def on_validation_batch_start(self, trainer: pl.Trainer, module: StudentModule, batch, batch_idx: int) -> None:
        if (is_cheap_to_check(trainer) or batch_idx % SELDOM_STEPS == 0) and self._is_asked(trainer):
            module.is_validation_cut = True
            raise StopIteration  # Lightning then ends the validation as if this batch did not exist

    def on_validation_end(self, trainer: pl.Trainer, module: StudentModule) -> None:
        if module.is_validation_cut:
            # NOTE: so Lightning marks a run that stopped in the first batch of a validation, which it repeats when resumed.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._stop(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self._is_asked(trainer):
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> NoReturn:
        self._directory.save(trainer)
        raise Preempted(
            f"stopped by a signal at step {trainer.global_step}, which is saved; run the same command again"
        )

    def _is_asked(self, trainer: pl.Trainer) -> bool:
        """Whether a signal has come on any rank; all ranks call it together."""
        noted = torch.tensor(preemption.noted_signal(), device=trainer.strategy.root_device)
        return bool(sum_over_ranks(noted))


class ProgressReport(Callback):
    """Feeds the progress bar."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def on_train_start(self, trainer: pl.Trainer, module) -> None:
        self._progress.start_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StudentModule, outputs, batch: Batch, batch_idx: int
    ) -> None:
        if is_end_of_step(trainer, batch_idx):
            text = f"loss {module.latest_loss_B.mean():.2f}" if trainer.global_step % SELDOM_STEPS == 0 else ""
            self._progress.update(trainer.global_step, text)


class Curves(Callback):
    """Logs loss, learning rate, gradient norm, speed, waiting for data, and each vertical's loss, gamma and routed samples.

    It does so at the first step, at every `every_steps`-th and at the last; and, as step 0, it logs the initial gammas.

    Args:
        verticals: names, in the order of the outputs.
        vertical_of_output: (C,) the number of every output's vertical, to count routed samples.
        num_steps: steps of the whole run.
    """

    def __init__(self, verticals: list[str], vertical_of_output: torch.Tensor, every_steps: int, num_steps: int):
        self._verticals = verticals
        self._vertical_of_output = vertical_of_output
        self._every_steps = every_steps
        self._num_steps = num_steps
        self._samples = self._waited_seconds = 0.0
        self._started = self._batch_ended = time.monotonic()
        # Sums of losses and numbers of samples: row 0 of the latest whole window of `every_steps`, row 1 of the current one.
        self._window_sums = torch.zeros(2, 2)
        self._routed = torch.zeros(len(verticals))
        # Of the current step, over the micro-batches that have been taken.
        self._vertical_loss_M = torch.zeros(len(verticals))
        self._gradient_norm = float("nan")

    def on_save_checkpoint(self, trainer: pl.Trainer, module, checkpoint: dict) -> None:
        device = trainer.strategy.root_device
        sums = {"window_sums": self._window_sums, "routed": self._routed}
        checkpoint["curves"] = {name: sum_over_ranks(values.to(device)).cpu() for name, values in sums.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, module, checkpoint: dict) -> None:
        # Rank 0 continues the sums over all ranks, whose number may have changed. (An earlier version did not save them.)
        if "curves" in checkpoint and trainer.is_global_zero:
            self._window_sums, self._routed = (checkpoint["curves"][name] for name in ("window_sums", "routed"))

    def on_train_start(self, trainer: pl.Trainer, module) -> None:
        self._window_sums = self._window_sums.to(trainer.strategy.root_device)
        self._started = self._batch_ended = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, module: StudentModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self._log(trainer, self._read_gammas(module))
        self._waited_seconds += time.monotonic() - self._batch_ended

    def on_before_optimizer_step(self, trainer: pl.Trainer, module, optimizer) -> None:
        if self._is_due(trainer.global_step + 1):
            self._gradient_norm = module.gradient_norm()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StudentModule, outputs, batch: Batch, batch_idx: int
    ) -> None:
        self._batch_ended = time.monotonic()
        self._samples += len(batch.weight_B) * trainer.world_size
        self._window_sums[1] += torch.stack([module.latest_loss_B.sum(), batch.weight_B.sum()])
        self._count_routed(batch)
        self._add_vertical_loss(trainer, module.student.vertical_loss_M, batch_idx)
        step = trainer.global_step
        if not is_end_of_step(trainer, batch_idx) or not self._is_due(step):
            return
        is_whole_window = step % self._every_steps == 0
        # A window that has only just begun may be a single batch, which says little; so the latest whole one is added.
        loss, count = sum_over_ranks(self._window_sums[1] if is_whole_window else self._window_sums.sum(0))
        num_parts = trainer.world_size * trainer.accumulate_grad_batches  # undoes what `share_of_sample` multiplies by
        vertical_loss_M = sum_over_ranks(self._vertical_loss_M) / num_parts
        seconds = time.monotonic() - self._started
        values = {
            "train/loss": loss / count,
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/gradient_norm": self._gradient_norm,
            "train/samples_per_second": self._samples / seconds,
            "train/data_wait_share": self._waited_seconds / seconds,
        }
        values |= self._by_vertical("loss", vertical_loss_M)
        values |= self._by_vertical("routed", sum_over_ranks(self._routed.to(trainer.strategy.root_device)))
        self._log(trainer, values | self._read_gammas(module))
        if is_whole_window:
            self._window_sums = torch.stack([self._window_sums[1], torch.zeros_like(self._window_sums[1])])
        self._samples = self._waited_seconds = 0.0
        self._started = time.monotonic()

    def _add_vertical_loss(self, trainer: pl.Trainer, loss_M: torch.Tensor, batch_idx: int) -> None:
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        self._vertical_loss_M = loss_M.clone() if is_first else self._vertical_loss_M + loss_M

    def _is_due(self, step: int) -> bool:
        return step % self._every_steps == 0 or step in (1, self._num_steps)

    def _log(self, trainer: pl.Trainer, values: Mapping[str, float | torch.Tensor]) -> None:
        for logger in trainer.loggers if values else ():
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=trainer.global_step)

    def _read_gammas(self, module: StudentModule) -> dict[str, float]:
        has_pace = module.student.config.pace.kind != "none"
        return self._by_vertical("gamma", module.student.gamma_by_vertical()) if has_pace else {}

    def _count_routed(self, batch: Batch) -> None:
        """Counts this rank's samples in the verticals of their targets; the counts grow over the whole run."""
        verticals_BK = self._vertical_of_output[batch.targets.index_BK.cpu()]
        verticals_BK = torch.where(batch.targets.probability_BK.cpu() > 0, verticals_BK, len(self._verticals))
        member_BM = torch.zeros(len(verticals_BK), len(self._verticals) + 1)
        self._routed += member_BM.scatter_(1, verticals_BK, 1.0).sum(0)[:-1]

    def _by_vertical(self, quantity: str, values_M: torch.Tensor) -> dict[str, float]:
        pairs = zip(self._verticals, values_M.tolist(), strict=True)
        return {f"train/{vertical}/{quantity}": value for vertical, value in pairs}
