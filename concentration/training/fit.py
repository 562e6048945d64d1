"""Trains a network from batches, from the beginning or from its last checkpoint."""

import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pydantic
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.nn.parallel import DistributedDataParallel

from concentration.data.index import Split
from concentration.data.loader import SampleReader, StepBatches, StepLoader, build_loader
from concentration.data.order import Order, SequentialOrder
from concentration.data.views import Share
from concentration.distributed import choose_device, is_distributed, local_world_size, rank, world_size
from concentration.errors import ConfigError, DivergedError
from concentration.networks.routed_teachers import RoutedTeachers
from concentration.networks.student import Student
from concentration.progress import Progress
from concentration.schema import Config
from concentration.taxonomy import Taxonomy
from concentration.training.callbacks import (
    ClockCheckpoint,
    Curves,
    FiniteLoss,
    Preemption,
    ProgressReport,
    SkippedImages,
)
from concentration.training.checkpoints import AtomicCheckpointIO, CheckpointDirectory, are_finite
from concentration.training.head_files import gather_head, list_head_names
from concentration.training.loggers import LoggerConfig, open_loggers
from concentration.training.module import StudentModule
from concentration.training.optimizers import ScheduleConfig


class TrainerConfig(Config):
    """How long, how fast and on what to train.

    batch_size: samples of a step's global batch, over all processes and micro-batches.
    accumulate: micro-batches a step and process.
    max_epochs, max_steps: the earlier ends the run.
    window_shards: shards that are shuffled into each other.
    sampling: `natural` sees every sample once an epoch; `class_balanced` draws classes evenly.
    class_weight: `inverse_sqrt` weighs a class by 1/sqrt(its images), with mean 1 over classes.
    devices, num_nodes: processes on each machine, and machines; `auto` takes as many as torchrun or srun has started.
    ema_decay: the final network is the moving average of the weights.
    prior: outputs start at the classes' frequencies.
    keep_best: the network of the best val/mpvap is kept beside the last, as best.safetensors when training ends.
    update_in_backward: each classifier is stepped as soon as its gradient is known, so that the gradients of all never exist at
        once; a quarter more arithmetic in the classifiers.
    shard_head: every process holds some verticals of the classifiers and pace, and their optimizer's state, instead of all;
        with one process it changes nothing.
    timeout_seconds: how long processes wait for one that is dead or hangs; then all end with an error.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"accelerator", "devices", "num_nodes", "num_workers", "checkpoint_every_seconds", "keep_checkpoints", "keep_best",
         "log_every_steps", "compile", "validate_every_epochs", "timeout_seconds"}
    )  # fmt: skip

    accelerator: Literal["cpu", "gpu"] = "cpu"
    devices: pydantic.PositiveInt | Literal["auto"] = 1
    num_nodes: pydantic.PositiveInt | Literal["auto"] = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    batch_size: pydantic.PositiveInt = 128
    accumulate: pydantic.PositiveInt = 1
    max_epochs: pydantic.PositiveFloat = 5
    max_steps: pydantic.PositiveInt | None = None
    num_workers: pydantic.NonNegativeInt = 0
    window_shards: pydantic.PositiveInt = 16
    sampling: Literal["natural", "class_balanced"] = "natural"
    class_weight: Literal["none", "inverse_sqrt"] = "none"
    prior: bool = True
    clip_norm: pydantic.PositiveFloat | None = None
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    update_in_backward: bool = False
    shard_head: bool = False
    compile: bool = False
    validate_every_epochs: pydantic.PositiveInt = 1
    checkpoint_every_seconds: pydantic.NonNegativeFloat = 60
    keep_checkpoints: pydantic.PositiveInt = 2
    keep_best: bool = False
    log_every_steps: pydantic.PositiveInt = 20
    max_skipped_share: Share = 0.001
    timeout_seconds: pydantic.PositiveFloat = 600

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of matrix products; None is the parameters' own."""
        return {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.precision]

    @property
    def num_processes(self) -> int:
        """Of the whole run; with `auto`, those that have been started."""
        if self.devices == "auto" or self.num_nodes == "auto":
            return world_size()
        return self.devices * self.num_nodes

    @pydantic.model_validator(mode="after")
    def _check_num_processes(self):
        if (self.devices == "auto") != (self.num_nodes == "auto"):
            raise ValueError(
                f"trainer.devices={self.devices} with trainer.num_nodes={self.num_nodes}: set both to auto, or none"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_update_in_backward(self):
        reasons = {
            f"accumulate={self.accumulate}": (self.accumulate > 1, "a step's gradient is the sum over its micro-batches"),
            f"clip_norm={self.clip_norm}": (self.clip_norm is not None, "the norm is known when all gradients are"),
            f"precision={self.precision}": (self.precision == "16-mixed", "a step is taken back where gradients overflow"),
            f"devices={self.devices} and trainer.num_nodes={self.num_nodes}": (
                self.devices == "auto" or self.num_processes > 1, "a step's gradient is the mean over processes"),
        }  # fmt: skip
        for setting, (is_set, reason) in reasons.items():
            if self.update_in_backward and is_set:
                raise ValueError(
                    f"trainer.update_in_backward=true with trainer.{setting}: {reason}; set one of them back"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_shard_head(self):
        if self.shard_head and self.ema_decay is not None:
            raise ValueError(
                f"ema_decay={self.ema_decay} with shard_head=true: the moving average of a part of a head is not kept; remove one"
            )
        if self.shard_head and self.precision == "16-mixed":
            raise ValueError(
                "precision=16-mixed with shard_head=true: each process would skip other steps; use bf16-mixed or 32-true"
            )
        return self


@dataclass(frozen=True)
class TrainingData:
    """What a network is trained and validated on.

    Attributes:
        split: of the training samples.
        order: in which they come.
        reader: of their images and targets.
        val_reader: of the validation samples and their hard labels, not smeared; None where there are none.
        val_ordinals: which samples of the validation split.
        taxonomy: of the network's outputs.
        teachers: give the targets in every step, from the reader's labels; None where the reader's targets are they.
    """

    split: Split
    order: Order
    reader: SampleReader
    val_reader: SampleReader | None
    val_ordinals: np.ndarray | None
    taxonomy: Taxonomy
    teachers: RoutedTeachers | None = None


class Fitted(NamedTuple):
    """The steps of the whole run, and the images a second of this process's part of it (None where nothing was left to do)."""

    num_steps: int
    images_per_second: float | None


def fit(
    student: Student,
    data: TrainingData,
    config: TrainerConfig,
    optimizer: ScheduleConfig,
    logger: LoggerConfig,
    run_path: Path,
    seed: int,
    title: str,
) -> Fitted:
    """Trains `student` in place; continues from the newest checkpoint under `run_path`.

    With `shard_head`, rank 0's student is whole again at the end, and the others' are not.

    Raises:
        ConfigError: a switch cannot be had on this machine.
        DataError: too many images cannot be decoded; a checkpoint lacks a part of its head.
        DivergedError: a loss is not finite.
        Preempted: a signal asked to stop; everything is saved.
    """
    _check_machine(config)
    if config.keep_best and data.val_reader is None:
        raise ConfigError("trainer.keep_best=true needs validation images, and there are none; set it to false")
    _silence_libraries()
    checkpoints = CheckpointDirectory(run_path, config.keep_checkpoints)
    latest, first_step = checkpoints.find_latest()
    batch_size = min(config.batch_size, len(data.order))
    steps_per_epoch = -(-len(data.order) // batch_size)
    total_steps = count_steps(config, steps_per_epoch)
    module = StudentModule(
        student,
        optimizer,
        data.taxonomy,
        total_steps,
        seed,
        config.accumulate,
        data.teachers,
        config.update_in_backward,
    )
    if config.shard_head:
        student.shard_head()
        ignored = [f"student.{name}" for name in list_head_names(student)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    if config.compile:
        student.compile()
    with (
        open_loggers(logger, run_path, first_step) as loggers,
        Progress(title, total_steps, "steps", run_path, quiet=rank() != 0) as progress,
    ):
        callbacks = [
            FiniteLoss(data.split),
            SkippedImages(data.split, len(data.order), run_path / "skipped.txt", config.max_skipped_share),
            Curves(
                list(data.taxonomy.verticals),
                torch.from_numpy(data.taxonomy.vertical_of_output),
                config.log_every_steps,
            ),
            ProgressReport(progress),
            *([EMAWeightAveraging(decay=config.ema_decay)] if config.ema_decay else []),
            Preemption(checkpoints),
            ClockCheckpoint(checkpoints, config.checkpoint_every_seconds, config.keep_best),
        ]
        trainer = _build_trainer(config, callbacks, loggers, run_path, total_steps, steps_per_epoch)
        batches = StepBatches(data.reader, data.order, batch_size, config.accumulate, rank(), world_size())
        loader = StepLoader(batches, total_steps * config.accumulate, config.num_workers, config.accelerator == "gpu")
        val_loaders = _build_val_loaders(data, batch_size)
        start = time.perf_counter()
        trainer.fit(module, loader, val_loaders, ckpt_path=latest, weights_only=True)
        seconds = time.perf_counter() - start
        if not are_finite(student.state_dict().values(), choose_device(config.accelerator)):
            raise DivergedError(
                f"step {total_steps}: the last step made weights that are not finite; lower optimizer.lr or set trainer.clip_norm"
            )
        if config.shard_head:
            gather_head(student, checkpoints.path)
    num_images = (total_steps - first_step) * batch_size
    return Fitted(total_steps, round(num_images / seconds, 1) if num_images else None)


def count_steps(config: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = max(1, round(config.max_epochs * steps_per_epoch))
    return min(steps, config.max_steps) if config.max_steps else steps


def _build_trainer(
    config: TrainerConfig, callbacks, loggers, run_path, total_steps: int, steps_per_epoch: int
) -> pl.Trainer:
    environment = _StartedProcesses() if is_distributed() else LightningEnvironment()
    devices = local_world_size() if config.devices == "auto" else config.devices
    # NOTE: one "epoch" of Lightning is the whole run: its own epoch ends are where resuming goes wrong.
    batches_per_epoch = steps_per_epoch * config.accumulate * config.validate_every_epochs
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=devices,
        num_nodes=1 if config.num_nodes == "auto" else config.num_nodes,
        strategy="ddp" if config.num_processes > 1 else "auto",
        precision=config.precision,
        max_epochs=1,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip_norm,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO(), environment],
        val_check_interval=min(batches_per_epoch, total_steps * config.accumulate),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_path,
    )
    # NOTE: Lightning's own handler of SIGTERM would end with exit code 0, and broadcasts in the middle of whatever runs.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


class _StartedProcesses(TorchElasticEnvironment):
    """The ranks that torchrun has set, or `distributed.start` from srun's; Lightning's own for SLURM would requeue jobs."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing: `_check_machine` has, and machines may have unequal numbers of processes."""


def _build_val_loaders(data: TrainingData, batch_size: int) -> list[torch.utils.data.DataLoader]:
    if data.val_reader is None:
        return []
    order = SequentialOrder(data.val_ordinals)
    batch_size = max(world_size(), min(batch_size, len(order)))
    batches = StepBatches(data.val_reader, order, batch_size, 1, rank(), world_size())
    return [build_loader(batches, range(batches.steps_per_epoch), num_workers=0)]


def _check_machine(config: TrainerConfig) -> None:
    choose_device(config.accelerator)
    if config.compile and config.accelerator == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError(
            "trainer.compile=true needs a C++ compiler and found neither g++ nor clang++; install one or set it to false"
        )
    if config.num_processes != world_size():
        raise ConfigError(
            f"trainer.devices={config.devices} and trainer.num_nodes={config.num_nodes} are {config.num_processes} "
            f"processes, but {world_size()} started; start them with `torchrun --nproc-per-node={config.devices}` or srun, "
            "or set both to auto"
        )


def _silence_libraries() -> None:
    """Hides what Lightning says of itself; its errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
