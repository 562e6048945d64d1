"""Models that were made elsewhere: `ExternalConfig` is the configuration of any of them, `build_external_model` makes it.

To add a kind: a module with a subclass of `ExternalModel` and of `ExternalModelConfig` with a `kind` of its own, a line in each
of the two places below, and a file in `conf/external/`.
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
    """The model's files, those of the map's, and what else decides the answers."""
    given = {
        "external.names": config.names,
        "external.classes": None if config.classes == IDENTITY else Path(config.classes),
    }
    beside = [check_is_file(path, key) for key, path in given.items() if path is not None]
    return (*_MODELS[type(config)].find_files(config), *beside)


def build_external_model(config: ExternalModelConfig) -> ExternalModel:
    """The model that `config` describes, on the CPU.

    NOTE: a callable, and an exported program of torch, is code. It is run because the config names it.

    Raises:
        ConfigError: a file or library is missing, or a size does not fit.
        DataError: a file is damaged, or no model of this kind.
    """
    return _MODELS[type(config)](config)
