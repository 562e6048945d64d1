"""The interface of external models, the part of the configuration that all kinds share, and helpers of the kinds.

Shapes: B batch, O outputs of the model.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from concentration.errors import ConfigError, DataError
from concentration.networks.bases.base_network import PerChannel, PerChannelPositive
from concentration.networks.external.class_map import OutputKind
from concentration.schema import Config

Crop = Annotated[float, pydantic.Field(gt=0, le=1)]


class ExternalModelConfig(Config):
    """The options of all kinds of external models; each kind adds `kind` and options of its own.

    Files that are named here are identified by their content, so they may be moved.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path", "checkpoint", "classes", "names"})

    classes: str
    """Which class each output is: `identity`, or a JSON file (see `class_map.load_class_ids`)."""

    names: Path | None = None
    """A text file with the name of each output on a line of its own, for a map that uses names."""

    smear: bool = True
    """Whether an inner class without an output of its own gets the outputs of its descendants."""

    output: OutputKind
    """What the outputs are: logits or probabilities, of a softmax or of sigmoids."""

    image_size: pydantic.PositiveInt | None = None
    """The side of the model's input in pixels; None if the model itself fixes it."""

    crop: Crop = 1.0
    """The model sees the middle of the largest square: this is its side as a share of the square's."""

    mean: PerChannel = (0.0, 0.0, 0.0)
    """The value of each channel (red, green, blue) that is subtracted from images in [0, 1]."""

    std: PerChannelPositive = (1.0, 1.0, 1.0)
    """The value of each channel by which the difference is divided."""


class ExternalModel:
    """The interface of external models: `model(images)` gives the outputs (B, O) for normalised float32 images (B, 3, H, W).

    Attributes:
        config: the configuration, with everything filled in that the model itself fixes.
        batch_size: the only batch size that the model takes; None if it takes any.
        module: the torch module of the model; None if it has none.
        names: (O,) the names of the outputs; empty if they are not known.
        device: the device that images are given on, and outputs come on.
    """

    config: ExternalModelConfig
    batch_size: int | None = None
    module: nn.Module | None = None
    names: tuple[str, ...] = ()
    device = torch.device("cpu")

    @property
    def where(self) -> str:
        """What errors call the model."""
        return str(self.config.path)

    @classmethod
    def find_files(cls, config: ExternalModelConfig) -> tuple[Path, ...]:
        """The files that decide the model's answers; they are not loaded. Raises: ConfigError if one is missing."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        """Moves the model. Raises: ConfigError if it cannot run on this device."""
        self.device = device
        if self.module is not None:
            self.module.to(device)

    def count_parameters(self) -> int | None:
        """The number of parameters; None if it is not known."""
        return None if self.module is None else sum(parameter.numel() for parameter in self.module.parameters())

    def save(self, directory: Path) -> ExternalModelConfig:
        """Copies the model's files into `directory`.

        Returns:
            The configuration that builds the model from the copies; its paths are relative to `directory`.
        """
        for path in self.find_files(self.config):
            copy_file(path, directory / path.name)
        return self.config.model_copy(update={"path": Path(self.config.path.name)})


def check_is_file(path: Path, where: str) -> Path:
    """The same path. Raises: ConfigError if there is no such file; `where` is the option that names it."""
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise ConfigError(f"{where}: {str(path)!r}: no such file; bring it, or correct the name")
    return path


def copy_file(path: Path, copy: Path) -> None:
    """Copies a file. Raises: DataError if that fails."""
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be copied to {copy} ({error.strerror}); free space or correct permissions"
        ) from None


def read_shape(shape: Sequence[object], config: ExternalModelConfig) -> tuple[int | None, int]:
    """The batch size (None if any) and the image size of a model, from the shape of its input.

    Args:
        shape: the shape of the input; what is not a positive number stands for any size.
        config: the configuration, which may give the image size.

    Raises:
        DataError: the input is not (B, 3, H, H).
        ConfigError: the image size is neither fixed nor configured, or is configured and differs from the fixed one.
    """
    fixed = [size if isinstance(size, int) and size > 0 else None for size in shape]
    if len(fixed) != 4 or fixed[1] not in (3, None) or fixed[2] != fixed[3]:
        raise DataError(
            f"{config.path}: takes an input of the shape {tuple(str(size) for size in shape)}, expected images (B, 3, H, H); "
            "export it so"
        )
    image_size = fixed[2] if config.image_size is None else config.image_size
    if image_size is None:
        raise ConfigError(f"{config.path}: takes images of any size; give external.image_size=PIXELS")
    if fixed[2] not in (None, image_size):
        raise ConfigError(
            f"external.image_size={image_size}: {config.path} takes images of {fixed[2]} pixels alone; leave it out"
        )
    return fixed[0], image_size
