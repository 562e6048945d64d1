"""An ONNX model as an external model, run by onnxruntime.

Shapes: B batch, O outputs of the model.
"""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from concentration.errors import ConfigError, DataError, one_line
from concentration.networks.external.model import (
    ExternalModel,
    ExternalModelConfig,
    check_is_file,
    read_shape,
)


class OnnxModelConfig(ExternalModelConfig):
    """An ONNX model.

    path: its file; its weights may be inside, or in files of the same folder.
    """

    kind: Literal["onnx"] = "onnx"
    path: Path


class OnnxModel(ExternalModel):
    """An ONNX model that onnxruntime runs, on the CPU or with CUDA."""

    def __init__(self, config: OnnxModelConfig):
        self.config = config
        onnxruntime = _import_onnx("onnxruntime")
        self._num_parameters = _count_initialisers(config.path)
        self._start(onnxruntime, ["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            names = ", ".join(value.name for value in (*inputs, *outputs))
            raise DataError(
                f"{config.path}: has {len(inputs)} inputs and {len(outputs)} outputs ({names}), expected one of each: "
                "images, and a number per class; export the classifier alone"
            )
        types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}
        if inputs[0].type not in types:
            raise DataError(f"{config.path}: takes {inputs[0].type}, expected images as floats; export it so")
        self._input, self._type = inputs[0].name, types[inputs[0].type]
        self.batch_size, image_size = read_shape(inputs[0].shape, config)
        self.config = config.model_copy(update={"image_size": image_size})

    @classmethod
    def find_files(cls, config: OnnxModelConfig) -> tuple[Path, ...]:
        path = check_is_file(config.path, "external.path")
        return (path, *(check_is_file(path.parent / name, str(path)) for name in _list_files_beside(path)))

    def __call__(self, images: Tensor) -> Tensor:
        try:
            (outputs,) = self._session.run(None, {self._input: images.to(self._type).cpu().numpy()})
        except _onnx_errors() as error:
            raise DataError(f"{self.config.path}: does not take the images ({one_line(error)})") from None
        return torch.from_numpy(outputs).to(self.device)

    def to(self, device: torch.device) -> None:
        onnxruntime = _import_onnx("onnxruntime")
        if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ConfigError(
                f"{self.config.path}: a GPU is asked for, but this onnxruntime has none; install onnxruntime-gpu, or use the CPU"
            )
        if device.type != self.device.type:
            self._start(onnxruntime, ["CUDAExecutionProvider", "CPUExecutionProvider"])
        self.device = device

    def count_parameters(self) -> int:
        return self._num_parameters

    def _start(self, onnxruntime: ModuleType, providers: list[str]) -> None:
        """Opens a session with these execution providers."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, so they need not be logged, too
        try:
            self._session = onnxruntime.InferenceSession(self.config.path, options, providers=providers)
        except _onnx_errors() as error:
            raise DataError(f"{self.config.path}: damaged, or no ONNX model ({one_line(error)})") from None


def _import_onnx(name: str) -> ModuleType:
    """The package `onnx` or `onnxruntime`. Raises: ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"external=onnx needs the package {name}, which is not installed; pip install onnx onnxruntime"
        ) from None


def _onnx_errors() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which have no base class of their own in common."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def _load_onnx_graph(path: Path) -> Any:
    """The graph of an ONNX model, without weights that are stored in other files."""
    onnx = _import_onnx("onnx")
    message = importlib.import_module("google.protobuf.message")
    try:
        return onnx.load(path, load_external_data=False).graph
    except message.DecodeError as error:
        raise DataError(f"{path}: damaged, or no ONNX model ({one_line(error)})") from None


def _list_files_beside(path: Path) -> list[str]:
    """The names of the files in which an ONNX model stores weights; they must be in the same folder."""
    places = (place for tensor in _load_onnx_graph(path).initializer for place in tensor.external_data)
    names = sorted({place.value for place in places if place.key == "location"})
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{path}: has weights in {name}, expected a file in the same folder; export it so")
    return names


def _count_initialisers(path: Path) -> int:
    """How many numbers the initialisers of an ONNX model hold. Integers of 32 and 64 bits do not count: they are no weights."""
    TensorProto = _import_onnx("onnx").TensorProto
    sizes_and_places = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
    weights = [t for t in _load_onnx_graph(path).initializer if t.data_type not in sizes_and_places]
    return sum(math.prod(tensor.dims) for tensor in weights)
