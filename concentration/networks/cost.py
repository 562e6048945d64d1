"""What a network costs: parameters and multiply-adds."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from concentration.networks.external.teacher import ExternalTeacher
from concentration.networks.student import Student


def count_parameters(network: Student | ExternalTeacher) -> dict[str, int | None]:
    """Trained numbers of the base network, of what lies on top of it, and of both; None where they are not known."""
    if isinstance(network, ExternalTeacher):
        return {"base": None, "top": None, "total": network.model.count_parameters()}
    total = sum(parameter.numel() for parameter in network.parameters())
    base = sum(parameter.numel() for parameter in network.base.parameters())
    return {"base": base, "top": total - base, "total": total}


@torch.no_grad()
def count_multiply_adds(network: Student | ExternalTeacher) -> int | None:
    """Multiply-adds of convolutions and matrix products for one image, as torch's counter finds them.

    None where there is no torch module to look into.
    """
    image = torch.zeros(1, 3, network.image_size, network.image_size, device=network.device)
    if isinstance(network, ExternalTeacher):
        return None if network.model.module is None else _count(network, image) // (network.model.batch_size or 1)
    was_training = network.training
    network.eval()  # in training a batch norm refuses a single image, or takes it into its statistics
    found = _count(network, image)
    network.train(was_training)
    return found


def _count(network: Student | ExternalTeacher, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() // 2
