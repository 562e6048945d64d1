"""`concentrate teacher external=...`: a model that was made elsewhere is evaluated and used as one that was trained here."""

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from real_runs import TINY, concentrate, load_json, one_line, prepare_shards, run_command, taxonomy_of_fruit_and_tools

from concentration.networks.student import load_student

VERTICALS = ("fruit", "tools")
CLASSES = {v: [c["id"] for c in taxonomy_of_fruit_and_tools()["classes"] if c["vertical"] == v] for v in VERTICALS}
TOP_K = 3
#: A model of one's own in a module: a linear layer whose weights are a file's; and what a mistake would be.
MODULE = """
import safetensors.torch
import torch

not_a_function = 3


def build(path):
    weight = safetensors.torch.load_file(path)["weight"]
    return lambda images: images.flatten(1) @ weight.T


def build_nothing():
    return None
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A working directory with our own teachers, their targets and their evaluation."""
    directory = tmp_path_factory.mktemp("trained")
    workdir = prepare_shards(directory)
    for vertical in VERTICALS:
        concentrate("teacher", f"vertical={vertical}", f"workdir={workdir}", *TINY, directory=directory)
    ask(workdir)
    return workdir


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory) -> Path:
    """Our own teachers as ONNX and as exported programs, each once for any batch and once for batches of 7."""
    folder = tmp_path_factory.mktemp("exports")
    for vertical in VERTICALS:
        network = load_student(trained / "teachers" / vertical / "model.safetensors")
        for num_images, shapes in (("any", {"images": {0: torch.export.Dim("batch")}}), ("7", None)):
            images = (torch.rand(7, 3, 16, 16),)
            program = torch.export.export(network, images, dynamic_shapes=shapes)
            torch.export.save(program, folder / f"{vertical}-{num_images}.pt2")
            torch.onnx.export(program, images, folder / f"{vertical}-{num_images}.onnx", dynamo=True, verbose=False)
    return folder


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    """The same shards without teachers."""
    shutil.copytree(trained / "shards", tmp_path / "work/shards")
    shutil.copytree(trained.parent / "given", tmp_path / "given")
    return tmp_path / "work"


def ask(workdir: Path) -> None:
    """What the teachers say, evaluated and stored."""
    concentrate("evaluate", "name=specialists", "save_scores=true", "batch_size=25", f"workdir={workdir}",
                directory=workdir.parent)  # fmt: skip
    concentrate("targets", f"targets.top_k={TOP_K}", "batch_size=13", f"workdir={workdir}", directory=workdir.parent)


def take_over(workdir: Path, vertical: str, kind: str, *options: str, code: int = 0, **values):
    given = [
        f"external.{key}={value}"
        for key, value in {"classes": "identity", "output": "sigmoid_logits", **values}.items()
    ]
    return concentrate("teacher", f"vertical={vertical}", f"external={kind}", f"workdir={workdir}", *given, *options,
                       directory=workdir.parent, code=code)  # fmt: skip


def mistake(workdir: Path, kind: str, *options: str, **values) -> str:
    message = one_line(take_over(workdir, "tools", kind, *options, code=2, **values))
    assert not (workdir / "teachers/tools/DONE.json").exists()
    assert not (workdir / "teachers/tools/config.json").exists(), "the mistake may be corrected without overwrite"
    return message


def load_scores(workdir: Path) -> np.ndarray:
    return safetensors.numpy.load_file(workdir / "evaluations/specialists.safetensors")["scores"]


@pytest.mark.parametrize(
    ("kind", "ending", "num_images"),
    [("torch", "pt2", "any"), ("torch", "pt2", "7"), ("onnx", "onnx", "any"), ("onnx", "onnx", "7")],
)
def test_our_own_teachers_brought_along_are_evaluated_and_stored_as_before(
    trained, exports, workdir, kind, ending, num_images
):
    for vertical in VERTICALS:
        take_over(workdir, vertical, kind, path=exports / f"{vertical}-{num_images}.{ending}")
    ask(workdir)
    np.testing.assert_allclose(load_scores(workdir), load_scores(trained), atol=2e-5)
    expected, found = (load_json(root / "evaluations/specialists.json") for root in (trained, workdir))
    for metric in ("mpvap", "mpvap_log_softmax", "top1", "map_at_50"):
        assert found[metric] == pytest.approx(expected[metric], abs=1e-9)
    # An exported program's parameters are ours; of the ONNX model the initialisers are counted.
    assert found["num_parameters"]["total"] == pytest.approx(expected["num_parameters"]["total"], rel=0.05)
    assert found["num_parameters"]["base"] is None
    assert found["multiply_adds"] == (None if kind == "onnx" else expected["multiply_adds"])
    paths = sorted((trained / "targets").rglob("*.safetensors"))
    assert len(paths) == 8
    for path in paths:
        here, there = (safetensors.numpy.load_file(p) for p in (workdir / path.relative_to(trained), path))
        np.testing.assert_array_equal(here["row"], there["row"])
        np.testing.assert_array_equal(here["index"], there["index"])
        np.testing.assert_allclose(here["probability"], there["probability"], atol=1e-3)


def test_ours_and_others_are_evaluated_together_each_at_its_own_image_size(trained, workdir, tmp_path):
    shutil.copytree(trained / "teachers/fruit", workdir / "teachers/fruit")
    weight = torch.randn(4, 3 * 8 * 8) / 10
    write_module(tmp_path, weight)
    options = {"function": "mine:build", "path": tmp_path / "weight.safetensors", "image_size": 8}
    take_over(workdir, "tools", "callable", **options)
    ask(workdir)
    concentrate("report", "name=specialists", f"workdir={workdir}", directory=tmp_path)
    ours, both = load_scores(trained), load_scores(workdir)
    np.testing.assert_array_equal(both[:, :6], ours[:, :6])
    assert np.abs(both[:, 6:] - ours[:, 6:]).max() > 0.1
    found = load_json(workdir / "evaluations/specialists.json")
    assert found["num_networks"] == 2
    assert found["num_parameters"] == {"base": None, "top": None, "total": None}, "a function's are not known"
    assert found["multiply_adds"] is None
    assert "specialists" in (workdir / "report/index.html").read_text()


def write_module(directory: Path, weight: torch.Tensor) -> None:
    (directory / "mine.py").write_text(MODULE)
    safetensors.numpy.save_file({"weight": weight.numpy()}, directory / "weight.safetensors")


def test_a_function_of_ones_own_sees_float_images_and_its_softmax_becomes_probabilities(trained, workdir, tmp_path):
    weight = torch.randn(4, 3 * 16 * 16) / 10
    write_module(tmp_path, weight)
    path = tmp_path / "weight.safetensors"
    take_over(workdir, "tools", "callable", function="mine:build", path=path, image_size=16, output="softmax_logits")
    concentrate("evaluate", "name=tools", "save_scores=true", f"workdir={workdir}", directory=tmp_path)
    scores_NV = safetensors.numpy.load_file(workdir / "evaluations/tools.safetensors")["scores"]
    images = torch.from_numpy(decode_test_images(workdir, "tools")) / 255
    expected_NV = (images.flatten(1) @ weight.T).softmax(1)
    np.testing.assert_allclose(torch.from_numpy(scores_NV).sigmoid(), expected_NV, atol=1e-5)


def decode_test_images(workdir: Path, vertical: str) -> np.ndarray:
    """(N, 3, 16, 16) uint8 of the test images with a label in the vertical."""
    with tarfile.open(workdir.parent / "given/test-000000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    keys = [name.removesuffix(".png") for name in members if name.endswith(".png")]
    routed = [key for key in keys if set(json.loads(members[f"{key}.json"])["labels"]) & set(CLASSES[vertical])]
    pixels = [np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])).convert("RGB")) for key in routed]
    return np.stack(pixels).transpose(0, 3, 1, 2)


def test_a_map_puts_outputs_in_the_places_of_their_classes(trained, exports, workdir, tmp_path):
    """The same model with its outputs named backwards gives scores backwards; classes without an output are told of."""
    (tmp_path / "map.json").write_text(json.dumps(CLASSES["tools"][::-1]))
    take_over(workdir, "tools", "torch", path=exports / "tools-any.pt2", classes=tmp_path / "map.json")
    concentrate("evaluate", "name=tools", "save_scores=true", f"workdir={workdir}", directory=tmp_path)
    backwards = safetensors.numpy.load_file(workdir / "evaluations/tools.safetensors")["scores"]
    (tmp_path / "map.json").write_text(json.dumps({"1": "saw"}))
    said = take_over(
        workdir, "tools", "torch", "overwrite=true", path=exports / "tools-any.pt2", classes=tmp_path / "map.json"
    )
    assert "3 of 4 classes have no output of the model and get probability 0: hammer, drill, file" in said.out
    assert load_json(workdir / "teachers/tools/DONE.json")["num_classes_without_output"] == 3
    concentrate(
        "evaluate", "name=tools", "save_scores=true", "overwrite=true", f"workdir={workdir}", directory=tmp_path
    )
    one = safetensors.numpy.load_file(workdir / "evaluations/tools.safetensors")["scores"]
    np.testing.assert_allclose(backwards[:, ::-1][:, 1], one[:, 1], atol=1e-6)
    assert (torch.from_numpy(one[:, [0, 2, 3]]).sigmoid() < 1e-30).all()
    assert backwards.std(0).min() > 0


def test_a_teacher_that_is_there_is_kept_unless_its_content_changes(exports, workdir, tmp_path):
    for name in ("tools-any.onnx", "tools-any.onnx.data"):
        shutil.copy(exports / name, tmp_path / name)
    take_over(workdir, "tools", "onnx", path=tmp_path / "tools-any.onnx")
    checkpoint = load_json(workdir / "teachers/tools/DONE.json")["checkpoint"]
    (tmp_path / "moved").mkdir()
    for name in ("tools-any.onnx", "tools-any.onnx.data"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    again = take_over(workdir, "tools", "onnx", path=tmp_path / "moved/tools-any.onnx")
    assert "finished already" in again.out
    concentrate("evaluate", "name=tools", f"workdir={workdir}", directory=tmp_path)
    data = tmp_path / "moved/tools-any.onnx.data"
    data.write_bytes(bytes(4) + data.read_bytes()[4:])
    refused = take_over(workdir, "tools", "onnx", path=tmp_path / "moved/tools-any.onnx", code=2)
    assert "what it was made from has changed since: upstream.files was" in one_line(refused)
    take_over(workdir, "tools", "onnx", "overwrite=true", path=tmp_path / "moved/tools-any.onnx")
    assert load_json(workdir / "teachers/tools/DONE.json")["checkpoint"] != checkpoint
    refused = concentrate("evaluate", "name=tools", f"workdir={workdir}", directory=tmp_path, code=2)
    assert "checkpoint was" in one_line(refused), "what was measured was another teacher"


@pytest.mark.parametrize("name", ["external.json", "model/weight.safetensors", "mine.py"])
def test_a_file_that_changed_since_is_refused(workdir, tmp_path, name):
    write_module(tmp_path, torch.randn(4, 3 * 16 * 16) / 10)
    path = tmp_path / "weight.safetensors"
    take_over(workdir, "tools", "callable", function="mine:build", path=path, image_size=16)
    changed = tmp_path / name if name == "mine.py" else workdir / "teachers/tools" / name
    changed.write_bytes(changed.read_bytes() + b" ")
    message = one_line(concentrate("evaluate", "name=tools", f"workdir={workdir}", directory=tmp_path, code=2))
    assert f"{changed}: missing or changed since this teacher was taken over" in message
    changed.unlink()
    assert message == one_line(concentrate("evaluate", "name=tools", f"workdir={workdir}", directory=tmp_path, code=2))


def test_a_function_is_found_from_another_directory_as_well(workdir, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("")
    write_module(tmp_path / "package", torch.randn(4, 3 * 16 * 16) / 10)
    path = tmp_path / "package/weight.safetensors"
    take_over(workdir, "tools", "callable", function="package.mine:build", path=path, image_size=16)
    (tmp_path / "elsewhere").mkdir()
    concentrate("evaluate", "name=tools", f"workdir={workdir}", directory=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["trainer.max_epochs=3"], "trainer.max_epochs has no effect with the choices that were made"),
        (["data.image_size=16"], "data.image_size has no effect with the choices that were made"),
        (["base=inception_v2"], "base: no effect with external, since nothing is trained"),
        (["seed=3"], "seed: no effect with external"),
        (["smear=false"], "smear: no effect with external"),
        (["external.pth=3"], "unknown key 'external.pth'; did you mean 'external.path'?"),
        (["+external.crop_share=3"], "unknown key 'external.crop_share'"),
        (["external.output=softmx_logits"], "did you mean 'softmax_logits'?"),
        (["external.crop=0"], "external.crop=0"),
        (["external.image_size=32"], "takes images of 16 pixels alone"),
        (["external.path=not_there.onnx"], "not_there.onnx': no such file"),
        (["external.classes=not_there.json"], "not_there.json': no such file"),
        (["external.output=softmax_probabilities"], "give external.output=softmax_logits"),
        (["vertical=tool"], "no vertical 'tool'; valid: fruit, tools"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_one_line(exports, workdir, options, expected):
    assert expected in mistake(workdir, "onnx", *options, path=exports / "tools-any.onnx")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("mine", "expected package.module:function"),
        ("mine:", "expected package.module:function"),
        ("mine.build", "expected package.module:function"),
        ("mien:build", "no module mien in"),
        ("mine.inner:build", "no module mine.inner in"),
        ("mine:biuld", "has no function biuld; did you mean 'build'?"),
        ("mine:not_a_function", "has no function not_a_function"),
        ("mine:build_nothing", "returned NoneType, expected the model"),
        ("broken:build", "cannot be imported"),
        ("needs:build", "cannot be imported (No module named 'not_installed')"),
        ("script:build", "script.py, line 2, fails (SystemExit: 0); correct it"),
        ("fails:build", "fails.py, line 2, fails (ValueError: no weights); correct it"),
        (
            "fails:build_of_path",
            "fails.py fails (TypeError: build_of_path() missing 1 required positional argument: 'path')",
        ),
    ],
)
def test_a_function_that_cannot_be_had_is_answered_with_one_line(workdir, tmp_path, function, expected):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def build(:")
    (tmp_path / "needs.py").write_text("import not_installed")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)")
    failing = "def build():\n    raise ValueError('no weights')\ndef build_of_path(path):\n    return path"
    (tmp_path / "fails.py").write_text(failing)
    assert expected in mistake(workdir, "callable", function=function, image_size=16)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "zip"])
def test_a_damaged_model_file_is_answered_with_one_line(exports, workdir, tmp_path, kind, damage):
    content = (exports / {"onnx": "tools-any.onnx", "torch": "tools-any.pt2"}[kind]).read_bytes()
    path = tmp_path / "damaged"
    if damage == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", "no pickle")
    else:
        path.write_bytes({"empty": b"", "text": b"no model\n" * 9, "half": content[: len(content) // 2]}[damage])
    message = mistake(workdir, kind, path=path)
    assert str(path) in message
    assert "damaged" in message


def test_an_onnx_model_without_its_weights_is_answered_with_one_line(exports, workdir, tmp_path):
    shutil.copy(exports / "tools-any.onnx", tmp_path / "tools-any.onnx")
    assert "tools-any.onnx.data': no such file" in mistake(workdir, "onnx", path=tmp_path / "tools-any.onnx")


def test_without_onnxruntime_the_message_says_what_to_install(exports, workdir, tmp_path):
    """A module of this name that cannot be imported stands in for a package that is not there."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    given = ("external.classes=identity", "external.output=sigmoid_logits", f"external.path={exports}/tools-any.onnx")
    command = (sys.executable, "-m", "concentration.cli", "teacher", "vertical=tools", "external=onnx", *given)
    finished = run_command(
        *command, f"workdir={workdir}", directory=Path.cwd(), code=2, PYTHONPATH=str(tmp_path / "shadow")
    )
    assert "pip install onnx onnxruntime" in one_line(finished)


def test_a_teacher_of_ones_own_is_no_base_network(exports, workdir):
    take_over(workdir, "tools", "torch", path=exports / "tools-any.pt2")
    refused = concentrate("teacher", "vertical=fruit", f"workdir={workdir}", *TINY, "base.checkpoint=tools",
                          directory=workdir.parent, code=2)  # fmt: skip
    assert "base.checkpoint=tools: no finished run or file of that name" in one_line(refused)
