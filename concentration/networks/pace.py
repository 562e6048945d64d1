"""Self-paced logits, Figure 4: each vertical's logits are L2-normalised, then scaled by gamma.

Shapes: B batch, V classes of one vertical, M verticals, C all classes.

Source: Gao et al., section 3.3.
"""

import math
from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from concentration.errors import DataError
from concentration.networks.head_plan import Part
from concentration.objectives.fused_block import EPSILON, ClassRange
from concentration.schema import Config


class PaceConfig(Config):
    """How a vertical's logits are paced.

    kind: `none` leaves logits as they are; `vertical` trains one gamma per vertical and `class` one per class; `fixed` has one
        per vertical, which is not trained.
    init: gamma at the start, `sqrt` for sqrt(N_v); to trained gammas normal noise with standard deviation `deviation` is added.
    deviation: the standard deviation of the noise that is added to trained gammas at the start.
    log: gamma = init * exp(rho), and rho is trained: gamma stays positive, and a step changes it by a share of itself.
    lr: gamma's own learning rate; None takes the optimizer's.
    offset: trained numbers that are added after the scaling, one per vertical or one per class.

    Source: Gao et al., section 3.3 and the five settings of Figure 5. `log`, `lr` and `offset` are additions: without
    an offset a vertical's loss cannot fall below N_v * softplus(-gamma / sqrt(N_v)), and gamma moves slowly.
    """

    kind: Literal["none", "vertical", "class", "fixed"]
    init: Literal["sqrt"] | pydantic.PositiveFloat = "sqrt"
    deviation: pydantic.NonNegativeFloat = 1e-3
    log: bool = False
    lr: pydantic.PositiveFloat | None = None
    offset: Literal["none", "vertical", "class"] = "none"

    @pydantic.model_validator(mode="after")
    def _refuse_options_without_effect(self):
        without_effect = {"none": {"init", "deviation", "log", "lr", "offset"}, "fixed": {"deviation", "log", "lr"}}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for name in sorted(without_effect.get(self.kind, ())):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"pace.{name}={getattr(self, name)} has no effect with pace={self.kind}; remove it")
        return self


class Pace(nn.Module):
    """y_v = gamma_v * x_v / ||x_v|| + offset for every vertical v.

    Source: Gao et al., Equations 3 and 4. The gradient is the whole Jacobian's; Equation 5 prints its diagonal only.
    """

    def __init__(self, vertical_sizes: Sequence[int], config: PaceConfig):
        super().__init__()
        self.vertical_sizes = list(vertical_sizes)
        self.config = config
        #: For each vertical, which of its classes are held here; None means all. Sizes and parameters are those of held classes.
        self.ranges: list[ClassRange | None] = [None] * len(vertical_sizes)
        sizes = torch.tensor(self.vertical_sizes, dtype=torch.float32)
        start_M = sizes.sqrt() if config.init == "sqrt" else torch.full_like(sizes, config.init)
        start = start_M
        if config.kind == "class":
            start = start_M.repeat_interleave(sizes.long(), output_size=sum(self.vertical_sizes))
        if config.kind == "fixed":
            self.register_buffer("gamma", start)
        elif config.kind != "none":
            deviation = config.deviation * torch.randn_like(start)
            if config.log:
                self.register_buffer("start", start)
                self.rho = nn.Parameter(deviation / start)  # a share: no draw, however far, makes gamma negative
            else:
                self.gamma = nn.Parameter(start + deviation)
        if config.offset != "none":
            self.offset = nn.Parameter(
                torch.zeros(sum(self.vertical_sizes) if config.offset == "class" else len(sizes))
            )

    def forward(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Paced logits in float32, (B, V) per vertical, from raw logits of the same shapes; as they are with `kind=none`.

        Raises:
            DataError: these are not the logits of the verticals.
        """
        sizes = [logits_BV.shape[-1] for logits_BV in logits]
        if sizes != self.vertical_sizes:
            raise DataError(f"pace: logits of {sizes} classes by vertical, expected {self.vertical_sizes}")
        if self.config.kind == "none":
            return list(logits)
        paced = []
        for (gamma, offset), logits_BV, classes in zip(self.by_vertical(), logits, self.ranges, strict=True):
            paced_BV = gamma * normalise(logits_BV, classes)
            paced.append(paced_BV if offset is None else paced_BV + offset)
        return paced

    def by_vertical(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """gamma and offset of every vertical: each a number or (V,), None where there is none."""
        nothing = [None] * len(self.vertical_sizes)
        gammas, offsets = nothing, nothing
        if self.config.kind != "none":
            gammas = self._split(self.compute_gamma(), self.is_per_class("gamma"))
        if self.config.offset != "none":
            offsets = self._split(self.offset, self.is_per_class("offset"))
        return list(zip(gammas, offsets, strict=True))

    def compute_gamma(self) -> Tensor:
        """gamma: (M,), or (C,) with `kind=class`."""
        return self.start * self.rho.exp() if self.config.log else self.gamma

    def gamma_by_vertical(self) -> Tensor:
        """(M,): gamma, or its mean over the vertical's classes. For logs."""
        gammas = self._split(self.compute_gamma().detach(), self.is_per_class("gamma"))
        return torch.stack([gamma.mean() for gamma in gammas])

    def is_per_class(self, name: str) -> bool:
        """Whether this parameter or buffer has a number per class; otherwise it has one per vertical."""
        return (self.config.offset if name == "offset" else self.config.kind) == "class"

    @torch.no_grad()
    def keep(self, parts: Sequence[Part], ranges: Sequence[ClassRange]) -> None:
        """Keeps only the numbers of these parts; `ranges` describes the same parts."""
        by_class = torch.cat(
            [torch.arange(len(part)) + classes.start for part, classes in zip(parts, ranges, strict=True)]
        )
        by_part = torch.tensor([part.vertical for part in parts])
        for name, values in (*self.named_parameters(), *self.named_buffers()):
            values.data = values.data[(by_class if self.is_per_class(name) else by_part).to(values.device)]
        self.vertical_sizes, self.ranges = [len(part) for part in parts], list(ranges)

    def set_prior(self, logit_C: Tensor) -> None:
        """Sets the offsets to these logits (C,): a class's own, or for a vertical the logit of its mean probability."""
        with torch.no_grad():
            if self.config.offset == "class":
                self.offset.copy_(logit_C)
            elif self.config.offset == "vertical":
                means = [logit_V.sigmoid().mean() for logit_V in logit_C.split(self.vertical_sizes)]
                self.offset.copy_(torch.stack(means).logit())

    def gamma_parameters(self) -> list[nn.Parameter]:
        """The parameters that learn at `pace.lr`."""
        return [p for name, p in self.named_parameters() if name in ("gamma", "rho")]

    def _split(self, values: Tensor, per_class: bool) -> Sequence[Tensor]:
        """By vertical: a number, or (V,) where `per_class`."""
        return values.split(self.vertical_sizes) if per_class else values.unbind()


def normalise(logits_BV: Tensor, classes: ClassRange | None = None) -> Tensor:
    """x / sqrt(sum x^2 + N_v * EPSILON), in float32 at least: the L2 normalisation of Equation 3, with a finite slope at x = 0.

    `classes` says which classes of a vertical these are, where they are not all.
    """
    # NOTE: F.normalize clamps the norm instead, so its slope explodes near x = 0.
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    square_B1, size = logits_BV.square().sum(1, keepdim=True), logits_BV.shape[1]
    if classes is not None:
        size = classes.vertical_size
        if classes.sum_over_shards is not None:
            square_B1 = classes.sum_over_shards(square_B1)
    return logits_BV / (square_B1 + size * EPSILON).sqrt()


def lowest_loss_without_offset(vertical_size: int, gamma: float) -> float:
    """The least loss, without an offset, of a vertical in which no class is present: all logits are -gamma/sqrt(N_v)."""
    return vertical_size * math.log1p(math.exp(-gamma / math.sqrt(vertical_size)))
