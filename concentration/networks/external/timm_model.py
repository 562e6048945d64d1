"""A classifier of the timm library as an external model, with timm's pretrained weights or those of a file.

Shapes: B batch, O outputs of the model.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import safetensors
import safetensors.torch
from torch import Tensor, nn

from concentration.errors import ConfigError, DataError, one_line
from concentration.files import write_atomically
from concentration.networks.bases.base_network import PerChannel, PerChannelPositive
from concentration.networks.external.class_map import OutputKind
from concentration.networks.external.model import Crop, ExternalModel, ExternalModelConfig, check_is_file
from concentration.schema import suggest


class TimmModelConfig(ExternalModelConfig):
    """A classifier of timm. Options that are None take what timm records for the network."""

    kind: Literal["timm"] = "timm"
    output: OutputKind = "softmax_logits"
    crop: Crop | None = None
    mean: PerChannel | None = None
    std: PerChannelPositive | None = None

    name: str
    """The name of the network in timm, `resnet50` say, or with a set of its weights, `resnet50.a1_in1k`."""

    pretrained: bool = False
    """Whether to take timm's own weights, which are downloaded unless they are in the cache of the Hugging Face hub."""

    checkpoint: Path | None = None
    """A file with the weights of the whole classifier: safetensors, or a state dict as timm's training script writes it."""

    @pydantic.model_validator(mode="after")
    def _check_one_source_of_weights(self) -> Self:
        if not self.pretrained and self.checkpoint is None:
            raise ValueError(
                "'external.checkpoint' is missing: give external.checkpoint=FILE or external.pretrained=true"
            )
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(
                f"external.pretrained=true and external.checkpoint={self.checkpoint} are two sources of weights: give one of them"
            )
        return self


class TimmModel(ExternalModel):
    """The timm network `name` with its classifier."""

    def __init__(self, config: TimmModelConfig):
        import timm  # here, since importing it takes seconds

        self.module = _create_timm(config).eval()
        cfg = timm.data.resolve_model_data_config(self.module)
        found = {"image_size": cfg["input_size"][-1], "crop": cfg["crop_pct"], "mean": cfg["mean"], "std": cfg["std"]}
        self.config = config.model_copy(update={k: v for k, v in found.items() if getattr(config, k) is None})
        subset = timm.data.infer_imagenet_subset(self.module)
        self.names = tuple(timm.data.ImageNetInfo(subset).label_names()) if subset else ()

    @property
    def where(self) -> str:
        return f"external.name={self.config.name}"

    @classmethod
    def find_files(cls, config: TimmModelConfig) -> tuple[Path, ...]:
        return () if config.checkpoint is None else (check_is_file(config.checkpoint, "external.checkpoint"),)

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def save(self, directory: Path) -> ExternalModelConfig:
        """Writes the weights as safetensors, wherever they came from, so that nothing has to be unpickled later."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
        write_atomically(directory / "weights.safetensors", safetensors.torch.save(tensors))
        return self.config.model_copy(update={"pretrained": False, "checkpoint": Path("weights.safetensors")})


def _create_timm(config: TimmModelConfig) -> nn.Module:
    """The network with its weights.

    Raises:
        ConfigError: timm does not have this network or these weights, or the file's weights do not fit it.
        DataError: the file is damaged.
    """
    import timm

    if not timm.is_model(config.name):
        raise ConfigError(
            f"external.name={config.name}: timm has no such network{suggest(config.name, timm.list_models())}"
        )
    try:
        cfg = timm.get_pretrained_cfg(config.name)
    except RuntimeError:
        known = timm.list_pretrained(f"{config.name.split('.')[0]}.*")
        raise ConfigError(
            f"external.name={config.name}: timm has no such weights{suggest(config.name, known)}"
        ) from None
    # NOTE: a vision transformer has to be told its image size when it is built; other networks refuse the argument.
    options: dict[str, Any] = {}
    if cfg.fixed_input_size and config.image_size is not None:
        options["img_size"] = config.image_size
    if config.checkpoint is not None:
        state = _load_timm_state(config)
        options["num_classes"] = _count_timm_outputs(state, cfg.classifier, config)
    try:
        network = timm.create_model(config.name, pretrained=config.pretrained, **options)
        if config.checkpoint is not None:
            network.load_state_dict(state)
    # A failed download raises OSError; the other errors say that an image size or weights do not fit.
    except (OSError, AssertionError, RuntimeError, ValueError) as error:
        origin = "pretrained=true" if config.checkpoint is None else f"checkpoint={config.checkpoint}"
        raise ConfigError(
            f"external.{origin}: cannot be loaded into timm's {config.name} ({type(error).__name__}: {one_line(error)})"
        ) from error
    return network


def _load_timm_state(config: TimmModelConfig) -> dict[str, Tensor]:
    """The weights in `config.checkpoint`. Raises: DataError if it is not a file of weights."""
    import timm.models

    (path,) = TimmModel.find_files(config)
    try:
        return timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, pickle.UnpicklingError,
            safetensors.SafetensorError) as error:  # fmt: skip
        raise DataError(
            f"{path}: damaged, or no file of weights ({one_line(error)}); give safetensors, or a state dict"
        ) from None


def _count_timm_outputs(state: Mapping[str, Tensor], classifier: str | tuple[str, ...], config: TimmModelConfig) -> int:
    """O: the number of rows of the last layer's weight. Raises: DataError if `state` lacks that weight."""
    last = classifier if isinstance(classifier, str) else classifier[0]
    weight = state.get(f"{last}.weight") if isinstance(state, Mapping) else None
    if not isinstance(weight, Tensor) or not weight.ndim:
        raise DataError(
            f"{config.checkpoint}: has no {last}.weight, the classifier of timm's {config.name}; give the weights of that network"
        )
    return len(weight)
