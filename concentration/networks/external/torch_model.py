"""A program that `torch.export.save` wrote as an external model.

Shapes: B batch, O outputs of the model.
"""

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from concentration.errors import DataError, one_line
from concentration.networks.external.model import (
    ExternalModel,
    ExternalModelConfig,
    check_is_file,
    read_shape,
)


class TorchModelConfig(ExternalModelConfig):
    """A program of `torch.export`.

    path: the file that `torch.export.save` wrote.
    """

    kind: Literal["torch"] = "torch"
    path: Path


class TorchModel(ExternalModel):
    """An exported program. It cannot be put into eval mode: it runs in the mode in which it was exported."""

    def __init__(self, config: TorchModelConfig):
        self._program = _load_program(*self.find_files(config))
        self.module = self._program.module()
        inputs = self._program.graph_signature.user_inputs
        if len(inputs) != 1:
            raise DataError(f"{config.path}: takes {len(inputs)} inputs, expected images alone; export it so")
        shape = next(node for node in self._program.graph.nodes if node.name == inputs[0]).meta["val"].shape
        self.batch_size, image_size = read_shape(shape, config)
        self.config = config.model_copy(update={"image_size": image_size})

    @classmethod
    def find_files(cls, config: TorchModelConfig) -> tuple[Path, ...]:
        return (check_is_file(config.path, "external.path"),)

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def to(self, device: torch.device) -> None:
        # `Module.to` would not change the devices of the tensors that the program creates; this pass does.
        if device != self.device:
            self._program = move_to_device_pass(self._program, str(device))
            self.module = self._program.module()
        self.device = device


def _load_program(path: Path) -> ExportedProgram:
    """Loads a program. Raises: DataError if that fails.

    NOTE: its weights are read without unpickling, but the program itself is code.
    """
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # torch would log a traceback before it raises
    try:
        return torch.export.load(path)
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError,
            zipfile.BadZipFile, pickle.UnpicklingError) as error:  # fmt: skip
        raise DataError(
            f"{path}: damaged, or not written by torch.export.save of this torch or an earlier one ({one_line(error)})"
        ) from None
    finally:
        log.setLevel(level)
