"""Runs the network of an export with onnxruntime.

Shapes: B batch, C all classes, T features before the classifiers.
"""

from typing import Literal

import numpy as np

from concentration.errors import ConfigError, DataError, one_line, unloadable
from concentration.serving.export_folder import (
    FEATURES,
    IMAGES,
    LOGITS,
    ONNX_FILES,
    ExportFolder,
    Weights,
    check_content,
)


class Predictor:
    """`predictor(images)` gives the logits (B, C) and features (B, T), float32, of images (B, 3, H, W) uint8.

    Several threads may call it at once.

    Args:
        export: the export.
        weights: which of its ONNX files is run.
        num_threads: how many threads one call uses.
        accelerator: where it runs.

    Raises:
        ConfigError: onnxruntime cannot be loaded, or cannot use a GPU.
        DataError: the ONNX file is missing or damaged, or has another number of classes than the taxonomy.
    """

    def __init__(
        self,
        export: ExportFolder,
        weights: Weights = "float32",
        num_threads: int = 1,
        accelerator: Literal["cpu", "gpu"] = "cpu",
    ):
        self.export = export
        self.image_size = export.preprocessing.image_size
        self._session = _open_session(export, weights, num_threads, accelerator)
        num_outputs = self._session.get_outputs()[0].shape[1]
        if num_outputs != export.taxonomy.num_classes:
            raise DataError(
                f"{export.path}: a network of {num_outputs} classes and a taxonomy of {export.taxonomy.num_classes}; "
                "export again with overwrite=true"
            )

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self._session.run([LOGITS, FEATURES], {IMAGES: images}))


def _open_session(export: ExportFolder, weights: Weights, num_threads: int, accelerator: str):
    try:
        import onnxruntime  # here, so that `--help` does not wait a tenth of a second for it
    except ImportError as error:
        raise unloadable("onnxruntime", error, "onnxruntime") from None
    path = export.path / ONNX_FILES[weights]
    if not path.is_file():
        raise DataError(f"{path}: no such file; export again with overwrite=true")
    for file in sorted(path.parent.glob(f"{path.name}*")):  # large weights lie in a second file
        check_content(file)
    providers = ["CPUExecutionProvider"]
    if accelerator == "gpu":
        providers.insert(0, "CUDAExecutionProvider")
        if providers[0] not in onnxruntime.get_available_providers():
            raise ConfigError(
                "accelerator=gpu: this onnxruntime has no GPU; pip install onnxruntime-gpu, or use accelerator=cpu"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Waiting threads sleep, and leave the cores to the threads of other calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # errors are raised, so they need not be logged, too
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # NOTE: onnxruntime's exceptions have no other base class in common
        raise DataError(
            f"{path}: damaged, or no ONNX model ({one_line(error)}); export again with overwrite=true"
        ) from None
