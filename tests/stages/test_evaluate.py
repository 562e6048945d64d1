"""`concentrate evaluate`: its numbers are those of scikit-learn on the saved scores."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from real_runs import (
    IMAGE_SIZE,
    TINY,
    concentrate,
    concentrate_here,
    draw_image,
    load_json,
    one_line,
    prepare_shards,
    read_labels,
    smear_by_walking,
    taxonomy_of_fruit_and_tools,
    write_shards,
    write_tar,
)
from sklearn.metrics import average_precision_score

from concentration.data.crops import decode_crops
from concentration.errors import DataError
from concentration.networks.student import load_student

TAXONOMY = taxonomy_of_fruit_and_tools()
VERTICALS = ("fruit", "tools")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist, two teachers, and the evaluations of all three and of the ensemble."""
    directory = tmp_path_factory.mktemp("evaluate")
    workdir = prepare_shards(directory)
    common = (f"workdir={workdir}", *TINY)
    concentrate("student", "name=generalist", "targets=labels", *common, directory=directory)
    for vertical in VERTICALS:
        concentrate("teacher", f"vertical={vertical}", *common, directory=directory)
    for name in ("generalist", "specialists", "tools"):
        # 60 images in batches of 25: the last batch is padded.
        concentrate("evaluate", f"name={name}", "save_scores=true", "batch_size=25", f"workdir={workdir}",
                    directory=directory)  # fmt: skip
    return workdir


def load_scores(workdir: Path, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores and labels (N, C), and the class id of every column."""
    path = workdir / "evaluations" / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        ids = file.metadata()["class_ids"].split("\n")
    arrays = safetensors.numpy.load_file(path)
    return arrays["scores"], arrays["labels"], ids


def compute_expected(scores_NC: np.ndarray, labels: list[list[str]], ids: list[str]) -> dict:
    """pvap, mpvap and top-1 by scikit-learn, smearing by walking up the parents."""
    vertical_of = {c["id"]: c["vertical"] for c in TAXONOMY["classes"]}
    parents = {parent for c in TAXONOMY["classes"] for parent in c["parents"]}
    smeared = [smear_by_walking(of_sample, TAXONOMY) for of_sample in labels]
    pvap = {}
    for vertical in VERTICALS:
        rows = [n for n, of_sample in enumerate(labels) if any(vertical_of[label] == vertical for label in of_sample)]
        precisions = []
        for column, class_id in enumerate(ids):
            truth = [class_id in smeared[row] for row in rows]
            if vertical_of[class_id] == vertical and any(truth):
                precisions.append(average_precision_score(truth, scores_NC[rows, column]))
        pvap[vertical] = float(np.mean(precisions))
    leaves = [column for column, class_id in enumerate(ids) if class_id not in parents]
    right = []
    for row, of_sample in enumerate(labels):
        if any(label not in parents for label in of_sample):
            best = leaves[int(np.argmax(scores_NC[row, leaves]))]
            right.append(ids[best] in of_sample)
    return {"pvap": pvap, "mpvap": float(np.mean(list(pvap.values()))), "top1": float(np.mean(right))}


@pytest.mark.parametrize("name", ["generalist", "specialists"])
def test_the_metrics_are_those_of_scikit_learn_on_the_saved_scores(workdir, name):
    scores_NC, label_NC, ids = load_scores(workdir, name)
    labels = read_labels(workdir.parent / "given", "test")
    assert scores_NC.shape == label_NC.shape == (60, 10)
    assert [{ids[c] for c in np.flatnonzero(row)} for row in label_NC] == [set(of_sample) for of_sample in labels]
    assert sum(len(of_sample) > 1 for of_sample in labels) >= 5, "samples of both verticals are among them"
    found, expected = load_json(workdir / "evaluations" / f"{name}.json"), compute_expected(scores_NC, labels, ids)
    assert found["pvap"] == pytest.approx(expected["pvap"], abs=1e-6)
    assert found["mpvap"] == pytest.approx(expected["mpvap"], abs=1e-6)
    assert found["top1"] == pytest.approx(expected["top1"], abs=1e-6)
    assert 0.2 < found["mpvap"] < 1, "a number that could be wrong"
    assert found["num_samples"] == 60
    assert found["num_classes"] == 10


def test_the_result_is_told_also_when_it_was_there(workdir):
    path = workdir / "evaluations/generalist.val.json"
    for _ in range(2):
        out = concentrate(
            "evaluate", "name=generalist", "split=val", f"workdir={workdir}", directory=workdir.parent
        ).out
        found = load_json(path)
        measures = f"mpvap {100 * found['mpvap']:.1f} %, top-1 {100 * found['top1']:.1f} %"
        assert out.splitlines()[-1] == f"{path}: {measures} of {found['num_samples']} val images"


def test_the_specialists_are_their_teachers_side_by_side(workdir):
    specialists, _, ids = load_scores(workdir, "specialists")
    alone, _, tools = load_scores(workdir, "tools")
    assert set(tools) == {"hammer", "saw", "drill", "file"}
    rows = [
        n for n, of_sample in enumerate(read_labels(workdir.parent / "given", "test")) if set(of_sample) & set(tools)
    ]
    np.testing.assert_allclose(specialists[rows][:, [ids.index(class_id) for class_id in tools]], alone, atol=1e-5)
    assert np.isfinite(specialists).all()
    counted = load_json(workdir / "evaluations/specialists.json")
    assert counted["num_networks"] == 2


def test_one_teacher_is_measured_on_its_own_vertical(workdir):
    scores_NC, _, _ = load_scores(workdir, "tools")
    alone, together = (load_json(workdir / "evaluations" / f"{name}.json") for name in ("tools", "specialists"))
    assert alone["pvap"]["tools"] == pytest.approx(together["pvap"]["tools"], abs=1e-3)
    assert alone["pvap"].keys() == {"tools"}
    assert alone["num_networks"] == 1
    assert alone["num_classes"] == scores_NC.shape[1] == 4
    assert alone["num_samples"] == len(scores_NC) < 60


def test_a_teacher_whose_vertical_has_no_image_in_the_split_is_told_so(tmp_path):
    given = write_shards(tmp_path / "given")
    for split in ("val", "test"):
        write_tar(given / f"{split}-000000.tar", [(f"{split}{n}", ["lemon"], draw_image("lemon", n)) for n in range(5)])
    workdir = tmp_path / "work"
    concentrate_here("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}",
                     "num_processes=1")  # fmt: skip
    concentrate_here("teacher", "vertical=tools", f"workdir={workdir}", *TINY, "trainer.max_epochs=1")
    for verb, options, split in (
        ("evaluate", [], "test"),
        ("evaluate", ["split=val"], "val"),
        ("calibrate", [], "val"),
    ):
        with pytest.raises(
            DataError, match=f"no {split} image has a label of the vertical 'tools', .* data.split.{split}_"
        ):
            concentrate_here(verb, "name=tools", f"workdir={workdir}", *options)


def test_the_evaluation_says_which_network_and_what_it_costs(workdir):
    found = load_json(workdir / "evaluations/generalist.json")
    assert found["checkpoint"] == load_json(workdir / "students/generalist/DONE.json")["checkpoint"]
    assert found["split"] == "test"
    wanted = {"mpvap_log_softmax", "mpvap_unsmeared", "top5", "map_at_50", "multiply_adds", "num_parameters"}
    assert wanted <= found.keys()
    parameters = safetensors.numpy.load_file(workdir / "students/generalist/model.safetensors")
    assert found["num_parameters"].keys() == {"base", "top", "total"}
    assert 0 < found["num_parameters"]["total"] <= sum(array.size for array in parameters.values())
    assert len(found["classes"]) == 10


@pytest.fixture(scope="module")
def other(workdir) -> Path:
    """A second student, and the scores of both and of the specialists together."""
    common = ("save_scores=true", f"workdir={workdir}")
    concentrate(
        "student", "name=other", "targets=labels", "seed=1", f"workdir={workdir}", *TINY, directory=workdir.parent
    )
    concentrate("evaluate", "name=other", *common, directory=workdir.parent)
    for combination in ("mean", "max"):
        options = ("name=[generalist,other,specialists]", f"combination={combination}")
        concentrate("evaluate", *options, *common, directory=workdir.parent)
    return workdir


@pytest.mark.parametrize("combination", ["mean", "max"])
def test_several_models_are_the_mean_or_the_largest_of_their_probabilities(other, combination):
    name = "generalist+other+specialists" + (".max" if combination == "max" else "")
    scores_NC, label_NC, ids = load_scores(other, name)
    alone = [load_scores(other, single)[0].astype(np.float64) for single in ("generalist", "other", "specialists")]
    probabilities = np.stack([1 / (1 + np.exp(-scores)) for scores in alone])
    expected_NC = probabilities.mean(0) if combination == "mean" else probabilities.max(0)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores_NC.astype(np.float64))), expected_NC, atol=1e-6)
    np.testing.assert_array_equal(label_NC, load_scores(other, "generalist")[1])
    found = load_json(other / "evaluations" / f"{name}.json")
    expected = compute_expected(scores_NC, read_labels(other.parent / "given", "test"), ids)
    assert found["mpvap"] == pytest.approx(expected["mpvap"], abs=1e-6)
    single = [load_json(other / "evaluations" / f"{name}.json") for name in ("generalist", "other", "specialists")]
    assert found["multiply_adds"] == sum(each["multiply_adds"] for each in single)
    assert found["num_parameters"]["total"] == sum(each["num_parameters"]["total"] for each in single)
    assert (found["models"], found["num_networks"]) == (["generalist", "other", "specialists"], 4)
    assert found["checkpoint"] not in [each["checkpoint"] for each in single]


@pytest.mark.parametrize(("crops", "batch_size"), [(10, 35), (144, 100)])
def test_several_crops_are_the_mean_of_their_probabilities(workdir, crops, batch_size):
    """Against the network asked in this process about crops cut here; batches of 3 images, and of 1."""
    concentrate("evaluate", "name=generalist", f"crops={crops}", "save_scores=true", f"batch_size={batch_size}",
                "gallery=3", f"workdir={workdir}", directory=workdir.parent)  # fmt: skip
    network = load_student(workdir / "students/generalist/model.safetensors")
    with tarfile.open(next((workdir.parent / "given").glob("test-*.tar"))) as tar:
        contents = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".png")]
    expected = []
    with torch.no_grad():
        for content in contents[:5]:
            images = torch.from_numpy(decode_crops(content, IMAGE_SIZE, crops).copy())
            expected.append(network(images).double().sigmoid().mean(0).numpy())
    scores_NC, _, _ = load_scores(workdir, f"generalist.{crops}-crops")
    assert len(scores_NC) == 60
    np.testing.assert_allclose(1 / (1 + np.exp(-scores_NC[:5].astype(np.float64))), expected, atol=1e-5)
    once, found = (load_json(workdir / "evaluations" / f"generalist{name}.json") for name in ("", f".{crops}-crops"))
    assert found["multiply_adds"] == crops * once["multiply_adds"]
    assert found["num_parameters"] == once["num_parameters"]
    assert (found["num_crops"], found["models"], len(found["gallery"])) == (crops, ["generalist"], 3)


def test_a_damaged_image_is_left_out_of_crops_and_two_passes_are_one(tmp_path):
    workdir = prepare_shards(tmp_path, damaged_test=(5,))
    concentrate("student", "targets=labels", f"workdir={workdir}", *TINY, directory=tmp_path)
    found = []
    for memory in ("8", "0"):
        concentrate(
            "evaluate", "crops=10", f"memory_gib={memory}", "overwrite=true", f"workdir={workdir}", directory=tmp_path
        )
        found.append(load_json(workdir / "evaluations/student.10-crops.json"))
    assert found[0]["num_samples_skipped"] == 1
    assert [evaluation.pop("num_passes") for evaluation in found] == [1, 2]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("name=[generalist,tools]",), "tools is the teacher of one vertical, and the others answer for other classes"),
        (("name=[generalist,generalist]",), "a name comes twice"),
        (("name=[]",), "name=[]: "),
        (("name=generalist", "combination=max"), "combination=max with one network and one crop"),
        (("name=generalist", "crops=7"), "crops=7: expected 1, 10 or 144"),
    ],
)
def test_what_cannot_be_combined_is_refused(workdir, options, message):
    finished = concentrate("evaluate", *options, f"workdir={workdir}", directory=workdir.parent, code=2)
    assert message in one_line(finished)


def test_an_unknown_name_lists_the_valid_ones(workdir):
    message = one_line(concentrate("evaluate", "name=studnet", f"workdir={workdir}", directory=workdir.parent, code=2))
    assert "name=studnet" in message
    for name in ("specialists", "generalist", "fruit", "tools"):
        assert name in message


@pytest.mark.parametrize("name", ["generalist", "specialists", "tools"])
def test_two_passes_without_the_memory_for_scores_are_one_pass_with_it(workdir, name, tmp_path):
    once = load_json(workdir / "evaluations" / f"{name}.json")
    for part in ("shards", "students", "teachers"):
        (tmp_path / part).symlink_to(workdir / part)
    finished = concentrate("evaluate", f"name={name}", "memory_gib=0", "batch_size=25", f"workdir={tmp_path}",
                           directory=tmp_path)  # fmt: skip
    twice = load_json(tmp_path / "evaluations" / f"{name}.json")
    assert (once.pop("num_passes"), twice.pop("num_passes")) == (1, 2)
    assert twice == once
    assert f"evaluate {name} in two passes: {2 * once['num_samples']}/" in finished.err


def test_a_budget_that_was_raised_or_lowered_does_not_evaluate_again(workdir):
    finished = concentrate("evaluate", "name=generalist", "save_scores=true", "memory_gib=0", f"workdir={workdir}",
                           directory=workdir.parent)  # fmt: skip
    assert "finished already" in finished.out


def test_a_result_that_was_deleted_is_made_again(workdir):
    path = workdir / "evaluations/generalist.json"
    content = load_json(path)
    path.unlink()
    concentrate("evaluate", "name=generalist", "save_scores=true", f"workdir={workdir}", directory=workdir.parent)
    found = load_json(path)
    assert {key: found[key] for key in ("mpvap", "top1", "pvap")} == {
        key: content[key] for key in ("mpvap", "top1", "pvap")
    }


def test_the_validation_split_is_evaluated_beside_the_test_split(workdir):
    before = (workdir / "evaluations/generalist.json").read_bytes()
    concentrate("evaluate", "name=generalist", "split=val", f"workdir={workdir}", directory=workdir.parent)
    assert (workdir / "evaluations/generalist.json").read_bytes() == before
    found = load_json(workdir / "evaluations/generalist.val.json")
    assert found["split"] == "val"
    assert found["num_samples"] == 40


def test_a_changed_network_file_is_refused(workdir, tmp_path):
    path = workdir / "students/generalist/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    try:
        finished = concentrate("evaluate", "name=generalist", "gallery=3", "overwrite=true", f"workdir={workdir}",
                               directory=workdir.parent, code=2)  # fmt: skip
    finally:
        path.write_bytes(content)
    assert "missing or changed since training finished" in one_line(finished)


def test_damaged_test_images_are_left_out_of_scores_and_labels_alike(tmp_path):
    """Scores and labels that are saved stay row by row those of the same images."""
    workdir = prepare_shards(tmp_path, damaged_test=(5, 17))
    concentrate("student", "targets=labels", f"workdir={workdir}", *TINY, directory=tmp_path)
    finished = concentrate("evaluate", "save_scores=true", "batch_size=25", f"workdir={workdir}", directory=tmp_path)
    assert (
        "evaluate: 2 of 60 images cannot be decoded, and are left out; the first: test-000000.tar/test5: "
        in finished.err
    )
    scores_NC, label_NC, ids = load_scores(workdir, "student")
    labels = [of_sample for n, of_sample in enumerate(read_labels(tmp_path / "given", "test")) if n not in (5, 17)]
    assert len(scores_NC) == 58
    assert [{ids[c] for c in np.flatnonzero(row)} for row in label_NC] == [set(of_sample) for of_sample in labels]
    found = load_json(workdir / "evaluations/student.json")
    assert found["num_samples"] == 58
    assert found["num_samples_skipped"] == 2
    assert found["mpvap"] == pytest.approx(compute_expected(scores_NC, labels, ids)["mpvap"], abs=1e-6)


def test_a_split_of_which_no_image_can_be_decoded_is_refused(tmp_path):
    workdir = prepare_shards(tmp_path, damaged_test=range(60))
    concentrate("student", "targets=labels", f"workdir={workdir}", *TINY, directory=tmp_path)
    finished = concentrate("evaluate", f"workdir={workdir}", directory=tmp_path, code=2)
    assert "none of the 60 test images can be decoded, so nothing can be measured" in finished.err
    assert not (workdir / "evaluations/student.json").exists()
