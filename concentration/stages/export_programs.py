"""A network as programs that need no code of ours: torch.export's, ONNX, and ONNX with int8 classifiers.

Shapes: B batch, C all classes, V classes of one vertical, S features of its classifier, T features of all.
"""

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from tqdm import tqdm

from concentration.files import replacing, write_atomically
from concentration.networks.classifier import Exportable
from concentration.serving.export_folder import FEATURES, IMAGES, LOGITS

#: One protobuf file holds at most 2 GiB; above this the weights lie in a file beside it, NAME.data.
_MOST_INSIDE_BYTES = 3 * 2**29


class AnsweringNetwork(nn.Module):
    """`answer` as the forward pass: images (B, 3, H, W) uint8 give logits (B, C) and features (B, T)."""

    def __init__(self, network: Exportable):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.answer(images)


def trace_program(network: Exportable, image_size: int) -> torch.export.ExportedProgram:
    """The network's operations, for any batch size."""
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with _quiet():
        return torch.export.export(
            AnsweringNetwork(network).eval(),
            (images,),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )


def save_torch_program(program: torch.export.ExportedProgram, path: Path) -> None:
    # NOTE: not to the file, where a disk that is full aborts the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_atomically(path, buffer.getbuffer())


def translate_to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """The same operations in ONNX."""
    with _quiet():
        exported = torch.onnx.export(
            program, input_names=[IMAGES], output_names=[LOGITS, FEATURES], dynamo=True, verbose=False, optimize=False
        )
        # NOTE: torch's own `optimize` looks for patterns among all pairs of nodes, minutes at 500 verticals; what it fuses
        # beside this is fused by onnxruntime, too.
        onnxscript.optimizer.fold_constants(exported.model)
        onnxscript.optimizer.remove_unused_nodes(exported.model)
    return exported.model_proto


def quantise_classifiers(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Replaces the weights (V, S) with these names by int8 and a scale per class; the computation is written in float32.

    The largest weight of a class becomes 127, so that each is off by at most half a step, 0.4 % of the largest. onnxruntime
    rounds the other factor to int8, too, unless `session.qdq_matmulnbits_accuracy_level` is 1: 11 to 800 times slower.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = {node.input[1]: place for place, node in enumerate(graph.node) if node.op_type == "Gemm"}
    nodes = {place: [node] for place, node in enumerate(graph.node)}
    for name in names:
        weight_VS = numpy_helper.to_array(weights[name])
        scale_V = np.maximum(np.abs(weight_VS).max(axis=1), np.finfo(np.float32).tiny).astype(np.float32) / 127
        int8_SV = np.ascontiguousarray(np.rint(weight_VS / scale_V[:, None]).astype(np.int8).T)
        graph.initializer.remove(weights[name])
        tensors = {f"{name}.int8": int8_SV, f"{name}.scale": scale_V}
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in tensors.items())
        nodes[products[name]] = _multiply_int8(graph.node[products[name]], name)
    ordered = [node for place in sorted(nodes) for node in nodes[place]]
    del graph.node[:]
    graph.node.extend(ordered)


def _multiply_int8(product: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """What stands for `Gemm(x, W transposed, bias)`.

    NOTE: the weights lie as (S, V), since onnxruntime fuses `DequantizeLinear` with `MatMul` only so: one image of 20,000 classes
    took 1.3 ms, and 23 ms with `Gemm` and (V, S); float32 takes 7.6 ms.
    """
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in product.attribute}
    assert attributes.get("transB") == 1, f"{product.name}: a Linear layer is exported with its weight as (V, S)"
    assert {attributes.get(key, 1.0) for key in ("alpha", "beta")} == {1.0}, f"{product.name}: scaled"
    inputs, bias, output = product.input[0], product.input[2:], product.output[0]
    result = f"{output}.product" if bias else output
    transposed = f"{name}.transposed"  # the model may know a shape of `name`
    nodes = [
        helper.make_node(
            "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [transposed], f"{name}.dequantise", axis=1
        ),
        helper.make_node("MatMul", [inputs, transposed], [result], f"{name}.multiply"),
    ]
    return [*nodes, helper.make_node("Add", [result, bias[0]], [output], f"{name}.add")] if bias else nodes


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Writes it; weights above 1.5 GiB lie in a file beside it."""
    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with replacing(path) as temporary:
        if weights_bytes > _MOST_INSIDE_BYTES:
            data = f"{path.name}.data"
            (path.parent / data).unlink(missing_ok=True)  # onnx appends
            onnx.save_model(model, temporary, save_as_external_data=True, location=data)
        else:
            onnx.save_model(model, temporary)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' messages; their errors are still raised."""
    # NOTE: the bar that torch hides would make a lock between processes, which a run's jobs, ending at once, leave behind.
    tqdm.set_lock(threading.RLock())
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(earlier)
