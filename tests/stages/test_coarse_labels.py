"""Images with labels of inner classes alone: in training on labels or not, and in a student's soft targets all the same."""

from pathlib import Path

import numpy as np
import pytest
from real_runs import TINY, concentrate, load_json, load_lines, one_line

from concentration.data.split import load_split
from concentration.errors import DataError
from concentration.stages.student import HardTargetsConfig, LearningConfig, choose_ordinals, count_classes
from concentration.stages.train_network import find_fine
from concentration.taxonomy import Taxonomy

NUM_CHARACTERS, NUM_DRAWINGS, NUM_COARSE, BATCH = 12, 4, 8, 16
DATA = ("data.verticals=[greek,arrows]", f"data.num_classes={NUM_CHARACTERS}", f"data.num_drawings={NUM_DRAWINGS}",
        f"data.num_coarse_drawings={NUM_COARSE}", "data.image_size=16", "num_processes=1")  # fmt: skip
OPTIONS = (*TINY, f"trainer.batch_size={BATCH}", "trainer.max_epochs=3", "trainer.log_every_steps=1")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("coarse")
    concentrate("prepare", *DATA, "workdir=work", directory=directory)
    return directory / "work"


def count_steps(run_path: Path) -> int:
    return max(line["step"] for line in load_lines(run_path) if "train/loss" in line)


def train(workdir: Path, verb: str, *options: str) -> None:
    concentrate(verb, f"workdir={workdir}", *OPTIONS, *options, directory=workdir.parent)


def test_the_fine_samples_are_the_slow_ones(workdir):
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    for vertical in (None, *taxonomy.verticals):
        expected = [
            ordinal
            for ordinal in range(len(split))
            if any(
                taxonomy.is_leaf[output] and vertical in (None, taxonomy.class_of_output(output).vertical)
                for output in split.labels(ordinal)
            )
        ]
        np.testing.assert_array_equal(split.with_leaf(vertical), expected)
    assert len(split.with_leaf()) == NUM_CHARACTERS * NUM_DRAWINGS
    assert len(split) == NUM_CHARACTERS * (NUM_DRAWINGS + NUM_COARSE)


def test_they_are_left_out_of_training_on_labels_and_not_of_soft_targets(workdir):
    train(workdir, "student", "name=all", "targets=labels")
    train(workdir, "student", "name=fine", "targets=labels", "coarse_labels=skip")
    for vertical in ("greek", "arrows"):
        train(workdir, "teacher", f"vertical={vertical}", "coarse_labels=skip")
    concentrate("targets", f"workdir={workdir}", directory=workdir.parent)
    train(workdir, "student", "name=taught")
    num_fine, num_all = NUM_CHARACTERS * NUM_DRAWINGS, NUM_CHARACTERS * (NUM_DRAWINGS + NUM_COARSE)
    found = {name: count_steps(workdir / "students" / name) for name in ("all", "fine", "taught")}
    assert found == {"all": 3 * num_all // BATCH, "fine": 3 * num_fine // BATCH, "taught": 3 * num_all // BATCH}
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    for vertical in taxonomy.verticals:
        num_leaves = int(taxonomy.is_leaf[taxonomy.vertical_slice(vertical)].sum())
        assert count_steps(workdir / "teachers" / vertical) == -(-num_leaves * NUM_DRAWINGS // BATCH) * 3
        stored = load_json(workdir / "targets/default" / vertical / "DONE.json")
        assert stored["num_records"] == num_leaves * (NUM_DRAWINGS + NUM_COARSE)


def test_a_vertical_of_which_nothing_would_be_left_is_named(workdir):
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    num_arrows = len(split.with_leaf("arrows"))
    is_greek = taxonomy.vertical_of_output == taxonomy.vertical_number("greek")
    inner = int(np.flatnonzero(is_greek & ~taxonomy.is_leaf)[0])
    split.label_output[(is_greek & taxonomy.is_leaf)[split.label_output]] = inner
    with pytest.raises(DataError, match="no training image has a leaf of greek among its labels"):
        find_fine(split)
    assert len(find_fine(split, "arrows")) == num_arrows


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("student", "coarse_labels=skip"),
            "coarse_labels=skip with targets=soft: teachers say the leaves of all images",
        ),
        (("run", "experiment=compare", "hydra.mode=RUN", "coarse_labels=skip"), "coarse_labels=skip with compare"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(workdir, arguments, expected):
    finished = concentrate(*arguments, f"workdir={workdir}", directory=workdir.parent, code=2)
    assert expected in one_line(finished)


def test_data_without_any_leaf_says_so(tmp_path):
    concentrate("prepare", *DATA[:2], "data.num_drawings=1", "data.image_size=16", "num_processes=1", "workdir=work",
                directory=tmp_path)  # fmt: skip
    taxonomy = Taxonomy.load(tmp_path / "work/shards/taxonomy.json")
    split = load_split(tmp_path / "work/shards", "train", taxonomy)
    split.label_output[:] = int(np.flatnonzero(~taxonomy.is_leaf)[0])
    with pytest.raises(DataError, match="no training image has a leaf of greek, arrows among its labels"):
        find_fine(split)


@pytest.mark.parametrize("outside", ["zero", "mask", 0.25])
def test_class_frequencies_are_those_of_the_images_that_are_left(workdir, outside):
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    config = LearningConfig(targets=HardTargetsConfig(), coarse_labels="skip", outside=outside)
    left = [ordinal for ordinal in range(len(split)) if any(taxonomy.is_leaf[list(split.labels(ordinal))])]
    counts, seen = np.zeros(taxonomy.num_classes), np.zeros(taxonomy.num_classes)
    for ordinal in left:
        smeared = taxonomy.smear(split.labels(ordinal))
        counts[list(smeared)] += 1
        own = {int(taxonomy.vertical_of_output[output]) for output in split.labels(ordinal)}
        seen += np.where(np.isin(taxonomy.vertical_of_output, list(own)), 1, config.outside_weight)
    found_C, frequency_C = count_classes(config, split, choose_ordinals(config, split))
    np.testing.assert_array_equal(found_C, counts)
    np.testing.assert_allclose(frequency_C, counts / seen)
