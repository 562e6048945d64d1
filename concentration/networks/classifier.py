"""What a network is to those who only ask it: `evaluate`, `targets`, `export` and the report's pictures.

Shapes: B batch, V outputs, T features.
"""

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

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


@runtime_checkable
class Exportable(Protocol):
    """A `Classifier` that is a torch module and can be exported as a program."""

    classifier_weights: Sequence[str]
    """The names of the parameters (classes, features) that give the logits: most of a large head's numbers."""

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, V), those of a call, and features (B, T) in which near images are alike: float32."""
