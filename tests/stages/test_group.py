"""`concentrate group`: groups of samples and classes by a trained network's features, and what later verbs make of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import TINY, concentrate, load_json, one_line, prepare_shards, start_ranks
from sklearn.metrics import adjusted_rand_score

from concentration.data.index import load_split
from concentration.data.loader import SampleReader
from concentration.data.order import SequentialOrder
from concentration.data.sample_targets import LabelTargets
from concentration.grouping.sample_groups import NO_GROUP, CentroidRouter
from concentration.networks.student import load_student
from concentration.stages.group import load_grouping, load_router, load_sample_groups
from concentration.taxonomy import Taxonomy

FEATURES = ("group", "method=features", "method.num_groups=3", "method.num_start=64", "batch_size=24")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist and groups by its features; two training images cannot be decoded."""
    directory = tmp_path_factory.mktemp("group")
    workdir = prepare_shards(directory, damaged=(3, 50))
    concentrate("student", "name=generalist", "targets=labels", "trainer.max_skipped_share=0.1", f"workdir={workdir}",
                *TINY, directory=directory)  # fmt: skip
    concentrate(*FEATURES, f"workdir={workdir}", directory=directory)
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
    options = ("method.balanced=true", "method.layer=top1", "name=balanced")
    concentrate(*FEATURES, *options, f"workdir={workdir}", directory=workdir.parent)
    sizes = load_json(workdir / "groupings/balanced/DONE.json")["num_samples"]["train"]
    assert sum(sizes) == 198
    assert max(sizes) < 1.35 * 198 / 3
    assert load_router(workdir, "balanced").centroids.centroid_KD.shape == (3, 12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["method.network=nobody"], "students/nobody: not there or not finished"),
        (["method.num_groups=300"], "method.num_groups=300: more groups than the 64 samples"),
        (["method.num_groups=1"], "num_groups=1: Input should be greater"),
    ],
)
def test_a_mistake_is_one_line(workdir, options, expected):
    finished = concentrate(*FEATURES, "name=wrong", *options, f"workdir={workdir}", directory=workdir.parent, code=2)
    assert expected in one_line(finished)
