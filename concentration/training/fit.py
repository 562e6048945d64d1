"""Trains a network from batches, from the beginning or from its last checkpoint."""

import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.nn.parallel import DistributedDataParallel

from concentration.data.loader import StepBatches, StepLoader, build_loader
from concentration.data.order import SequentialOrder
from concentration.distributed import choose_device, is_distributed, local_world_size, rank, world_size
from concentration.errors import ConfigError, DivergedError
from concentration.networks.student import Student
from concentration.progress import Progress
from concentration.training.callbacks import (
    BestNetwork,
    ClockCheckpoint,
    Curves,
    FiniteLoss,
    LastValidation,
    Preemption,
    ProgressReport,
    SkippedImages,
)
from concentration.training.checkpoints import AtomicCheckpointIO, CheckpointDirectory, are_finite
from concentration.training.configs import LoggerConfig, TrainerConfig, check_batch, count_steps
from concentration.training.head_files import gather_head, list_head_names
from concentration.training.loggers import open_loggers
from concentration.training.module import StudentModule
from concentration.training.optimizers import RunLength, ScheduleConfig
from concentration.training.training_data import TrainingData
from concentration.training.weight_averaging import build_weight_averaging


class Fitted(NamedTuple):
    """How training went.

    Attributes:
        num_steps: of the whole run.
        images_per_second: of all ranks since this process began; None where nothing was left to do.
        mpvap: of the trained network on val; NaN where this process did not validate it.
    """

    num_steps: int
    images_per_second: float | None
    mpvap: float


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
        ConfigError: the config asks for something that this machine or data set does not have.
        DataError: too many images cannot be decoded, or a checkpoint lacks a part of its head.
        DivergedError: a loss is not finite.
        Preempted: a signal asked to stop; everything is saved.
    """
    _check_machine(config)
    if config.keep_best and data.val_reader is None:
        raise ConfigError(
            f"{title}: trainer.keep_best=true needs validation images, and there are none for it; set it to false"
        )
    _silence_libraries()
    checkpoints = CheckpointDirectory(run_path, config.keep_checkpoints)
    latest, first_step = checkpoints.find_latest()
    batch_size = min(config.batch_size, len(data.order))
    batches = StepBatches(data.reader, data.order, batch_size, config.accumulate, rank(), world_size())
    check_batch(student, batch_size, world_size(), config.accumulate)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = count_steps(config, steps_per_epoch)
    module = StudentModule(
        student,
        optimizer,
        data.taxonomy,
        RunLength(total_steps, steps_per_epoch),
        seed,
        config.accumulate,
        data.teachers,
        data.resident,
        config.update_in_backward,
    )
    # With updates in the backward pass there is one process, which holds the whole head.
    is_spread = config.shard_head and not config.update_in_backward
    if is_spread:
        _spread_head(module)
    if config.compile:
        student.compile()
    with (
        open_loggers(logger, run_path, first_step) as loggers,
        Progress(title, total_steps, "steps", run_path, quiet=rank() != 0) as progress,
    ):
        callbacks = _build_callbacks(config, data, checkpoints, progress, run_path, total_steps)
        trainer = _build_trainer(config, callbacks, loggers, run_path, total_steps, steps_per_epoch)
        loader = StepLoader(batches, total_steps * config.accumulate, config.num_workers, config.accelerator == "gpu")
        val_loader = _build_val_loader(data, batch_size, config.num_workers)
        start = time.perf_counter()
        trainer.fit(module, loader, val_loader, ckpt_path=latest, weights_only=True)
        seconds = time.perf_counter() - start
        if not are_finite(student.state_dict().values(), choose_device(config.accelerator)):
            raise DivergedError(
                f"step {total_steps}: the last step made weights that are not finite; lower optimizer.lr or set trainer.clip_norm"
            )
        if is_spread:
            gather_head(student, checkpoints.path)
    num_images = (total_steps - first_step) * batch_size
    return Fitted(total_steps, round(num_images / seconds, 1) if num_images else None, module.latest_mpvap)


def _spread_head(module: StudentModule) -> None:
    """Leaves each rank its part of the head, which DistributedDataParallel then does not touch."""
    module.student.shard_head()
    ignored = [f"student.{name}" for name in list_head_names(module.student)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)


def _build_callbacks(
    config: TrainerConfig,
    data: TrainingData,
    checkpoints: CheckpointDirectory,
    progress: Progress,
    run_path: Path,
    total_steps: int,
) -> list[pl.Callback]:
    """In the order in which Lightning calls them: `FiniteLoss` before what saves, `BestNetwork` before `Preemption`."""
    taxonomy = data.taxonomy
    vertical_of_output_C = torch.from_numpy(taxonomy.vertical_of_output)
    return [
        LastValidation(),
        FiniteLoss(data.split),
        SkippedImages(data.split, len(data.order), run_path / "skipped.txt", config.max_skipped_share),
        Curves(list(taxonomy.verticals), vertical_of_output_C, config.log_every_steps, total_steps),
        ProgressReport(progress),
        *build_weight_averaging(config.ema_decay, config.polyak_start, total_steps),
        *([BestNetwork(checkpoints)] if config.keep_best else []),
        Preemption(checkpoints),
        ClockCheckpoint(checkpoints, config.checkpoint_every_seconds),
    ]


def _build_trainer(
    config: TrainerConfig,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    run_path: Path,
    total_steps: int,
    steps_per_epoch: int,
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
    # NOTE: Lightning's own SIGTERM handler ends with exit code 0, and broadcasts in the middle of whatever is running.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


class _StartedProcesses(TorchElasticEnvironment):
    """The ranks as torchrun, or `distributed.start` under srun, has set them; Lightning's class for SLURM would requeue jobs."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Does nothing: `_check_machine` has checked, and machines may run unequal numbers of processes."""


def _build_val_loader(data: TrainingData, batch_size: int, num_workers: int) -> torch.utils.data.DataLoader | None:
    if data.val_reader is None:
        return None  # NOTE: not []: with an empty list Lightning says that a validation is due, and none comes
    order = SequentialOrder(data.val_ordinals)
    batch_size = max(world_size(), min(batch_size, len(order)))
    batches = StepBatches(data.val_reader, order, batch_size, 1, rank(), world_size())
    return build_loader(batches, range(batches.steps_per_epoch), num_workers)


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
    """Hides Lightning's messages and warnings; its errors are still shown."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
