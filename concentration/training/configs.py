"""The configs of training, apart from the code that they configure.

NOTE: that code needs Lightning, which takes seconds to import, but most verbs only read these configs.
"""

from typing import ClassVar, Literal

import pydantic
import torch

from concentration.data.views import Share
from concentration.distributed import world_size
from concentration.errors import ConfigError
from concentration.schema import Config

#: In a run's directory: what training that is not finished needs, and finished does not.
CHECKPOINTS = "checkpoints"


class TrainerConfig(Config):
    """How long, how fast and on what to train.

    accelerator: the kind of device that trains.
    devices, num_nodes: processes on each machine, and machines; `auto` takes as many as torchrun or srun has started.
    precision: the type of the matrix products: float32 (`32-true`), or bfloat16 or float16 with float32 weights.
    batch_size: samples of a step's global batch, over all processes and micro-batches.
    accumulate: micro-batches of a step in each process.
    max_epochs, max_steps: the run ends with the one that is reached first.
    min_steps: training goes on beyond `max_epochs` until so many steps are taken: for small verticals, whose epochs are short.
    num_workers: processes beside each process that decode its images; 0 decodes in the process itself.
    window_shards: how many shards are shuffled together.
    sampling: `natural` sees every sample once per epoch; `class_balanced` draws all classes equally often.
    class_weight: `inverse_sqrt` weights a class by 1/sqrt(its images), with mean 1 over classes.
    resident: decode training images once and keep them on the device, where their views are made; for small images, seen whole.
    prior: start the outputs at the classes' frequencies.
    clip_norm: the largest norm of the gradient of all weights together; a longer one is shortened to it. None for no limit.
    ema_decay: validate and keep the exponential moving average of the weights, with this decay.
    polyak_start: validate and keep the mean of the weights over all steps from this share of the run on; before that, the
        newest weights.
    update_in_backward: step each classifier as soon as its gradient is known, so that the gradients of all never exist at
        once; costs a quarter more arithmetic in the classifiers, whose gradients train/gradient_norm is then without.
    shard_head: every process holds the classifiers, pace and optimizer state of some verticals instead of all; with one process
        it changes nothing.
    compile: compile the network by `torch.compile`, which needs a C++ compiler on a CPU.
    validate_every_epochs: epochs between validations; there is one after the last step too.
    checkpoint_every_seconds: seconds between two checkpoints; there is one whenever training stops, too.
    keep_checkpoints: how many of the latest checkpoints are kept.
    keep_best: keep the network of the best val/mpvap too; it becomes best.safetensors when training ends.
    log_every_steps: steps between lines of the curves; the first and the last step have a line too.
    max_skipped_share: the share of images that may be undecodable; a single one is always allowed.
    timeout_seconds: how long processes wait for one that is dead or hangs, before all end with an error.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"accelerator", "devices", "num_nodes", "num_workers", "checkpoint_every_seconds", "keep_checkpoints", "keep_best",
         "log_every_steps", "compile", "validate_every_epochs", "max_skipped_share", "timeout_seconds"}
    )  # fmt: skip

    later_fields: ClassVar[frozenset[str]] = frozenset({"resident", "min_steps"})

    accelerator: Literal["cpu", "gpu"] = "cpu"
    devices: pydantic.PositiveInt | Literal["auto"] = 1
    num_nodes: pydantic.PositiveInt | Literal["auto"] = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    batch_size: pydantic.PositiveInt = 128
    accumulate: pydantic.PositiveInt = 1
    max_epochs: pydantic.PositiveFloat = 5
    min_steps: pydantic.PositiveInt = 1
    max_steps: pydantic.PositiveInt | None = None
    num_workers: pydantic.NonNegativeInt = 0
    window_shards: pydantic.PositiveInt = 16
    sampling: Literal["natural", "class_balanced"] = "natural"
    class_weight: Literal["none", "inverse_sqrt"] = "none"
    resident: bool = False
    prior: bool = True
    clip_norm: pydantic.PositiveFloat | None = None
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    polyak_start: float | None = pydantic.Field(default=None, ge=0, lt=1)
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
        """The type of matrix products; None means the parameters' own."""
        return {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.precision]

    @property
    def has_average(self) -> bool:
        """Whether an average of the weights is kept beside them."""
        return self.ema_decay is not None or self.polyak_start is not None

    @property
    def num_processes(self) -> int:
        """The number of processes of the whole run; with `auto`, of those that have been started."""
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
    def _check_num_steps(self):
        if self.max_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps={self.min_steps} with max_steps={self.max_steps}: no run has both; lower one or raise the other"
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
    def _check_average(self):
        if self.ema_decay is not None and self.polyak_start is not None:
            raise ValueError(
                f"ema_decay={self.ema_decay} with polyak_start={self.polyak_start}: one average can be the network; remove one"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_shard_head(self):
        for name, value in (("ema_decay", self.ema_decay), ("polyak_start", self.polyak_start)):
            if self.shard_head and value is not None:
                raise ValueError(
                    f"{name}={value} with shard_head=true: the average of a part of a head is not kept; remove one"
                )
        if self.shard_head and self.precision == "16-mixed":
            raise ValueError(
                "precision=16-mixed with shard_head=true: each process would skip other steps; use bf16-mixed or 32-true"
            )
        return self


class LoggerConfig(Config):
    """`csv` writes only `metrics.jsonl`, which `wandb` and `tensorboard` write as well.

    kind: what records the training.
    project: the project in wandb.
    """

    kind: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "concentration"

    @pydantic.field_validator("project")
    @classmethod
    def _check_project(cls, project: str) -> str:
        # wandb refuses such a name when training begins, which then goes on without wandb.
        if not 0 < len(project) <= 128 or any(character in project for character in r"/\#?%:"):
            raise ValueError(r"expected a name of at most 128 characters, without any of / \ # ? % :")
        return project

    @pydantic.model_validator(mode="after")
    def _check_kind(self):
        if self.kind != "wandb" and self.project != type(self).model_fields["project"].default:
            raise ValueError(
                f"project={self.project}: no effect with logger={self.kind}; give logger=wandb, or leave it out"
            )
        return self


def check_batch(student: torch.nn.Module, batch_size: int, world_size: int, accumulate: int) -> None:
    """Raises: ConfigError where a process would see single images in training, of which a batch norm has no statistics."""
    is_single = batch_size // world_size // accumulate == 1
    if is_single and any(isinstance(module, torch.nn.BatchNorm1d) and module.training for module in student.modules()):
        raise ConfigError(
            f"a batch of {batch_size} images for {world_size} processes with {accumulate} micro-batches each: top.norm=batch has "
            "no statistics of a single image; give top.norm=layer, a larger batch (it has at most all training images), or fewer "
            "processes or micro-batches"
        )


def count_steps(config: TrainerConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = max(config.min_steps, round(config.max_epochs * steps_per_epoch))
    return min(steps, config.max_steps) if config.max_steps else steps
