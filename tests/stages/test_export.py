"""`concentrate export` and `concentrate predict`: the folder answers as the network does, also where only its own file is."""

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from real_runs import TINY, Plant, concentrate, draw_image, load_json, one_line, prepare_shards, run_command

from concentration.data.views import CentreView, decode_view
from concentration.errors import ConcentrationError, DataError
from concentration.networks.student import load_student
from concentration.schema import parse_config
from concentration.serving.inputs import list_inputs
from concentration.serving.neighbours import NeighbourIndex
from concentration.stages import export as export_stage
from concentration.stages import predict as predict_stage
from concentration.taxonomy import Taxonomy

PHOTOS = {"a=b.png": "lemon", "hammer.png": "hammer", "deeper/saw.PNG": "saw"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A student that has learned something, evaluated and exported."""
    directory = tmp_path_factory.mktemp("export")
    workdir = prepare_shards(directory)
    common = (f"workdir={workdir}", "targets=labels", *TINY)
    concentrate("student", *common, "trainer.max_epochs=12", "optimizer.lr=0.1", directory=directory)
    for verb in (("evaluate",), ("export", "speed_seconds=0.01", "neighbours=50")):
        concentrate(*verb, f"workdir={workdir}", directory=directory)
    return workdir


@pytest.fixture(scope="module")
def exported(workdir) -> Path:
    return workdir / "exports/student"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of images of three classes, one of which lies deeper."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    for number, (name, label) in enumerate(PHOTOS.items()):
        (folder / name).write_bytes(draw_image(label, 7000 + number))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


def run_onnx(path: Path, images: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits", "features"], {"images": images})


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)


def predict(workdir: Path, *paths: Path, **options: object) -> list[dict]:
    """What `concentrate predict` answers, in this process."""
    output = workdir.parent / "answers.jsonl"
    values = {"workdir": workdir, "paths": [str(path) for path in paths], "format": "jsonl", "output": output}
    predict_stage.predict(parse_config(predict_stage.PredictConfig, values | options))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_program_answers_as_the_network(exported):
    network = load_student(exported / "model.safetensors")
    program = torch.export.load(exported / "model.pt2").module()
    for count in (1, 2, 33):  # any batch size
        images = random_images(count)
        with torch.no_grad():
            expected_BC, expected_BT = network.answer(torch.from_numpy(images))
            assert torch.equal(expected_BC, network(torch.from_numpy(images)))
            torch.testing.assert_close(program(torch.from_numpy(images)), (expected_BC, expected_BT))
        logits_BC, features_BT = run_onnx(exported / "model.onnx", images)
        np.testing.assert_allclose(logits_BC, expected_BC, atol=1e-4)
        np.testing.assert_allclose(features_BT, expected_BT, atol=1e-4)


def test_the_features_are_what_the_classifiers_see(exported):
    """From the features alone, classifier, norm and gamma give the logits again."""
    network = load_student(exported / "model.safetensors")
    logits_BC, features_BT = run_onnx(exported / "model.onnx", random_images(5))
    with torch.no_grad():
        again = torch.cat(network.pace(network.top.classify(torch.from_numpy(features_BT))), dim=1)
    np.testing.assert_allclose(again, logits_BC, atol=1e-4)


def test_int8_weights_are_rounded_weights_and_nothing_else(exported, capfd):
    """The int8 program answers as the network whose classifiers' weights are rounded by hand."""
    network, rounded = load_student(exported / "model.safetensors"), 0
    for name, parameter in network.named_parameters():
        if name in network.classifier_weights:
            step = parameter.detach().abs().max(1, keepdim=True).values / 127
            parameter.data = (parameter.detach() / step).round() * step
            rounded += parameter.numel()
    graph = onnx.load(exported / "model.int8.onnx").graph
    assert sum(np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8) == rounded > 0
    images = random_images(9)
    with torch.no_grad():
        expected_BC = network(torch.from_numpy(images)).numpy()
    exact_BC, (int8_BC, _) = (
        run_onnx(exported / "model.onnx", images)[0],
        run_onnx(exported / "model.int8.onnx", images),
    )
    assert capfd.readouterr().err == "", "onnxruntime has nothing to warn of"
    # onnxruntime may round the other factor, too, where it is faster.
    assert np.abs(int8_BC - expected_BC).max() < 0.05
    assert 0 < np.abs(int8_BC - exact_BC).max() < 0.2


def test_the_measures_say_what_int8_costs_and_how_fast_it_is(exported):
    measures = load_json(exported / "measures.json")
    assert measures["mpvap"]["float32"] == pytest.approx(
        load_json(exported.parents[1] / "evaluations/student.json")["mpvap"]
    )
    assert abs(measures["mpvap"]["int8"] - measures["mpvap"]["float32"]) < 0.1
    assert measures["agreement"]["logit"] < 1e-3
    assert {(s["program"], s["batch_size"]) for s in measures["speed"]} >= {
        ("ONNX, float32", 1),
        ("ONNX, int8", 32),
        ("torch", 1),
    }
    assert measures["num_neighbours"] == 50


def test_the_card_has_metrics_of_every_vertical_and_what_is_confused(exported):
    card = (exported / "README.md").read_text()
    evaluation = load_json(exported.parents[1] / "evaluations/student.json")
    for vertical, ap in evaluation["pvap"].items():
        assert f"| {vertical} | " in card
        assert f"| {100 * ap:.1f} |" in card
    assert f"{evaluation['num_parameters']['total']:,} parameters" in card
    assert "is answered with" in card
    assert "{{" not in card


def test_export_again_has_nothing_to_do_and_another_network_is_refused(workdir, tmp_path):
    finished = concentrate("export", "speed_seconds=9", "neighbours=50", f"workdir={workdir}", directory=tmp_path)
    assert "finished already" in finished.out
    message = one_line(concentrate("export", "name=fruit", f"workdir={workdir}", directory=tmp_path, code=2))
    assert "name=fruit: no such student" in message
    assert "valid: student" in message


def test_images_that_cannot_be_decoded_are_left_out_of_what_is_measured_and_kept(tmp_path):
    workdir = prepare_shards(tmp_path, num_train=60, damaged=range(9, 60, 10), damaged_test=range(20))
    common = (f"workdir={workdir}", "targets=labels", *TINY, "trainer.max_skipped_share=1.0")
    concentrate("student", *common, directory=tmp_path)
    concentrate("evaluate", f"workdir={workdir}", directory=tmp_path)
    # The only neighbour would be of the first class, `berry`, all of whose images are damaged.
    export = ("export", "speed_seconds=0.01", "neighbours=1", f"workdir={workdir}")
    concentrate(*export, directory=tmp_path)
    measures = load_json(workdir / "exports/student/measures.json")
    assert (measures["num_neighbours"], measures["agreement"]["num_images"]) == (0, 32)
    finished = concentrate(*export, "num_images=1", "overwrite=true", directory=tmp_path, code=2)
    assert "none of 1 test images can be decoded" in finished.err


def test_a_program_that_the_disk_does_not_take_is_one_line(workdir, tmp_path):
    """torch aborted the process, with a trace of its C++."""
    shutil.copytree(workdir, tmp_path / "work", ignore=shutil.ignore_patterns("exports"))
    command = shlex.join(
        [sys.executable, "-m", "concentration.cli", "export", "neighbours=0", f"workdir={tmp_path}/work"]
    )
    finished = run_command("bash", "-c", f"ulimit -f 90; exec {command}", directory=tmp_path, code=2)
    message = finished.err.splitlines()[-1]
    assert "exports/student/model.pt2: cannot be written (File too large); free space" in message


def test_an_export_that_cannot_be_replaced_goes_on_answering(workdir, photos, tmp_path):
    before = predict(workdir, photos)
    evaluation = workdir / "evaluations/student.json"
    evaluation.rename(tmp_path / "away.json")
    command = ("export", "overwrite=true", "neighbours=50", f"workdir={workdir}")
    message = one_line(concentrate(*command, directory=tmp_path, code=2))
    (tmp_path / "away.json").rename(evaluation)
    assert "run `concentrate evaluate name=student` first" in message
    assert predict(workdir, photos) == before


def test_an_export_that_is_not_finished_does_not_answer(exported, photos, tmp_path):
    """It has all that is needed but its calibration."""
    half = shutil.copytree(exported, tmp_path / "half")
    (half / "DONE.json").unlink()
    again = r"half: is being exported, or was stopped in the middle; wait for it, or run `concentrate export name=half`"
    with pytest.raises(ConcentrationError, match=again):
        predict(tmp_path, photos, export=half)


def test_predict_names_classes_with_vertical_and_ancestors(workdir, photos):
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    network = load_student(workdir / "students/student/model.safetensors")
    answers = predict(workdir, photos, best=3)
    assert [answer["path"] for answer in answers] == [str(photos / name) for name in PHOTOS]
    for answer in answers:
        pixels = decode_view(Path(answer["path"]).read_bytes(), CentreView(), 0, 16)[0]
        with torch.no_grad():
            probability_C = network(torch.from_numpy(pixels.copy())[None])[0].sigmoid().numpy()
        leaves = np.flatnonzero(taxonomy.is_leaf)
        expected = leaves[np.argsort(-probability_C[leaves])][:3]
        assert [c["id"] for c in answer["classes"]] == [taxonomy.class_of_output(output).id for output in expected]
        np.testing.assert_allclose([c["probability"] for c in answer["classes"]], probability_C[expected], atol=1e-5)
        for c, output in zip(answer["classes"], expected, strict=True):
            assert tuple(c["lineage"]) == taxonomy.lineage(output)
            assert c["vertical"] == taxonomy.class_of_output(output).vertical
    assert [answer["classes"][0]["name"] for answer in answers] == ["Lemon", "Hammer", "Saw"], "it has learned them"
    assert answers[0]["classes"][0]["lineage"] == ["Fruit", "Citrus", "Lemon"]


def test_predict_restricts_to_verticals_or_ranks_inside_each(workdir, photos):
    image = photos / "hammer.png"
    [answer] = predict(workdir, image, verticals=["fruit"], best=10)
    assert {c["vertical"] for c in answer["classes"]} == {"fruit"}
    [answer] = predict(workdir, image, by_vertical=True, best=1)
    assert [c["vertical"] for c in answer["classes"]] == ["tools", "fruit"]
    [answer] = predict(workdir, image, classes="all", best=100)
    assert len(answer["classes"]) == 10


def test_predict_reads_shards_in_batches_on_many_threads_in_order(workdir):
    shard = workdir.parent / "given/test-000000.tar"
    at_once = predict(workdir, shard, num_threads=1, batch_size=100)
    in_parts = predict(workdir, shard, num_threads=3, batch_size=7)
    assert [answer["path"] for answer in in_parts] == [f"{shard}/test{number}.png" for number in range(60)]
    for one, other in zip(at_once, in_parts, strict=True):
        probabilities = [[c["probability"] for c in answer["classes"]] for answer in (one, other)]
        np.testing.assert_allclose(*probabilities, atol=2e-6)


def test_hidden_files_and_folders_are_asked_about_neither_in_folders_nor_in_tars(tmp_path):
    names = ["a/0.png", "a/._0.png", "./b/1.png", ".ipynb_checkpoints/0.png", "b/.hidden/2.png"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            path = tmp_path / ".given" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            tar.addfile(tarfile.TarInfo(name))
    for given in (tmp_path / "x.tar", tmp_path / ".given"):
        found = sorted(os.path.normpath(image.name) for image in list_inputs([str(given)]))
        assert found == [f"{given}/a/0.png", f"{given}/b/1.png"], "what the given folder is called does not matter"


def test_the_command_line_takes_paths_and_keys_and_prints_only_answers(workdir, photos, tmp_path):
    (tmp_path / "a=b.png").write_bytes((photos / "a=b.png").read_bytes())
    finished = concentrate(
        "predict", "a=b.png", "best=2", photos / "hammer.png", f"workdir={workdir}", directory=tmp_path
    )
    assert "Fruit > Citrus > Lemon" in finished.out
    assert finished.err == ""
    message = one_line(concentrate("predict", "a=b.png", "bes=2", directory=tmp_path, code=2))
    assert "unknown key 'bes'; did you mean 'best'?" in message


def test_csv_has_a_class_a_row(workdir, photos, tmp_path):
    predict_stage.predict(
        predict_stage.PredictConfig(
            workdir=workdir, paths=(str(photos),), best=2, format="csv", output=tmp_path / "deep/answers.csv"
        )
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "deep/answers.csv").read_text())))
    assert len(rows) == 6
    assert rows[0]["lineage"] == "Fruit > Citrus > Lemon"
    assert float(rows[0]["probability"]) > float(rows[1]["probability"])


@pytest.mark.parametrize("format", ["table", "jsonl", "csv"])
def test_a_name_that_is_not_utf_8_is_written_to_a_file_as_to_the_terminal(workdir, photos, tmp_path, format):
    content = (photos / "hammer.png").read_bytes()
    for name in (b"caf\xe9.png", "caf\xe9.png".encode(), b"z.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    command = ("predict", ".", "best=1", f"format={format}", f"workdir={workdir}")
    shown = concentrate(*command, directory=tmp_path).out
    concentrate(*command, f"output={tmp_path}/answers", directory=tmp_path)
    written = (tmp_path / "answers").read_text(encoding="utf-8")
    assert written == shown
    assert all(name in written for name in ("caf?.png", "caf\xe9.png", "z.png"))
    if format == "jsonl":
        assert all("classes" in json.loads(line) for line in written.splitlines())


def test_images_that_are_none_are_answered_with_an_error(workdir, photos, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    wide = io.BytesIO()
    Image.new("L", (70_000, 1)).save(wide, "png")
    (tmp_path / "wide.png").write_bytes(wide.getvalue())
    answers = predict(workdir, tmp_path, photos / "hammer.png")
    errors = [answer["error"] for answer in answers[:3]]
    assert errors[:2] == ["cannot be decoded (no JPEG, PNG, WebP, GIF or BMP)"] * 2
    assert "70000 x 1 pixels" in errors[2]
    assert answers[3]["classes"]
    with pytest.raises(DataError, match="no image could be decoded, of 3"):
        predict(workdir, tmp_path)


@pytest.mark.parametrize(
    ("paths", "options", "expected"),
    [
        ([], {}, "no images: give files, folders or shards"),
        (["missing.jpg"], {}, "missing.jpg: no such file or folder"),
        (["pipe"], {}, "pipe: is a pipe or a device; write the image to a file"),
        (["empty"], {}, "no images inside"),
        (["damaged.tar"], {}, "damaged.tar: truncated, compressed or no tar"),
        (["one.png"], {"name": "studnet"}, r"studnet: no export \(exports beside it: student\)"),
        (["one.png"], {"examples": "there"}, "examples=there without neighbours=true has no effect"),
        (["one.png"], {"examples": "there", "neighbours": True}, "examples=there: no such folder"),
        (["one.png"], {"output": "one.png"}, "output=one.png: is among the images, and would be overwritten"),
        (["."], {"output": "link.csv", "format": "csv"}, "output=link.csv: is among the images"),
        (["one.png"], {"verticals": ["fruits"]}, "verticals=fruits: no such vertical; did you mean 'fruit'?"),
    ],
    ids=str,
)
def test_a_mistake_is_named(workdir, tmp_path, monkeypatch, paths, options, expected):
    monkeypatch.chdir(tmp_path)
    Path("damaged.tar").write_bytes(b"no tar" * 200)
    Path("empty").mkdir()
    os.mkfifo("pipe")
    Path("one.png").write_bytes(draw_image("saw", 1))
    Path("link.csv").symlink_to("one.png")
    with pytest.raises(ConcentrationError, match=expected):
        predict(workdir, *paths, **options)


def test_a_changed_bit_of_a_program_is_named_before_it_answers(workdir, photos, tmp_path):
    """A copy may go wrong on its way to where it serves."""
    exported = tmp_path / "exports/student"
    shutil.copytree(workdir / "exports/student", exported)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=exported, check=True, capture_output=True)
    program = exported / "model.onnx"
    content = bytearray(program.read_bytes())
    weights = max((tensor.raw_data for tensor in onnx.load(program).graph.initializer), key=len)
    content[content.index(weights) + len(weights) // 2] ^= 1
    program.write_bytes(content)
    options = {"workdir": tmp_path, "paths": (str(photos),), "output": tmp_path / "answers"}
    with pytest.raises(DataError, match=r"model\.onnx: damaged, or changed since it was exported"):
        predict_stage.predict(predict_stage.PredictConfig(**options))
    predict_stage.predict(predict_stage.PredictConfig(**options, weights="int8"))  # whose program is whole
    (exported / "SHA256SUMS").unlink()  # as an earlier version leaves it
    predict_stage.predict(predict_stage.PredictConfig(**options))


def test_a_class_that_was_never_trained_is_found_by_its_neighbours(workdir, tmp_path):
    """`pear` is no class of the network; ten examples of it are enough for the nearest neighbours."""
    for label in ("pear", "quince"):
        (tmp_path / "examples" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "examples" / label / f"{number}.png").write_bytes(draw_image(label, number))
    for number in range(8):
        (tmp_path / "asked").mkdir(exist_ok=True)
        (tmp_path / "asked" / f"{number}.png").write_bytes(draw_image("pear", 500 + number))
    answers = predict(workdir, tmp_path / "asked", neighbours=True, examples=tmp_path / "examples")
    nearest = [answer["neighbours"][0]["name"] for answer in answers]
    assert nearest.count("pear") >= 6
    without = predict(workdir, tmp_path / "asked", neighbours=True)
    assert {answer["neighbours"][0]["name"] for answer in without} <= {
        "Berry",
        "Lemon",
        "Yuzu",
        "Cherry",
        "Hammer",
        "Saw",
        "Drill",
        "File",
    }


def test_the_index_finds_what_a_slow_search_finds(exported):
    rng = np.random.default_rng(0)
    features_NT = rng.normal(size=(500, 24)).astype(np.float32)
    index = NeighbourIndex.build(features_NT, [str(number) for number in range(500)])
    asked_BT = rng.normal(size=(20, 24)).astype(np.float32)
    similarity_BK, number_BK = index.search(asked_BT)
    unit_NT, unit_BT = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (features_NT, asked_BT))
    slow_BN = unit_BT @ unit_NT.T
    best_BK = np.argsort(-slow_BN, axis=1)[:, :10]
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(number_BK, best_BK, strict=True)])
    assert found > 0.95
    np.testing.assert_allclose(similarity_BK, np.take_along_axis(slow_BN, number_BK, axis=1), atol=1e-5)


def test_the_folder_alone_answers_without_this_package_torch_or_hydra(workdir, exported, photos, tmp_path):
    """As on a machine that has only what the card names: everything else is refused when it is imported."""
    shutil.copytree(exported, tmp_path / "moved")
    guard = (
        "import sys, runpy\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        heavy = ('torch', 'lightning', 'hydra', 'omegaconf', 'webdataset', 'timm', 'safetensors', 'faiss', 'onnx')\n"
        "        assert name.split('.')[0] not in heavy, name\n"
        "sys.meta_path.insert(0, Guard())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [
        sys.executable,
        "-I",
        "-c",
        guard,
        tmp_path / "moved/predict.pyz",
        photos,
        "format=jsonl",
        "best=2",
        "verticals=[fruit, tools]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    alone = [json.loads(line) for line in done.stdout.splitlines()]
    assert alone == predict(workdir, photos, best=2)
    assert done.stderr == ""


def test_a_calibration_is_copied_whenever_it_is_made_and_predict_applies_it(workdir, photos):
    before = predict(workdir, photos, best=10)
    assert all("is_sure" not in c for answer in before for c in answer["classes"])
    calibration = {
        "name": "student",
        "checkpoint": load_json(workdir / "students/student/DONE.json")["checkpoint"],
        "scaling": {"fruit": {"slope": 2.0, "shift": -1.0}, "tools": {"slope": 0.5, "shift": 0.0}},
        "thresholds": {
            "by_vertical": {"fruit": {"threshold": 0.9}, "tools": {"threshold": None}},
            "by_class": {"hammer": 0.0},
        },
        "none_of_these": {"threshold": 0.5, "false_rejection_rate": {"test": 0.05}},
        "before": {"top1": 0.5, "ece": 0.1},
        "after": {"top1": 0.6, "ece": 0.01},
    }
    path = workdir / "calibrations/student.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(calibration))
    try:
        # Between the two files that change: the card stayed as it was, for ever.
        concentrate(
            "export", "neighbours=50", f"workdir={workdir}", directory=workdir, plant=Plant("os:replace", 2), code=-9
        )
        export_stage.export(export_stage.ExportConfig(workdir=workdir, neighbours=50))
        assert (
            "expected calibration error 10.0 before and 1.0 after"
            in (workdir / "exports/student/README.md").read_text()
        )
        after = predict(workdir, photos, best=10)
    finally:
        (workdir / "exports/student/calibration.json").unlink()
    for raw, scaled in zip(before, after, strict=True):
        expected = {c["id"]: scale_by_hand(c["probability"], c["vertical"] == "fruit") for c in raw["classes"]}
        found = {c["id"]: c["probability"] for c in scaled["classes"]}
        assert found == pytest.approx(expected, abs=1e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert scaled["none_of_these"] == (max(found.values()) < 0.5)
        for c in scaled["classes"]:
            threshold = 0.9 if c["vertical"] == "fruit" else 0.0 if c["id"] == "hammer" else 2.0
            assert c["is_sure"] == (c["probability"] >= threshold)


def scale_by_hand(probability: float, is_fruit: bool) -> float:
    logit = np.log(probability / (1 - probability))
    return 1 / (1 + np.exp(-(2 * logit - 1 if is_fruit else 0.5 * logit)))
