"""What a network is to those who only ask it: `evaluate`, `targets` and the report's pictures.

Shapes: B batch, V outputs.
"""

from typing import Protocol, Self

import torch
from torch import Tensor


class Classifier(Protocol):
    """`classifier(images)` gives logits (B, V) float32 of images (B, 3, H, W), uint8 or float in [0, 1], on its device.

    Our own networks (`Student`) and the user's own teachers (`ExternalTeacher`) are these.
    """

    @property
    def image_size(self) -> int:
        """Pixels of the side of the square images that it is given."""

    @property
    def num_outputs(self) -> int:
        """V."""

    @property
    def device(self) -> torch.device:
        """Where its images should be."""

    def to(self, device: torch.device) -> Self:
        """Moves it, and returns it."""

    def __call__(self, images: Tensor) -> Tensor: ...
