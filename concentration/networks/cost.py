"""What a network costs: parameters and multiply-adds."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from concentration.networks.student import Student


def count_parameters(student: Student) -> dict[str, int]:
    """Trained numbers of the base network, of what lies on top of it, and of both."""
    total = sum(parameter.numel() for parameter in student.parameters())
    base = sum(parameter.numel() for parameter in student.base.parameters())
    return {"base": base, "top": total - base, "total": total}


@torch.no_grad()
def count_multiply_adds(student: Student) -> int:
    """Multiply-adds of convolutions and matrix products for one image, as torch's counter finds them."""
    size = student.config.image_size
    image = torch.zeros(1, 3, size, size, device=next(student.parameters()).device)
    was_training = student.training
    student.eval()  # in training a batch norm refuses a single image, or takes it into its statistics
    with FlopCounterMode(display=False) as counter:
        student(image)
    student.train(was_training)
    return counter.get_total_flops() // 2
