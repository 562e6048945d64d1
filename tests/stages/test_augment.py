"""`concentrate augment`: a trained network grows, what was there stays bit by bit, and the ordinary verbs go on with it."""

from pathlib import Path

import numpy as np
import pytest
from real_runs import TINY, Plant, concentrate, load_json, load_weights, one_line, prepare_shards

GROWN = ("heads.hidden=[16,24]", *(option for option in TINY if option.startswith("trainer.")))
CLASSIFIER = ("top.classifiers.", "pace.")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A generalist with batch statistics, groups by its confusions, and the augmented network with its evaluations."""
    directory = tmp_path_factory.mktemp("augment")
    workdir = prepare_shards(directory)
    run(workdir, "student", "name=generalist", "targets=labels", *TINY, "base.norm=batch", "top.norm=batch",
        "trainer.max_epochs=6")  # fmt: skip
    run(workdir, "group", "method=confusion", "method.top_k=3", "method.num_groups=3", "method.split=train")
    run(workdir, "augment", *GROWN)
    for options in (["name=generalist"], ["name=augmented"], ["name=augmented", "head_threshold=0.2"]):
        run(workdir, "evaluate", *options)
    return workdir


def run(workdir: Path, *arguments: str, **options):
    return concentrate(*arguments, f"workdir={workdir}", directory=workdir.parent, **options)


def compare(workdir: Path, before: str, after: str) -> tuple[set[str], set[str]]:
    """The tensors of the earlier network that stayed bit by bit, and those that did not."""
    old, new = (load_weights(workdir / "students" / name) for name in (before, after))
    same = {name for name in old if np.array_equal(old[name], new[name])}
    return same, set(old) - same


def test_the_old_network_is_in_the_new_one_bit_by_bit(workdir):
    same, changed = compare(workdir, "generalist", "augmented")
    assert all(name.startswith(CLASSIFIER) for name in changed)
    assert {"base.blocks.0.1.running_var", "top.top1_norm.num_batches_tracked", "top.top2.weight"} <= same
    assert not any(name.startswith("top.classifiers.") for name in same), "the classifier is trained afresh"
    heads = {name.split(".")[3] for name in load_weights(workdir / "students/augmented") if ".heads." in name}
    assert heads == {"0", "1", "2"}


def test_it_is_evaluated_and_reported_as_any_student(workdir):
    found = {path.stem: load_json(path) for path in (workdir / "evaluations").glob("*.json")}
    base, whole, part = (found[name] for name in ("generalist", "augmented", "augmented.heads-0.2"))
    assert whole["num_parameters"]["base"] == base["num_parameters"]["base"]
    assert whole["num_parameters"]["total"] > base["num_parameters"]["total"]
    assert whole["multiply_adds"] - base["multiply_adds"] > part["multiply_adds"] - base["multiply_adds"] > 0
    assert part["saved_multiply_adds"] == whole["multiply_adds"] - part["multiply_adds"]
    assert 0 < part["mean_heads_evaluated"] < part["num_heads"] == 3
    assert whole["map_at_50"] > 0.4
    run(workdir, "report", "name=augmented")
    assert set(load_json(workdir / "report/metrics.json")) == set(found)
    again = run(workdir, "augment", *GROWN)
    assert "finished already" in again.out


@pytest.mark.long
def test_a_killed_run_ends_where_an_undisturbed_one_does(workdir):
    options = ("name=killed", "trainer.checkpoint_every_seconds=0", *GROWN)
    plant = Plant("concentration.training.module:StudentModule.training_step", call=20)
    run(workdir, "augment", *options, plant=plant, code=-9)
    run(workdir, "augment", *options)
    expected, found = (load_weights(workdir / "students" / name) for name in ("augmented", "killed"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_it_grows_again_at_another_layer_with_other_capacities(workdir):
    run(workdir, "augment", "name=twice", "network=augmented", "heads.layer=top1", "heads.capacity=classes", *GROWN)
    same, changed = compare(workdir, "augmented", "twice")
    assert all(name.startswith(CLASSIFIER) or name.endswith("classify.weight") for name in changed)
    assert any(name.startswith("augmentations.0.heads.0.hidden.") for name in same)
    weights = load_weights(workdir / "students/twice")
    widths = {weights[f"augmentations.1.heads.{head}.classify.weight"].shape[1] for head in range(3)}
    assert len(widths) > 1
    run(workdir, "evaluate", "name=twice")


def test_without_heads_the_whole_network_is_tuned(workdir):
    options = ("heads=null", "trainer.prior=false", "optimizer.lr=0.01", *GROWN[1:])
    run(workdir, "augment", "name=tuned", "network=augmented", *options)
    _, changed = compare(workdir, "augmented", "tuned")
    assert {"base.blocks.0.0.weight", "top.top1.weight", "augmentations.0.heads.0.hidden.0.weight"} <= changed
    assert "augmentations.0.place_C" not in changed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["heads.grouping=nothing"], "no grouping 'nothing'"),
        (["network=nobody"], "students/nobody: not there or not finished"),
        (["heads=null"], "trainer.prior=true with heads=null"),
        (["name=generalist"], "name=generalist is another network's"),
        (["trainer.shard_head=true"], "trainer.shard_head=true: not for a network with auxiliary heads"),
        (["heads.convolutions=[4]", "heads.layer=top1"], "convolutions=[4] need a map"),
    ],
)
def test_a_mistake_is_one_line(workdir, options, expected):
    finished = run(workdir, "augment", "name=wrong", *options, code=2)
    assert expected in one_line(finished)
    assert not (workdir / "students/wrong/config.json").exists()


def test_heads_that_are_not_there_cannot_be_left_out(workdir):
    finished = run(workdir, "evaluate", "name=generalist", "head_threshold=0.1", code=2)
    assert "no auxiliary heads" in one_line(finished)
