"""Models that were trained elsewhere. `ExternalConfig` configures any of them, and `build_external_model` loads it.

To add a kind, write a module with subclasses of `ExternalModel` and of `ExternalModelConfig` (with a `kind` of its own), add it
to `ExternalConfig` and to `_MODELS` below, and write a file in `conf/external/`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from concentration.networks.external.callable_model import CallableModel, CallableModelConfig
from concentration.networks.external.class_map import IDENTITY
from concentration.networks.external.model import ExternalModel, ExternalModelConfig, check_is_file
from concentration.networks.external.onnx_model import OnnxModel, OnnxModelConfig
from concentration.networks.external.timm_model import TimmModel, TimmModelConfig
from concentration.networks.external.torch_model import TorchModel, TorchModelConfig

__all__ = [
    "CallableModelConfig",
    "ExternalConfig",
    "ExternalModel",
    "OnnxModelConfig",
    "TimmModelConfig",
    "TorchModelConfig",
    "build_external_model",
    "find_external_files",
]

ExternalConfig = Annotated[
    TimmModelConfig | TorchModelConfig | OnnxModelConfig | CallableModelConfig, Field(discriminator="kind")
]

_MODELS: dict[type[ExternalModelConfig], type[ExternalModel]] = {
    TimmModelConfig: TimmModel,
    TorchModelConfig: TorchModel,
    OnnxModelConfig: OnnxModel,
    CallableModelConfig: CallableModel,
}


def find_external_files(config: ExternalModelConfig) -> tuple[Path, ...]:
    """All files that decide the model's answers: its own, and those of the map from outputs to classes.

    Raises:
        ConfigError: a file is missing.
    """
    given = {
        "external.names": config.names,
        "external.classes": None if config.classes == IDENTITY else Path(config.classes),
    }
    beside = [check_is_file(path, key) for key, path in given.items() if path is not None]
    return (*_MODELS[type(config)].find_files(config), *beside)


def build_external_model(config: ExternalModelConfig) -> ExternalModel:
    """Loads the model that `config` describes, on the CPU.

    NOTE: a callable and a program of torch.export are code, which this runs.

    Raises:
        ConfigError: a file or library is missing, or the image size does not fit the model.
        DataError: a file is damaged, or is not a model of this kind.
    """
    return _MODELS[type(config)](config)
