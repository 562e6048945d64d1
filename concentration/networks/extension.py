"""Extending a trained network: new verticals get blocks and classifiers of their own, old verticals get more classes.

Classes are only ever appended to their vertical, and new verticals to the others. So along its first axis every parameter of the
old network is the beginning of the new one's; except in a pace by class, where the verticals lie one after the other.

Shapes: C all classes of the new network.
"""

import itertools
from collections.abc import Iterator, Mapping
from types import EllipsisType

import torch
from torch import Tensor, nn

from concentration.errors import ConfigError
from concentration.networks.student import Student


def extend_student(old: Student, verticals: Mapping[str, int], frequency_C: Tensor, seed: int) -> Student:
    """A network that answers for the old classes as `old` does, and for the new ones with their frequency.

    Args:
        old: a trained network.
        verticals: the sizes of all verticals; the old ones come first, and none is smaller than before.
        frequency_C: the frequency of each class of the new network, at which its new outputs start.
        seed: the seed of the new blocks.

    Raises:
        ConfigError: a vertical is missing, smaller or in another place; or the loss is a softmax, in which new classes would
            change the probabilities of the old.
    """
    check_extension(old, verticals)
    torch.manual_seed(seed)
    new = Student(old.config.model_copy(update={"verticals": dict(verticals)}))
    new.set_prior(frequency_C)
    with torch.no_grad():
        for classify, was in zip(new.top.classifiers, old.top.classifiers, strict=False):
            # A class that says nothing leaves the norm of its vertical, and so what the others say, as it was.
            classify.weight.zero_()
            if was.out_features < classify.out_features and new.config.pace.kind != "none":
                classify.bias.zero_()
        own = new.state_dict()
        for name, tensor in old.state_dict().items():
            own[name][_place(name, tensor, old, new)] = tensor
    return new


def hold_old_parameters(old: Student, new: Student) -> None:
    """Freezes all that `new`, made by `extend_student`, has from `old`: the gradients of those parameters become 0.

    The logits of a vertical that has got more classes change all the same, as its norm is over old and new logits. Batch norms
    keep their statistics in training; those of a new block are mean 0 and variance 1, and its scale and shift are trained.
    """
    for module in new.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module  # so that `student.train()` leaves it in eval mode
    was = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in was:
            is_new = torch.ones_like(parameter)
            is_new[_place(name, was[name], old, new)] = 0
            parameter.register_hook(lambda gradient, is_new=is_new: gradient * is_new.to(gradient.device))


def check_extension(old: Student, verticals: Mapping[str, int]) -> None:
    """Raises: ConfigError where `extend_student` would, before any work is done."""
    before = old.config.verticals
    if list(verticals)[: len(before)] != list(before):
        raise ConfigError(
            f"the network has the verticals {', '.join(before)}, and is to have {', '.join(verticals)}: verticals may only be "
            "added behind the others; train it anew"
        )
    for vertical, size in before.items():
        if verticals[vertical] < size:
            raise ConfigError(
                f"the network has {size} classes in {vertical}, and is to have {verticals[vertical]}: classes may only be added"
            )
    if old.augmentations:
        raise ConfigError(
            "a network that was grown by auxiliary heads cannot be extended; take the one it was grown from"
        )
    if old.config.loss == "softmax" and dict(verticals) != before:
        raise ConfigError(
            "a network with loss=softmax cannot be extended: its classes exclude each other, so new ones change the old; "
            "train one anew, with loss=sigmoid if more are to come"
        )


def _place(name: str, tensor: Tensor, old: Student, new: Student) -> Tensor | slice | EllipsisType:
    """Where a parameter of the old network lies in the new one's."""
    if tensor.dim() == 0:
        return ...
    part, _, own_name = name.partition(".")
    if part == "pace" and (new.pace.is_per_class("offset" if own_name == "offset" else "gamma")):
        return torch.tensor(list(_find_outputs(old.config.verticals, new.config.verticals)))
    return slice(len(tensor))


def _find_outputs(before: Mapping[str, int], now: Mapping[str, int]) -> Iterator[int]:
    """The outputs of the old classes in the new network."""
    starts = dict(zip(now, itertools.accumulate(now.values(), initial=0), strict=False))
    for vertical, size in before.items():
        yield from range(starts[vertical], starts[vertical] + size)
