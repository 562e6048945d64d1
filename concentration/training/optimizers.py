"""Optimizers and learning-rate schedules, each with its config."""

import math
from collections.abc import Collection
from typing import Annotated, ClassVar, Literal, NamedTuple

import pydantic
import torch

from concentration.networks.student import Student
from concentration.schema import Config


class RunLength(NamedTuple):
    """The length of a whole run, in optimizer steps."""

    total_steps: int
    steps_per_epoch: int


class ScheduleConfig(Config):
    """The learning rate over the steps of a run, and the weight decay.

    lr: the highest learning rate.
    warmup_steps: for how many steps the learning rate first rises linearly to `lr`.
    schedule: what follows: `constant` keeps `lr`, `cosine` falls towards 0 at the end of the run, `steps` falls as `decay` says.
    weight_decay: the weight decay of weight matrices; biases, norms, gamma and offsets have none.
    decay, decay_epochs: for schedule=steps: every `decay_epochs` epochs the learning rate is multiplied by `decay`.
    """

    #: Whether every supported version of torch can step this optimizer on a GPU in one pass over weights and state.
    fuses_on_gpu: ClassVar[bool] = True

    lr: pydantic.PositiveFloat
    warmup_steps: pydantic.NonNegativeInt = 0
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    decay_epochs: pydantic.PositiveFloat | None = None
    weight_decay: pydantic.NonNegativeFloat = 0.0

    def _choose_fused(self, groups: list[dict], asked: bool | None) -> bool | None:
        """Whether a step is one pass over weights and state instead of one per operation: for Adagrad on a CPU 13 times faster.

        None leaves the choice between the other implementations to torch.
        """
        if asked is not None:
            return asked or None
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        return devices <= ({"cpu", "cuda"} if self.fuses_on_gpu else {"cpu"}) or None

    @pydantic.model_validator(mode="after")
    def _check_decay(self):
        for name, value in (("decay", self.decay), ("decay_epochs", self.decay_epochs)):
            if (value is not None) != (self.schedule == "steps"):
                raise ValueError(
                    f"optimizer.{name}={value} with optimizer.schedule={self.schedule}: give it with schedule=steps, only and "
                    "always"
                )
        return self


class AdagradConfig(ScheduleConfig):
    """Adagrad (Duchi et al. 2011).

    initial_accumulator: where the sum of squared gradients starts. TensorFlow's starts at 0.1, with which Gao et al. trained;
        torch's starts at 0.
    """

    fuses_on_gpu: ClassVar[bool] = False

    kind: Literal["adagrad"] = "adagrad"
    initial_accumulator: pydantic.NonNegativeFloat = 0.1

    def build(self, groups: list[dict], fused: bool | None = None) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(
            groups,
            lr=self.lr,
            initial_accumulator_value=self.initial_accumulator,
            fused=self._choose_fused(groups, fused),
        )


class AdamWConfig(ScheduleConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    beta1, beta2: the decay rates of the running means of the gradient and of its square.
    """

    kind: Literal["adamw"] = "adamw"
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.999, ge=0, lt=1)

    def build(self, groups: list[dict], fused: bool | None = None) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), fused=self._choose_fused(groups, fused)
        )


class SGDConfig(ScheduleConfig):
    """Stochastic gradient descent with momentum.

    momentum: the share of the last step that is added to the next one.
    nesterov: whether the momentum is Nesterov's.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: float = pydantic.Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False

    @pydantic.model_validator(mode="after")
    def _check_nesterov(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "optimizer.nesterov=true with optimizer.momentum=0.0: there is no momentum; set one of them back"
            )
        return self

    def build(self, groups: list[dict], fused: bool | None = None) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=self._choose_fused(groups, fused)
        )


OptimizerConfig = Annotated[AdagradConfig | AdamWConfig | SGDConfig, pydantic.Field(discriminator="kind")]


def build_optimizer(
    config: ScheduleConfig,
    student: Student,
    left_out: Collection[torch.nn.Parameter] = (),
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a student's parameters that take a gradient.

    Weights decay; biases, norms, gamma and offsets do not. gamma has its own learning rate where `pace.lr` is given.

    Args:
        left_out: parameters that something else steps.
        fused: whether a step is one pass over weights and state; None decides by the parameters' device.
    """
    left_out = {id(parameter) for parameter in left_out}
    gamma = {id(parameter) for parameter in student.pace.gamma_parameters()}
    groups = {
        "weights": {"params": [], "weight_decay": config.weight_decay},
        "vectors": {"params": [], "weight_decay": 0.0},
        "gamma": {"params": [], "weight_decay": 0.0, "lr": student.config.pace.lr or config.lr},
    }
    for parameter in student.parameters():
        if id(parameter) in left_out or not parameter.requires_grad:
            continue
        name = "gamma" if id(parameter) in gamma else "weights" if parameter.ndim > 1 else "vectors"
        groups[name]["params"].append(parameter)
    return config.build([group for group in groups.values() if group["params"]], fused)


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, length: RunLength
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate as a function of the optimizer step alone."""

    def factor(step: int) -> float:
        return compute_lr_factor(config, step, length)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def compute_lr_factor(config: ScheduleConfig, step: int, length: RunLength) -> float:
    """The factor of the learning rate at step `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "steps":
        return config.decay ** (step // (config.decay_epochs * length.steps_per_epoch))
    done = (step - config.warmup_steps) / max(1, length.total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
