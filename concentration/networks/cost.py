"""What a network costs: its parameters and multiply-adds, in total and by layer."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from concentration.networks.external.teacher import ExternalTeacher
from concentration.networks.mixture import Mixture
from concentration.networks.student import NetworkConfig, Student


class LayerCost(NamedTuple):
    """A layer's name in the network, its trained parameters, and its multiply-adds for one image."""

    name: str
    parameters: int
    multiply_adds: int


def count_parameters(network: Student | Mixture | ExternalTeacher) -> dict[str, int | None]:
    """The trained parameters of the base network, of what lies on top of it, and of both; None where not known.

    The base of a mixture is its gater and its experts' bases.
    """
    if isinstance(network, ExternalTeacher):
        return {"base": None, "top": None, "total": network.model.count_parameters()}
    bases = [network.gater, *(e.base for e in network.experts)] if isinstance(network, Mixture) else [network.base]
    total, base = _count_all([network]), _count_all(bases)
    return {"base": base, "top": total - base, "total": total}


@torch.no_grad()
def count_active_parameters(network: Student | Mixture | ExternalTeacher) -> int | None:
    """The trained parameters of the modules that run for one image: in a mixture, the gater and the chosen experts.

    None where there is no torch module to look into.
    """
    if isinstance(network, ExternalTeacher):
        return network.model.count_parameters()
    found: dict[int, int] = {}

    def note(module: nn.Module, *_) -> None:
        found[id(module)] = _count_own_parameters(module)

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    was_training = network.training
    network.eval()
    network(torch.zeros(1, 3, network.image_size, network.image_size, device=network.device))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return sum(found.values())


@torch.no_grad()
def count_multiply_adds(network: Student | Mixture | ExternalTeacher) -> int | None:
    """Multiply-adds of convolutions and matrix products for one image, as torch's counter finds them.

    Of a mixture these are the gater's and the chosen experts'. None where there is no torch module to look into.
    """
    image = torch.zeros(1, 3, network.image_size, network.image_size, device=network.device)
    if isinstance(network, ExternalTeacher):
        if network.model.module is None:
            return None
        return _count(network, image).get_total_flops() // 2 // (network.model.batch_size or 1)
    was_training = network.training
    network.eval()  # in training a batch norm refuses a single image, or takes it into its statistics
    found = _count(network, image).get_total_flops() // 2
    network.train(was_training)
    return found


@torch.no_grad()
def count_by_layer(network: Student) -> list[LayerCost]:
    """The layers in the order of the network; their sums are `count_parameters` and `count_multiply_adds`.

    Stages, modules and blocks of a base network are one layer each. A network of `build_without_weights` will do.
    """
    image = torch.zeros(1, 3, network.image_size, network.image_size, device=network.device)
    was_training = network.training
    network.eval()
    counter = _count(network, image)
    network.train(was_training)
    own_flops = _take_inner_out({name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()})
    merged: dict[str, list[int]] = {}
    for name, module in network.named_modules():
        root = type(network).__name__
        own = (_count_own_parameters(module), own_flops.get(f"{root}.{name}" if name else root, 0) // 2)
        if any(own):
            layer = merged.setdefault(_name_layer(name, network.config.verticals), [0, 0])
            layer[0] += own[0]
            layer[1] += own[1]
    return [LayerCost(name, *numbers) for name, numbers in merged.items()]


def build_without_weights(config: NetworkConfig) -> Student:
    """The network on the meta device: shapes and no memory, whatever its size; nothing is downloaded for it.

    Raises:
        ConfigError: as `build_base`.
    """
    with torch.device("meta"):
        return Student(without_pretrained(config))


def without_pretrained(config: NetworkConfig) -> NetworkConfig:
    """The same architecture, which does not ask for timm's weights."""
    if not getattr(config.base, "pretrained", False):
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"pretrained": False})})


def _count(network: Student | Mixture | ExternalTeacher, image: torch.Tensor) -> FlopCounterMode:
    # NOTE: the counter does not know the CPU's fused attention, and would leave its products out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(image)
    return counter


def _take_inner_out(flops: Mapping[str, int]) -> dict[str, int]:
    """By a module's dotted name, its own work without that of the modules inside it, which the counter includes."""
    own = dict(flops)
    for name, count in flops.items():
        outer = name.rpartition(".")[0]
        while outer and outer not in own:  # a list of modules is never called, so it is not there
            outer = outer.rpartition(".")[0]
        if outer:
            own[outer] -= count
    return own


def _count_all(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _count_own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _name_layer(name: str, verticals: Iterable[str]) -> str:
    """`base.layers.mixed3b` of a convolution in it, `top.classifiers.birds` of the first vertical's."""
    parts = name.split(".")
    if parts[:2] == ["top", "classifiers"]:
        return f"top.classifiers.{list(verticals)[int(parts[2])]}"
    depth = 4 if len(parts) > 3 and parts[3].isdigit() else 3
    return ".".join(parts[:depth])
