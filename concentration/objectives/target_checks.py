"""What must hold of targets before a loss is taken of them: without it, some would give a loss of other samples or classes.

Shapes: B batch, K listed classes of a sample, M verticals, V classes of one vertical.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from concentration.errors import DataError
from concentration.targets import SoftTargets


def check_targets_of_logits(targets: SoftTargets, logits: Sequence[Tensor]) -> None:
    """`check_targets` for logits (B, V) per vertical.

    Raises:
        DataError: the logits have another form, or the targets do not fit them.
    """
    shapes = [tuple(logits_BV.shape) for logits_BV in logits]
    if isinstance(logits, Tensor) or not shapes or any(len(s) != 2 or s[0] != shapes[0][0] for s in shapes):
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"tensors {shapes}"
        raise DataError(f"loss: logits are {found}; expected a list with (samples, classes) for each vertical")
    check_targets(targets, shapes[0][0], sum(size for _, size in shapes), len(shapes))


def check_targets(targets: SoftTargets, num_samples: int, num_classes: int, num_verticals: int) -> None:
    """Whether targets are those of a batch of this form. Values are looked at where that costs nothing: see `has_values_at_hand`.

    Raises:
        DataError: they are not.
    """
    if not isinstance(targets, SoftTargets):
        raise DataError(
            f"loss: targets are a {type(targets).__name__}, expected SoftTargets; SoftTargets.from_labels makes them"
        )
    shape = tuple(targets.index_BK.shape)
    if len(shape) != 2 or shape[0] != num_samples or targets.probability_BK.shape != shape:
        raise DataError(
            f"loss: targets of {shape} classes and {tuple(targets.probability_BK.shape)} probabilities for "
            f"{num_samples} samples; expected (samples, K) for both"
        )
    for name, tensor in (("background", targets.background_BM), ("weight", targets.weight_BM)):
        if tensor is not None and tensor.shape != (num_samples, num_verticals):
            raise DataError(f"loss: targets' {name} {tuple(tensor.shape)}, expected {(num_samples, num_verticals)}")
    if not has_values_at_hand(targets.index_BK) or not targets.index_BK.numel():
        return
    first, last = int(targets.index_BK.min()), int(targets.index_BK.max())
    if first < 0 or last >= num_classes:
        raise DataError(f"loss: targets name classes {first} to {last}; expected 0 to {num_classes - 1}")
    if not (targets.probability_BK.abs() <= 1).all():  # also where it is NaN
        raise DataError("loss: targets hold probabilities outside [0, 1], or NaN; make them again")


def has_values_at_hand(tensor: Tensor) -> bool:
    """Whether values can be read for nothing.

    On a GPU that waits for all work in its queue; fake tensors have no values, those that torch.compile and torch.func trace
    with have none yet.
    """
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # NOTE: there is no public way to ask
