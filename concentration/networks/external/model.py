"""What every external model is: maps images to its outputs; its config, and what the kinds share.

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
    """What all kinds can be told; each adds `kind` and its own options.

    The files that are named here are known by their content: they may be moved.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path", "checkpoint", "classes", "names"})

    classes: str
    """`identity`, or a JSON file: which class each output is. See `class_map.load_class_ids`."""

    names: Path | None = None
    """A text file with the name of each output in a line, for a map that uses names."""

    smear: bool = True
    """An inner class without an output of its own gets those of its descendants."""

    output: OutputKind
    """What the outputs are."""

    image_size: pydantic.PositiveInt | None = None
    """Pixels of the side of the model's input; None where the model itself fixes it."""

    crop: Crop = 1.0
    """The share of the middle square's side that the model sees."""

    mean: PerChannel = (0.0, 0.0, 0.0)
    """Subtracted from images in [0, 1], per channel (red, green, blue)."""

    std: PerChannelPositive = (1.0, 1.0, 1.0)
    """What the difference is then divided by."""


class ExternalModel:
    """The interface: maps normalised float32 images (B, 3, H, W) on `device` to outputs (B, O).

    Attributes:
        config: with everything that the model itself fixes filled in.
        batch_size: the only one that it takes; None where it takes any.
        module: the torch module inside, for counting; None where there is none.
        names: of the outputs, where they are known.
    """

    config: ExternalModelConfig
    batch_size: int | None = None
    module: nn.Module | None = None
    names: tuple[str, ...] = ()
    device = torch.device("cpu")

    @property
    def where(self) -> str:
        """What stands at the start of a message about it."""
        return str(self.config.path)

    @classmethod
    def find_files(cls, config: ExternalModelConfig) -> tuple[Path, ...]:
        """The files that decide its answers, without loading them. Raises: ConfigError where one is missing."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        """Raises: ConfigError where it cannot run there."""
        self.device = device
        if self.module is not None:
            self.module.to(device)

    def count_parameters(self) -> int | None:
        return None if self.module is None else sum(parameter.numel() for parameter in self.module.parameters())

    def save(self, directory: Path) -> ExternalModelConfig:
        """Copies its files into `directory`; gives the config that builds it again from there, with paths relative to it."""
        for path in self.find_files(self.config):
            copy_file(path, directory / path.name)
        return self.config.model_copy(update={"path": Path(self.config.path.name)})


def check_is_file(path: Path, where: str) -> Path:
    if not os.path.isfile(path):  # Path.is_file raises OSError where a name is too long
        raise ConfigError(f"{where}: {str(path)!r}: no such file; bring it, or correct the name")
    return path


def copy_file(path: Path, copy: Path) -> None:
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be copied to {copy} ({error.strerror}); free space or correct permissions"
        ) from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def read_shape(shape: Sequence[object], config: ExternalModelConfig) -> tuple[int | None, int]:
    """The batch and image size of an input (B, 3, H, W) of which some sizes are fixed.

    Raises:
        DataError: it is no such input.
        ConfigError: the image size is neither fixed nor given, or both and different.
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
