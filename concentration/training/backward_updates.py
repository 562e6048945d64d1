"""Steps the classifiers inside the backward pass, so that their gradients never exist all at once.

A million classes of 512 features are 2 GB of weights; their whole gradient would be 2 GB more.
"""

from collections.abc import Callable

import torch
from torch import nn

from concentration.networks.student import Student
from concentration.training.optimizers import RunLength, ScheduleConfig, compute_lr_factor


class BackwardUpdates:
    """An optimizer of its own for the weight of each vertical's classifier, stepped when its gradient is known.

    Args:
        student: its classifiers' weights leave the main optimizer to this.
        config: of the optimizer; the learning rate follows the same schedule.
        length: of the whole run.
        count_steps: gives the number of steps taken so far.

    Attributes:
        weights: the parameters that it steps.
    """

    def __init__(
        self, student: Student, config: ScheduleConfig, length: RunLength, count_steps: Callable[[], int] = lambda: 0
    ):
        student.gradients = "backward"
        self._config = config
        self._length = length
        self._count_steps = count_steps
        self.weights = [classify.weight for classify in student.top.classifiers]
        verticals = zip(student.config.verticals, self.weights, strict=True)
        self._optimizers = {vertical: self._attach(weight_VS) for vertical, weight_VS in verticals}

    def state_dict(self) -> dict[str, dict]:
        """By vertical."""
        return {vertical: optimizer.state_dict() for vertical, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for vertical, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[vertical])

    def _attach(self, weight_VS: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = self._config.build([{"params": [weight_VS], "weight_decay": self._config.weight_decay}])

        def step(parameter: nn.Parameter) -> None:
            factor = compute_lr_factor(self._config, self._count_steps(), self._length)
            optimizer.param_groups[0]["lr"] = self._config.lr * factor
            optimizer.step()
            parameter.grad = None

        weight_VS.register_post_accumulate_grad_hook(step)
        return optimizer
