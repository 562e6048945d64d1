"""Steps each classifier inside the backward pass, so that the gradients of all classifiers never exist at once.

The classifiers of a million classes with 512 features are 2 GB of weights, and their gradients would be 2 GB more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from concentration.networks.student import Student
from concentration.training.optimizers import RunLength, ScheduleConfig, compute_lr_factor


class BackwardUpdates:
    """One optimizer per vertical for its classifier's weight, which is stepped as soon as its gradient is known.

    Args:
        student: the network; the main optimizer must leave out the weights of its classifiers.
        config: the optimizer's config; the learning rate follows the same schedule.
        length: the length of the whole run.
        count_steps: returns the number of steps taken so far.

    Attributes:
        weights: the parameters that are stepped here.
    """

    def __init__(
        self, student: Student, config: ScheduleConfig, length: RunLength, count_steps: Callable[[], int] = lambda: 0
    ):
        student.gradients = "backward"
        self._config = config
        self._length = length
        self._count_steps = count_steps
        self.weights = [classify.weight for classify in student.top.classifiers]
        self._weight_of = dict(zip(student.config.verticals, self.weights, strict=True))
        # Built at first use, because the weights are moved to their device only after this.
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._loaded: dict[str, dict] = {}
        for vertical, weight_VS in self._weight_of.items():
            weight_VS.register_post_accumulate_grad_hook(partial(self._step, vertical))

    def state_dict(self) -> dict[str, dict]:
        """The state of each optimizer, by vertical."""
        return {vertical: self._optimizer_of(vertical).state_dict() for vertical in self._weight_of}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._optimizers.clear()
        self._loaded = {vertical: state[vertical] for vertical in self._weight_of}

    def _optimizer_of(self, vertical: str) -> torch.optim.Optimizer:
        if vertical not in self._optimizers:
            group = {"params": [self._weight_of[vertical]], "weight_decay": self._config.weight_decay}
            optimizer = self._optimizers[vertical] = self._config.build([group])
            if vertical in self._loaded:
                optimizer.load_state_dict(self._loaded.pop(vertical))
        return self._optimizers[vertical]

    def _step(self, vertical: str, weight_VS: nn.Parameter) -> None:
        optimizer = self._optimizer_of(vertical)
        factor = compute_lr_factor(self._config, self._count_steps(), self._length)
        optimizer.param_groups[0]["lr"] = self._config.lr * factor
        optimizer.step()
        weight_VS.grad = None
