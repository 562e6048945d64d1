"""A network of an export, run by onnxruntime.

Shapes: B batch, C all classes, T features before the classifiers.
"""

from typing import Literal

import numpy as np

from concentration.errors import ConfigError, DataError, unloadable
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
    """`predictor(images)` gives logits (B, C) and features (B, T), float32, of images (B, 3, H, W) uint8.

    May be called by several threads at once.

    Args:
        num_threads: of one call.

    Raises:
        ConfigError: onnxruntime cannot be loaded, or has no GPU.
        DataError: the program is missing or damaged, or is not that of the taxonomy.
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
        import onnxruntime  # a tenth of a second, which `--help` does not wait for
    except ImportError as error:
        raise unloadable("onnxruntime", error, "onnxruntime") from None
    path = export.path / ONNX_FILES[weights]
    if not path.is_file():
        raise DataError(f"{path}: no such file; export again with overwrite=true")
    for file in sorted(path.parent.glob(f"{path.name}*")):  # large weights lie in one of their own
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
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # waiting threads leave the cores to others
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # NOTE: its errors have no class in common but this
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: damaged, or no ONNX model ({reason}); export again with overwrite=true") from None
