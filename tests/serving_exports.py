"""An export that is written by hand in milliseconds: it compares an image of fruit or tools with the pattern of each class."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from real_runs import IMAGE_SIZE, taxonomy_of_fruit_and_tools

from concentration.serving.export_folder import PREPROCESSING_FILE, TAXONOMY_FILE, Preprocessing
from concentration.taxonomy import Taxonomy

#: Squared distance at which a class has probability 1/2: `draw_image`'s noise is half of it, another pattern three times it.
_HALF, _SLOPE = 85.0, 0.1


def write_export(folder: Path) -> Path:
    """Logits fall with the squared distance of the image from a class's pattern; features are the image itself."""
    folder.mkdir(parents=True)
    taxonomy = Taxonomy.from_json(taxonomy_of_fruit_and_tools())
    (folder / TAXONOMY_FILE).write_text(json.dumps(taxonomy.to_json()))
    preprocessing = Preprocessing(image_size=IMAGE_SIZE).model_dump(mode="json")
    (folder / PREPROCESSING_FILE).write_text(json.dumps(preprocessing))
    patterns = [_draw_pattern(taxonomy.class_of_output(output).id) for output in range(taxonomy.num_classes)]
    onnx.save(_build_model(np.stack(patterns).astype(np.float32)), folder / "model.onnx")
    return folder


def _draw_pattern(label: str) -> np.ndarray:
    """As `draw_image` has it, without noise: (D,) in [0, 1]."""
    pattern = np.random.default_rng(sum(label.encode())).integers(0, 256, (4, 4, 3))
    return pattern.repeat(4, 0).repeat(4, 1).transpose(2, 0, 1).reshape(-1) / 255


def _build_model(pattern_CD: np.ndarray) -> onnx.ModelProto:
    # -|x - p|^2 = 2 x.p - |p|^2 - |x|^2
    constants = {
        "255": np.float32(255),
        "two_patterns": np.ascontiguousarray(2 * pattern_CD.T),
        "bias": (_HALF - (pattern_CD**2).sum(1)).astype(np.float32),
        "axes": np.array([1]),
        "slope": np.float32(_SLOPE),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Div", ["flat", "255"], ["features"]),
        helper.make_node("MatMul", ["features", "two_patterns"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["compared"]),
        helper.make_node("ReduceSumSquare", ["features", "axes"], ["square"]),
        helper.make_node("Sub", ["compared", "square"], ["near"]),
        helper.make_node("Mul", ["near", "slope"], ["logits"]),
    ]
    shape = ["batch", 3, IMAGE_SIZE, IMAGE_SIZE]
    graph = helper.make_graph(
        nodes,
        "patterns",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(pattern_CD)]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", pattern_CD.shape[1]]),
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
