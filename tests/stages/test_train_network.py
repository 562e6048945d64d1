"""What all stages that train share: balanced orders, class weights, the prior, base checkpoints, small or missing splits."""

import collections
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from fit_runs import FEW, LABELS, curve, train
from real_runs import (
    LEAVES,
    TINY,
    TINY_NETWORK,
    concentrate,
    draw_image,
    load_json,
    load_weights,
    one_line,
    prepare_shards,
    read_labels,
    smear_by_walking,
    taxonomy_of_fruit_and_tools,
    write_shards,
    write_tar,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("fit"))


def test_a_balanced_order_shows_rare_classes_as_often_as_common_ones(tmp_path):
    """fruit's classes hold 1 sample in 20: one in seven of what a balanced epoch shows is each class's, nearly."""
    given = write_shards(tmp_path / "given")
    for path in given.glob("train-*.tar"):
        path.unlink()
    rare = [label if number % 20 == 0 else "saw" for number, label in zip(range(200), LEAVES * 30, strict=False)]
    write_tar(given / "train-000000.tar", [(f"t{n}", [label], draw_image(label, n)) for n, label in enumerate(rare)])
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip
    options = (*FEW, "trainer.max_steps=12", "trainer.log_every_steps=12")
    shares = {}
    for sampling in ("natural", "class_balanced"):
        run_path = train(tmp_path / "work", sampling, *options, f"trainer.sampling={sampling}")
        routed = {vertical: curve(run_path, f"train/{vertical}/routed")[-1] for vertical in ("fruit", "tools")}
        shares[sampling] = routed["fruit"] / sum(routed.values())
    present = set(rare)
    assert shares["natural"] < 0.08
    expected = len(present & {"lemon", "yuzu", "cherry"}) / len(present)
    assert shares["class_balanced"] == pytest.approx(expected, abs=0.12)


def test_a_balanced_teacher_counts_the_classes_of_its_own_vertical_alone(prepared):
    """Every seventh image has a label of the other vertical, too, by which no sample is drawn."""
    from concentration.data.split import load_split
    from concentration.stages.train_network import NetworkStageConfig, Task, _build_order
    from concentration.taxonomy import Taxonomy

    taxonomy = Taxonomy.load(prepared / "shards" / "taxonomy.json")
    split = load_split(prepared / "shards", "train", taxonomy)
    trainer = SimpleNamespace(sampling="class_balanced", window_shards=1)
    counts_C = split.count_labels()
    task = Task("", taxonomy, split, split.routed("tools"), None, counts_C, counts_C, vertical="tools")
    order = _build_order(cast(NetworkStageConfig, SimpleNamespace(trainer=trainer, seed=0)), task)
    drawn = order.take(0, np.arange(4000) % len(order)) if len(order) >= 4000 else np.concatenate(
        [order.take(epoch, np.arange(len(order))) for epoch in range(40)])  # fmt: skip
    tools = range(*taxonomy.vertical_slice("tools").indices(taxonomy.num_classes))
    counts = np.bincount(
        [min(o for o in split.labels(int(n)) if o in tools) for n in drawn], minlength=taxonomy.num_classes
    )
    shares = counts[tools.start : tools.stop] / counts.sum()
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_a_balanced_order_names_the_classes_that_it_never_draws_and_those_of_few_images(tmp_path):
    given = write_shards(tmp_path / "given")
    for path in given.glob("train-*.tar"):
        path.unlink()
    rare = [{0: "saw", 1: "yuzu"}.get(number, ("lemon", "hammer")[number % 2]) for number in range(200)]
    write_tar(given / "train-000000.tar", [(f"t{n}", [label], draw_image(label, n)) for n, label in enumerate(rare)])
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip

    def say(name: str, *options: str) -> str:
        workdir = f"workdir={tmp_path}/work"
        return concentrate(
            "student", f"name={name}", workdir, *FEW, "trainer.max_steps=1", *options, directory=tmp_path
        ).out

    said = say("a", "trainer.sampling=class_balanced")
    assert "3 of 7 leaves have no training image here, and are never drawn: cherry, drill, file\n" in said
    often = "2 classes have so few images that an epoch shows each over 20 times"
    assert f"student a: sampling=class_balanced: {often}" in said
    assert ": yuzu (50 times), saw (50 times)\n" in said
    assert "class_balanced" not in say("b")


def test_class_weights_change_the_loss_as_the_formula_says(prepared):
    """At the first step, before anything is learnt, both runs have the same logits."""
    options = (*FEW, "trainer.max_steps=1", "trainer.prior=false", "pace=fixed", "trainer.batch_size=200")
    plain = curve(train(prepared, "unweighted", *options), "train/loss")[0]
    weighted = curve(train(prepared, "weighted", *options, "trainer.class_weight=inverse_sqrt"), "train/loss")[0]
    assert weighted != pytest.approx(plain, rel=1e-3)
    assert 0.5 * plain < weighted < 2 * plain  # the mean weight is 1


def test_the_prior_starts_the_outputs_at_the_frequencies(prepared):
    options = (*FEW, "trainer.max_steps=1", "optimizer.lr=1e-12", "pace=none")
    weights = load_weights(train(prepared, "prior", *options))
    without = load_weights(train(prepared, "no_prior", *options, "trainer.prior=false"))
    taxonomy, count = taxonomy_of_fruit_and_tools(), collections.Counter()
    for labels in read_labels(prepared.parent / "given", "train"):
        count.update(smear_by_walking(labels, taxonomy))
    for number, vertical in enumerate(("fruit", "tools")):
        name = f"top.classifiers.{number}.bias"
        frequency_V = np.array([count[c["id"]] / 200 for c in taxonomy["classes"] if c["vertical"] == vertical])
        np.testing.assert_allclose(weights[name], np.log(frequency_V / (1 - frequency_V)), atol=1e-5)
        assert np.abs(without[name]).max() < 1e-6


@pytest.fixture(scope="module")
def generalist(prepared) -> Path:
    return train(prepared, "generalist", *TINY, *LABELS)


@pytest.mark.parametrize("how", ["name", "directory", "file"])
def test_a_base_checkpoint_is_where_training_starts(prepared, generalist, how):
    checkpoint = {"name": "generalist", "directory": generalist, "file": generalist / "model.safetensors"}[how]
    options = (*FEW, "optimizer=sgd", "optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.max_steps=1")
    run_path = train(prepared, f"from_{how}", *options, f"base.checkpoint={checkpoint}")
    expected, found = load_weights(generalist), load_weights(run_path)
    bases = [name for name in found if name.startswith("base.")]
    assert len(bases) >= 4
    for name in bases:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-7, err_msg=name)
    assert any(not np.allclose(found[name], expected[name]) for name in found if name.startswith("top."))


def test_a_base_checkpoint_of_another_base_is_refused(prepared, generalist):
    for other in ("base.channels=[4,16]", "base.norm=batch"):
        finished = train(prepared, "mismatch", *FEW, other, "base.checkpoint=generalist", "overwrite=true", code=2)
        message = one_line(finished)
        assert "another base network" in message
        assert "give the same base=" in message


def test_a_base_checkpoint_that_is_not_there_is_refused(prepared):
    message = one_line(train(prepared, "missing", *FEW, "base.checkpoint=genralist", code=2))
    assert "base.checkpoint=genralist: no finished run or file of that name" in message


def test_a_base_checkpoint_that_is_no_network_is_refused(prepared, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind" * 10)
    finished = train(prepared, "nonsense", *FEW, f"base.checkpoint={tmp_path}/other.safetensors", code=2)
    assert "other.safetensors" in one_line(finished)


def test_a_run_with_a_base_checkpoint_is_known_again_from_another_directory(prepared, generalist, tmp_path):
    """A working directory given as a relative path is the same working directory."""
    options = ("name=moved", *FEW, "base.checkpoint=generalist")
    concentrate("student", f"workdir={prepared}", *options, directory=tmp_path)
    concentrate("student", f"workdir={prepared.name}", *options, directory=prepared.parent)


def test_a_split_without_validation_trains(tmp_path):
    given = write_shards(tmp_path / "given")
    (given / "val-000000.tar").unlink()
    concentrate("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={tmp_path}/work",
                directory=tmp_path)  # fmt: skip
    run_path = train(tmp_path / "work", "blind", *TINY, *LABELS)
    assert load_json(run_path / "DONE.json")["step"] == 26
    assert not curve(run_path, "val/mpvap")
    # No validation can see what the last step did: the weights themselves are looked at.
    options = (*FEW, "trainer.max_steps=1", "optimizer=sgd", "optimizer.lr=3e38", "optimizer.weight_decay=1000")
    finished = train(tmp_path / "work", "last_step", *options, code=2)
    assert "the last step made weights that are not finite" in finished.err
    assert not (tmp_path / "work/students/last_step/model.safetensors").exists()


def test_a_batch_larger_than_the_data_is_the_data(prepared):
    run_path = train(prepared, "large", *TINY_NETWORK, *LABELS, "trainer.batch_size=1000", "trainer.max_epochs=3")
    assert load_json(run_path / "DONE.json")["step"] == 3
