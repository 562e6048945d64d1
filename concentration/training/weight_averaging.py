"""Averages of the weights over the steps of a run: they are what is validated, kept as the best, and saved at the end.

Checkpoints hold the average, its count and the current weights, so a resumed run gets the same average.
"""

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def build_weight_averaging(
    ema_decay: float | None, polyak_start: float | None, total_steps: int
) -> list[WeightAveraging]:
    """The average that is asked for, if any: a moving one, or Polyak's from this share of the run on."""
    if ema_decay is not None:
        return [MovingAverage(ema_decay)]
    if polyak_start is not None:
        return [PolyakAveraging(first_step=round(polyak_start * total_steps))]
    return []


class MovingAverage(WeightAveraging):
    """The exponential moving average of the weights after every step. Batch norms' statistics are averaged like weights."""

    def __init__(self, decay: float):
        def average(mean: Tensor, newest: Tensor, num_steps: Tensor) -> Tensor:
            # NOTE: in this form frozen weights keep every bit; decay * mean + (1 - decay) * newest would change them by rounding.
            return mean + (newest - mean) * (1 - decay)

        super().__init__(avg_fn=average)


class PolyakAveraging(WeightAveraging):
    """The mean of the weights after every step from `first_step` (counted from 0) on; before that, the newest weights.

    Batch norms' statistics are averaged like weights.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """

    def __init__(self, first_step: int):
        def average(mean: Tensor, newest: Tensor, num_steps: Tensor) -> Tensor:
            # NOTE: before `first_step` the count is 1, which gives the newest weights; an average that is only begun then would
            # be the initial weights until then, and those would be validated.
            count = (num_steps + 1 - first_step).clamp(min=1)
            return mean + (newest - mean) / count

        super().__init__(avg_fn=average)
