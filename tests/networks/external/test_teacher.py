"""Exported programs, ONNX models and functions as teachers: batches, sizes, devices' formats, and what is refused."""

import contextlib

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from torch import nn

from concentration.errors import ConfigError, DataError
from concentration.networks.cost import count_multiply_adds, count_parameters
from concentration.networks.external import CallableModelConfig, OnnxModelConfig, TorchModelConfig, find_external_files
from concentration.networks.external.teacher import load_external_teacher, take_over

SIZE = 4
WEIGHT = np.random.default_rng(0).normal(0, 0.3, (3 * SIZE * SIZE, 5)).astype(np.float32)
IMAGES = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (7, 3, SIZE, SIZE), dtype=np.uint8))
EXPECTED = ((IMAGES.flatten(1) / 255) @ torch.from_numpy(WEIGHT)).softmax(1)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(WEIGHT))

    def forward(self, images):
        return images.flatten(1) @ self.weight


def write_onnx(
    path, shape=("batch", 3, SIZE, SIZE), element=onnx.TensorProto.FLOAT, inputs=("images",), outputs=("logits",)
):
    """A flattened image times a matrix; more inputs and outputs than one are the same again."""
    helper = onnx.helper
    numpy_type = helper.tensor_dtype_to_np_dtype(element)
    weight = onnx.numpy_helper.from_array(WEIGHT.astype(numpy_type), "weight")
    nodes = [helper.make_node("Flatten", [inputs[0]], ["flat"])]
    nodes += [helper.make_node("MatMul", ["flat", "weight"], [name]) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, element, shape) for name in inputs],
        [helper.make_tensor_value_info(name, element, (shape[0], 5)) for name in outputs],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def write_program(path, module: nn.Module, *images, **options):
    torch.export.save(torch.export.export(module, images, **options), path)
    return path


def take_onnx(path, taxonomy, **values):
    given = {"classes": "identity", "output": "softmax_logits", **values}
    return take_over(OnnxModelConfig(path=path, **given), taxonomy, "birds")


def take_program(path, taxonomy, **values):
    given = {"classes": "identity", "output": "softmax_logits", **values}
    return take_over(TorchModelConfig(path=path, **given), taxonomy, "birds")


def take_function(taxonomy, tmp_path, monkeypatch, body, name="mine", **values):
    """A module whose `build` has this body."""
    (tmp_path / f"{name}.py").write_text(f"import torch\n\n\ndef build():\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = {"classes": "identity", "output": "sigmoid_logits", "image_size": SIZE, **values}
    return take_over(CallableModelConfig(function=f"{name}:build", **given), taxonomy, "birds")


@pytest.mark.parametrize("batch", ["batch", None, 1, 3, 7, 20])
def test_an_onnx_model_of_any_batch_size_answers_for_each_image(taxonomy, tmp_path, batch):
    teacher = take_onnx(write_onnx(tmp_path / "linear.onnx", shape=(batch, 3, SIZE, SIZE)), taxonomy)
    for num_images in (1, 2, 7):
        found = teacher(IMAGES[:num_images]).sigmoid()
        np.testing.assert_allclose(found, EXPECTED[:num_images], atol=1e-6)
    assert teacher.image_size == SIZE
    assert count_parameters(teacher) == {"base": None, "top": None, "total": WEIGHT.size}
    assert count_multiply_adds(teacher) is None


@pytest.mark.parametrize(("element", "atol"), [(onnx.TensorProto.FLOAT16, 2e-3), (onnx.TensorProto.DOUBLE, 1e-6)])
def test_an_onnx_model_may_compute_in_another_precision(taxonomy, tmp_path, element, atol):
    teacher = take_onnx(write_onnx(tmp_path / "linear.onnx", element=element), taxonomy)
    np.testing.assert_allclose(teacher(IMAGES).sigmoid(), EXPECTED, atol=atol)


def test_an_onnx_model_without_a_size_needs_one(taxonomy, tmp_path):
    path = write_onnx(tmp_path / "linear.onnx", shape=("batch", 3, "height", "width"))
    with pytest.raises(ConfigError, match=r"linear\.onnx: takes images of any size; give external\.image_size=PIXELS"):
        take_onnx(path, taxonomy)
    assert take_onnx(path, taxonomy, image_size=SIZE).image_size == SIZE
    with pytest.raises(DataError, match=r"linear\.onnx: does not take the images"):
        take_onnx(path, taxonomy, image_size=SIZE + 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"inputs": ("images", "mask")}, r"2 inputs and 1 outputs \(images, mask, logits\), expected one of each"),
        ({"outputs": ("logits", "features")}, "1 inputs and 2 outputs"),
        ({"element": onnx.TensorProto.INT32}, r"takes tensor\(int32\), expected images as floats"),
        ({"shape": ("batch", SIZE, SIZE, 3)}, r"takes an input of the shape \('batch', '4', '4', '3'\)"),
        ({"shape": ("batch", 3, 8, 2)}, "takes an input of the shape"),
        ({"shape": ("batch", 48)}, "takes an input of the shape"),
    ],
)
def test_an_onnx_model_of_another_form_is_refused(taxonomy, tmp_path, options, expected):
    with pytest.raises(DataError, match=expected):
        take_onnx(write_onnx(tmp_path / "linear.onnx", **options), taxonomy)


def test_an_onnx_model_reads_no_file_outside_its_folder(taxonomy, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    model = onnx.load(write_onnx(tmp_path / "inner/linear.onnx"))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    place = weight.external_data.add()
    place.key, place.value = "location", "../secret"
    (tmp_path / "inner/linear.onnx").write_bytes(model.SerializeToString())
    config = OnnxModelConfig(path=tmp_path / "inner/linear.onnx", classes="identity", output="softmax_logits")
    with pytest.raises(DataError, match=r"has weights in \.\./secret, expected a file in the same folder"):
        find_external_files(config)
    with pytest.raises(DataError, match=r"linear\.onnx"):
        take_over(config, taxonomy, "birds")


@pytest.mark.parametrize("batch", ["any", 1, 3])
def test_an_exported_program_answers_for_each_image(taxonomy, tmp_path, batch):
    shapes = {"images": {0: torch.export.Dim("batch")}} if batch == "any" else None
    images = torch.rand(2 if batch == "any" else batch, 3, SIZE, SIZE)
    path = write_program(tmp_path / "linear.pt2", Linear(), images, dynamic_shapes=shapes)
    teacher = take_program(path, taxonomy)
    np.testing.assert_allclose(teacher(IMAGES).sigmoid(), EXPECTED, atol=1e-6)
    assert count_parameters(teacher)["total"] == WEIGHT.size
    assert count_multiply_adds(teacher) == WEIGHT.size


class Dropped(Linear):
    def forward(self, images):
        return nn.functional.dropout(super().forward(images), 0.5)


class Mixed(Linear):
    def forward(self, images):
        logits = super().forward(images)
        return logits - logits.mean(0)


class Masked(Linear):
    def forward(self, images, mask):
        return super().forward(images) * mask


class Pair(Linear):
    def forward(self, images):
        return super().forward(images), images.mean((1, 2, 3))


@pytest.mark.parametrize("module", [Dropped(), Mixed()])
def test_a_model_in_training_mode_is_refused(taxonomy, tmp_path, module):
    path = write_program(tmp_path / "linear.pt2", module, torch.rand(3, 3, SIZE, SIZE))
    with pytest.raises(
        DataError, match=r"changes with the images beside it, or from call to call; put it into eval mode"
    ):
        take_program(path, taxonomy)


def test_an_exported_program_of_another_form_is_refused(taxonomy, tmp_path):
    images = torch.rand(3, 3, SIZE, SIZE)
    path = write_program(tmp_path / "masked.pt2", Masked(), images, torch.ones(3, 1))
    with pytest.raises(DataError, match=r"masked\.pt2: takes 2 inputs, expected images alone"):
        take_program(path, taxonomy)
    path = write_program(tmp_path / "pair.pt2", Pair(), images)
    with pytest.raises(DataError, match=r"pair\.pt2: gives tuple for 3 images, expected a tensor \(3, outputs\)"):
        take_program(path, taxonomy)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_program_is_one_clear_error(taxonomy, tmp_path):
    """Bytes change anywhere in the file: another model, or one line; torch's own errors are of many kinds."""
    path = write_program(tmp_path / "linear.pt2", Linear(), torch.rand(3, 3, SIZE, SIZE))
    content, generator = path.read_bytes(), np.random.default_rng(2)
    refused = 0
    for _ in range(40):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            take_program(path, taxonomy)
            refused -= 1
        refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return lambda images: images.sum()", r"gives \(\) for 3 images, expected a tensor \(3, outputs\)"),
        ("return lambda images: images.numpy()", "gives ndarray for 3 images"),
        ("return lambda images: images[:2].flatten(1)", r"gives \(2, 48\) for 3 images"),
        ("return torch.nn.Linear(3, 5)", r"does not take images \(3, 3, 4, 4\) \(RuntimeError"),
        ("return lambda images: images / {}['depth']", r"does not take images \(3, 3, 4, 4\) \(KeyError: 'depth'\)"),
        ("return lambda images: images.flatten(1)[:, :0]", r"gives \(3, 0\) for 3 images"),
        ("return lambda images: images.mean((2, 3)) / 0", "gives NaN or infinity"),
        ("return lambda images: images.mean((2, 3))", "the model has 3 outputs, the vertical 'birds' 5 classes"),
        ("return lambda images: torch.rand(len(images), 5)", "changes with the images beside it, or from call to call"),
    ],
)
def test_what_is_no_classifier_is_refused(taxonomy, tmp_path, monkeypatch, body, expected, request):
    name = f"mine_{abs(hash(request.node.name))}"
    with pytest.raises((DataError, ConfigError), match=expected):
        take_function(taxonomy, tmp_path, monkeypatch, body, name)


def test_a_module_of_ones_own_is_put_into_eval_mode_and_counted(taxonomy, tmp_path, monkeypatch):
    body = "return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5), torch.nn.BatchNorm1d(5)).train()"
    teacher = take_function(taxonomy, tmp_path, monkeypatch, body, "module_of_mine")
    # In training mode the other images of the batch would change the answer by much more than rounding.
    torch.testing.assert_close(teacher(IMAGES)[:2], teacher(IMAGES[:2]), rtol=1e-5, atol=1e-5)
    assert count_parameters(teacher)["total"] == 48 * 5 + 5 + 10
    assert count_multiply_adds(teacher) == 48 * 5


def test_images_are_cut_out_of_the_middle_and_normalised(taxonomy, tmp_path, monkeypatch):
    body = "return lambda images: images.flatten(1)[:, [0, 15, 16, 31, 47]]"
    options = {"crop": 0.5, "mean": (0.5, 0.25, 0.0), "std": (0.5, 1.0, 2.0)}
    teacher = take_function(taxonomy, tmp_path, monkeypatch, body, "middle", **options)
    assert teacher.image_size == 2 * SIZE
    images = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
    middle = images[:, :, 2:6, 2:6]
    expected = torch.stack(
        [(middle[:, 0, 0, 0] - 0.5) / 0.5, (middle[:, 0, 3, 3] - 0.5) / 0.5, middle[:, 1, 0, 0] - 0.25,
         middle[:, 1, 3, 3] - 0.25, middle[:, 2, 3, 3] / 2], dim=1
    )  # fmt: skip
    np.testing.assert_allclose(teacher(images), expected, atol=1e-6)
    in_bytes = (images * 255).byte()
    assert torch.equal(teacher(in_bytes), teacher(in_bytes.float() / 255))


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_images_of_another_size_are_refused(taxonomy, tmp_path, size):
    teacher = take_onnx(write_onnx(tmp_path / "linear.onnx"), taxonomy)
    with pytest.raises(ConfigError, match=f"looks at images of 4 pixels, and is given {size}; give data.image_size=4"):
        teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8))


def test_a_teacher_that_fails_later_says_so(taxonomy, tmp_path, monkeypatch):
    """On the images that it was tried with it answered."""
    body = "return lambda images: images.flatten(1)[:, :5] / (images.flatten(1).max(1, keepdim=True).values > 0)"
    teacher = take_function(taxonomy, tmp_path, monkeypatch, body, "black")
    with pytest.raises(DataError, match=r"external\.function=black:build: gives NaN or infinity"):
        teacher(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))


def test_names_of_outputs_come_from_a_file_of_lines(taxonomy, tmp_path):
    path = write_onnx(tmp_path / "linear.onnx")
    (tmp_path / "map.json").write_text('{"Möwe": "gull"}')
    (tmp_path / "names.txt").write_text("a\nb\nMöwe\nd\ne\n", encoding="utf-8")
    teacher = take_onnx(path, taxonomy, classes=str(tmp_path / "map.json"), names=tmp_path / "names.txt")
    assert teacher.class_ids == (None, None, "gull", None, None)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"names\.txt: 2 lines, but the model has 5 outputs"):
        take_onnx(path, taxonomy, classes=str(tmp_path / "map.json"), names=tmp_path / "names.txt")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"taxonomy": 1, "class_ids": [], "model": {"kind": "pickle"}}', "[" * 100_000]
)
def test_a_description_that_is_not_what_was_written_is_refused(taxonomy, tmp_path, content):
    (tmp_path / "external.json").write_text(content)
    with pytest.raises(DataError, match=r"external\.json: (damaged|not JSON)"):
        load_external_teacher(tmp_path, taxonomy.restrict("birds"))


def test_a_teacher_of_another_vertical_is_refused(taxonomy, tmp_path):
    teacher = take_onnx(write_onnx(tmp_path / "linear.onnx"), taxonomy)
    teacher.save(tmp_path)
    with pytest.raises(DataError, match=r"external\.json: made for another taxonomy"):
        load_external_teacher(tmp_path, taxonomy.restrict("cars"))
    again = load_external_teacher(tmp_path, taxonomy.restrict("birds"))
    assert torch.equal(again(IMAGES), teacher(IMAGES))
