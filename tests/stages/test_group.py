"""`concentrate group`: groups of samples and classes by a trained network's features, and what later verbs make of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import TINY, concentrate, load_json, one_line, prepare_shards, start_ranks
from sklearn.metrics import adjusted_rand_score

from concentration.array_files import load_arrays
from concentration.data.order import SequentialOrder
from concentration.data.reader import SampleReader
from concentration.data.sample_targets import LabelTargets
from concentration.data.split import load_split
from concentration.errors import DataError
from concentration.grouping.class_groups import NO_GROUP, ClassGroups
from concentration.grouping.sample_groups import CentroidRouter, save_group_ids
from concentration.grouping.spectral import Similarity, cluster_classes
from concentration.networks.student import load_student
from concentration.stages.groupings import load_grouping, load_router, load_sample_groups
from concentration.taxonomy import Taxonomy

FEATURES = ("group", "method=features", "method.num_groups=3", "method.num_start=64", "batch_size=24")

DETECTIONS = ("method.top_k=3", "method.num_groups=3", "method.split=train")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist and groups by its features; two training images cannot be decoded."""
    directory = tmp_path_factory.mktemp("group")
    workdir = prepare_shards(directory, damaged=(3, 50))
    concentrate("student", "name=generalist", "targets=labels", "trainer.max_skipped_share=0.1", f"workdir={workdir}",
                *TINY, "trainer.max_epochs=12", directory=directory)  # fmt: skip
    concentrate(*FEATURES, f"workdir={workdir}", directory=directory)
    for kind in ("confusion", "co_detection"):
        concentrate("group", f"method={kind}", *DETECTIONS, f"workdir={workdir}", directory=directory)
    concentrate("group", "method=random", f"workdir={workdir}", directory=directory)
    return workdir


def load(workdir: Path, split: str):
    return load_split(workdir / "shards", split, Taxonomy.load(workdir / "shards/taxonomy.json"))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_sample_is_where_its_features_are_nearest(workdir, split):
    samples = load(workdir, split)
    group_N = load_sample_groups(workdir, "features", samples)
    network = load_student(workdir / "students/generalist/model.safetensors")
    router = load_router(workdir, "features")
    reader = SampleReader(samples, LabelTargets(samples, smear=False), network.image_size, None, seed=0)
    read = reader.read(SequentialOrder(np.arange(len(samples))).take(0, np.arange(len(samples))), 0)
    with torch.inference_mode():
        feature_ND = torch.nn.functional.normalize(network.base(network.normalise_images(read.images)))
    distance_NK = torch.cdist(feature_ND.double(), router.centroids.centroid_KD.double())
    expected_N = np.where(read.skipped_B, NO_GROUP, distance_NK.argmin(1))
    assert (group_N == expected_N).mean() > 0.99, "float32 may tie"
    assert (group_N == NO_GROUP).sum() == (2 if split == "train" else 0)
    sizes = load_json(workdir / "groupings/features/DONE.json")["num_samples"][split]
    assert sizes == np.bincount(group_N[group_N >= 0], minlength=3).tolist()


def test_the_groups_of_classes_are_a_taxonomy_of_new_verticals(workdir):
    given = Taxonomy.load(workdir / "shards/taxonomy.json")
    grouped = Taxonomy.load(workdir / "groupings/features.json")
    assert [c.id for c in grouped.classes] == [c.id for c in given.classes]
    assert set(grouped.verticals) <= {"group-0", "group-1", "group-2"}
    groups, _ = load_grouping(workdir, "features", given)
    assert groups.num_groups == grouped.num_verticals >= 2
    assert (workdir / "groupings/features/summary.txt").read_text() == groups.describe()


def test_again_it_does_nothing_and_a_lost_file_is_made_again(workdir):
    again = concentrate(*FEATURES, f"workdir={workdir}", directory=workdir.parent)
    assert "finished already" in again.out
    other = concentrate(*FEATURES, "seed=1", f"workdir={workdir}", directory=workdir.parent, code=2)
    assert "seed was 0, is 1" in one_line(other)
    path = workdir / "groupings/features"
    before = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    (path / "DONE.json").unlink()
    (path / "train-000001.safetensors").unlink()
    concentrate(*FEATURES, f"workdir={workdir}", directory=workdir.parent)
    assert {file.name: file.read_bytes() for file in path.glob("*.safetensors")} == before


def test_a_changed_file_of_groups_is_refused(workdir):
    """Groups that are as many and as valid, but others: with them an expert would learn from others' images."""
    train, path = load(workdir, "train"), workdir / "groupings/features/train-000001.safetensors"
    before = path.read_bytes()
    save_group_ids(path, (load_arrays(path, ("group",))["group"] + 1) % 3)
    with pytest.raises(DataError, match=r"features/train-\*\.safetensors: changed since .* group again with overwrite"):
        load_sample_groups(workdir, "features", train)
    path.write_bytes(before)
    load_sample_groups(workdir, "features", train)


@pytest.mark.long
def test_two_processes_find_the_same_groups_as_one(workdir):
    arguments = [*FEATURES, "name=two", f"workdir={workdir}"]
    for rank in start_ranks(arguments, workdir.parent, 2, [{}, {}]):
        assert (finished := rank.wait()).code == 0, finished.err
    one, two = (CentroidRouter.load(workdir / f"groupings/{n}/centroids.safetensors") for n in ("features", "two"))
    torch.testing.assert_close(two.centroids.centroid_KD, one.centroids.centroid_KD, atol=1e-5, rtol=1e-4)
    train = load(workdir, "train")
    groups = [load_sample_groups(workdir, name, train) for name in ("features", "two")]
    assert adjusted_rand_score(*groups) > 0.97


def test_balanced_groups_of_the_top_1_layer(workdir):
    options = ("method.balanced=true", "method.layer=top1", "method.num_start=198", "name=balanced")
    concentrate(
        "group", "method=features", "method.num_groups=3", *options, f"workdir={workdir}", directory=workdir.parent
    )
    sizes = load_json(workdir / "groupings/balanced/DONE.json")["num_samples"]["train"]
    assert sum(sizes) == 198
    assert max(sizes) <= 1.05 * 198 / 3  # the start, which is balanced, is all of them
    assert load_router(workdir, "balanced").centroids.centroid_KD.shape == (3, 12)


def count_one_by_one(workdir: Path, kind: str) -> np.ndarray:
    """A of Equation 3 or 4 from the scores of each training image; those that cannot be decoded are no images."""
    samples = load(workdir, "train")
    network = load_student(workdir / "students/generalist/model.safetensors")
    reader = SampleReader(samples, LabelTargets(samples, smear=False), network.image_size, None, seed=0)
    read = reader.read(np.arange(len(samples)), 0)
    with torch.inference_mode():
        best_NK = network(read.images).argsort(1, descending=True)[:, :3]
    a_CC = np.zeros((10, 10))
    for ordinal in np.flatnonzero(~read.skipped_B.numpy()):
        detected = best_NK[ordinal].tolist()
        for i in detected:
            for j in samples.taxonomy.smear(samples.labels(ordinal)) if kind == "confusion" else detected:
                a_CC[i, j] += 1
    return a_CC / 198


@pytest.mark.parametrize("kind", ["confusion", "co_detection"])
def test_the_groups_of_classes_are_those_of_the_detections(workdir, kind):
    given = Taxonomy.load(workdir / "shards/taxonomy.json")
    a_CC = count_one_by_one(workdir, kind)
    expected = cluster_classes(Similarity(a_CC.astype(np.float32)), 3, max_groups=5, seed=0)
    groups, _ = load_grouping(workdir, kind, given)
    assert groups.group_C.tolist() == ClassGroups.build(expected.group_C, given).group_C.tolist()
    done = load_json(workdir / f"groupings/{kind}/DONE.json")
    np.testing.assert_allclose(done["eigenvalues"], expected.eigenvalues, atol=1e-4)
    assert (workdir / f"groupings/{kind}/summary.png").read_bytes()[:4] == b"\x89PNG"


def test_two_processes_count_the_same_detections_as_one(workdir):
    arguments = ["group", "method=co_detection", *DETECTIONS, "name=shared", "batch_size=32", f"workdir={workdir}"]
    for rank in start_ranks(arguments, workdir.parent, 2, [{}, {}]):
        assert (finished := rank.wait()).code == 0, finished.err
    one, two = (load_json(workdir / f"groupings/{name}/DONE.json") for name in ("co_detection", "shared"))
    assert {**two, "config": ""} == {**one, "config": ""}


def test_the_control_has_the_sizes_of_the_other(workdir):
    given = Taxonomy.load(workdir / "shards/taxonomy.json")
    found, control = (load_grouping(workdir, name, given)[0] for name in ("confusion", "random"))
    assert control.sizes == found.sizes
    assert control.group_C.tolist() != found.group_C.tolist()


def test_the_control_of_given_verticals_has_their_sizes(workdir):
    concentrate(
        "group", "method=random", "method.of=null", "name=control", f"workdir={workdir}", directory=workdir.parent
    )
    given, control = (Taxonomy.load(workdir / path) for path in ("shards/taxonomy.json", "groupings/control.json"))
    assert sorted(control.vertical_sizes) == sorted(given.vertical_sizes)
    verticals = [{c.id: c.vertical for c in taxonomy.classes} for taxonomy in (given, control)]
    mixed = {(old, verticals[1][class_id]) for class_id, old in verticals[0].items()}
    assert len(mixed) > given.num_verticals, "classes of one vertical are in several"


def test_found_verticals_are_concentrated_as_given_ones_are(workdir, tmp_path):
    """The same shards under the found taxonomy, in a working directory of their own; every verb is the ordinary one."""
    found = f"workdir={tmp_path}/found"
    concentrate("prepare", "data=shards", f"data.path={workdir.parent}/given", "data.image_size=16", "num_processes=1",
                f"data.taxonomy={workdir}/groupings/confusion.json", found, directory=tmp_path)  # fmt: skip
    verticals = Taxonomy.load(tmp_path / "found/shards/taxonomy.json").verticals
    assert all(vertical.startswith("group-") for vertical in verticals)
    for vertical in verticals:
        concentrate(
            "teacher", f"vertical={vertical}", "trainer.max_skipped_share=0.1", found, *TINY, directory=tmp_path
        )
    concentrate("targets", found, directory=tmp_path)
    concentrate("student", "trainer.max_skipped_share=0.1", found, *TINY, directory=tmp_path)
    concentrate("evaluate", found, directory=tmp_path)
    evaluation = load_json(tmp_path / "found/evaluations/student.json")
    assert set(evaluation["pvap"]) == set(verticals)
    assert evaluation["mpvap"] > 0.2
    # The same images, found through the given taxonomy's labels and the ids that both have.
    concentrate("evaluate", f"images_of={workdir}", found, directory=tmp_path)
    through_map = load_json(tmp_path / "found/evaluations/student.on-work.json")
    assert {**through_map, "gallery": []} == {**evaluation, "gallery": []}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["method=confusion"], "method.top_k=100 of 10 classes: every class would be detected in every image"),
        (["method=random", "method.of=nothing"], "no grouping 'nothing'"),
        (["method=co_detection", "+method.smear=true"], "method.smear=True has no effect with co_detection"),
        (["method=confusion", "method.num_groups=1"], "num_groups=1"),
        (
            ["method=confusion", "method.num_groups=6"],
            "method.num_groups=6 of 10 classes: a group has at least two; ask for at most 5",
        ),
        (["method.network=nobody"], "students/nobody: not there or not finished"),
        (["method.num_groups=300"], "method.num_groups=300: more groups than the 64 samples"),
        (["method.num_groups=1"], "num_groups=1: Input should be greater"),
    ],
)
def test_a_mistake_is_one_line(workdir, options, expected):
    arguments = ["group"] if any(option.startswith("method=") for option in options) else FEATURES
    finished = concentrate(*arguments, "name=wrong", *options, f"workdir={workdir}", directory=workdir.parent, code=2)
    assert expected in one_line(finished)
