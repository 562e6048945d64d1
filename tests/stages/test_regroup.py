"""`concentrate remove` and `merge`: a working directory with fewer verticals, in which everything goes on."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import (
    TINY,
    Plant,
    concentrate,
    concentrate_here,
    draw_image,
    load_json,
    load_weights,
    taxonomy_of_fruit_and_tools,
    write_tar,
)

from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.networks.student import load_student
from concentration.targets import TargetFile
from concentration.taxonomy import Taxonomy

SKY = ("moon", "star", "comet")
#: Top-2 blocks of whole vectors: what is left of a product is summed in the same order then.
SIZES = ("top.top1=16", "top.top2=16")
ADD = (
    "teacher.base.channels=[4,8]", "teacher.base.norm=group", "teacher.top.top1=16", "teacher.top.top2=16",
    "teacher.top.norm=layer", "teacher.trainer.num_workers=0", "teacher.trainer.batch_size=16", "teacher.trainer.max_epochs=2",
    "trainer.num_workers=0", "trainer.batch_size=16", "trainer.max_epochs=1", "tolerance=0.99",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Fruit, tools and sky, a student that was concentrated of their teachers, and a shard with images of the sky alone."""
    directory = tmp_path_factory.mktemp("regroup")
    given, workdir = directory / "given", directory / "work"
    given.mkdir()
    taxonomy = taxonomy_of_fruit_and_tools()
    # `comet` lies below a fruit: a parent in another vertical, which loses its only child when the sky is removed.
    taxonomy["classes"] += [{"id": c, "vertical": "sky", "parents": ["cherry"] if c == "comet" else []} for c in SKY]
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))
    leaves = ("lemon", "yuzu", "cherry", "hammer", "saw", "drill", "file", *SKY)
    for split, count, shards in (("train", 120, 3), ("val", 40, 1), ("test", 40, 1)):
        of_split = []
        for number in range(count):
            label = leaves[number % len(leaves)]
            labels = [label, "saw"] if label in SKY and number % 4 == 3 else [label]
            of_split.append((f"{split}{number}", labels, draw_image(label, number)))
        for shard in range(shards):
            write_tar(given / f"{split}-{shard:06d}.tar", of_split[shard::shards])
    sky = [(f"sky{n}", [SKY[n % 3]], draw_image(SKY[n % 3], 900 + n)) for n in range(12)]
    write_tar(given / "train-000000a.tar", sky)
    concentrate_here("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}",
                "num_processes=1")  # fmt: skip
    common = (f"workdir={workdir}", *TINY, *SIZES)
    for vertical in ("fruit", "tools", "sky"):
        concentrate_here("teacher", f"vertical={vertical}", *common)
    concentrate_here("targets", f"workdir={workdir}", "targets.top_k=3", "targets.codec=packed")
    concentrate_here("student", "targets.top_k=3", "targets.codec=packed", *common)
    concentrate_here("evaluate", f"workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def removed(workdir) -> tuple[Path, str]:
    destination = workdir.parent / "removed"
    return destination, concentrate_here("remove", "vertical=sky", f"workdir={workdir}", f"destination={destination}")


def test_a_vertical_is_cut_out_and_the_others_say_what_they_said(workdir, removed):
    destination, out = removed
    assert "outputs by vertical, in order: fruit 6, tools 4" in out
    assert "1 classes have no class below them any more: cherry" in out
    done = load_json(destination / "students/student/DONE.json")
    assert done["pvap_after"] == done["pvap_before"], "exactly"
    assert done["mpvap_after"] == done["mpvap_before"]
    assert done["top1_after"] >= done["top1_before"], "no image is taken for a thing in the sky any more"
    before, after = load_weights(workdir / "students/student"), load_weights(destination / "students/student")
    np.testing.assert_array_equal(after["top.top2.weight"], before["top.top2.weight"][:32])
    for number in (0, 1):
        np.testing.assert_array_equal(
            after[f"top.classifiers.{number}.weight"], before[f"top.classifiers.{number}.weight"]
        )
    assert "top.classifiers.2.weight" not in after
    old, new = (load_student(d / "students/student/model.safetensors") for d in (workdir, destination))
    images = torch.rand(8, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(new(images), old(images)[:, :10])


def test_images_that_have_no_label_left_are_gone_and_the_others_keep_theirs(workdir, removed):
    destination, out = removed
    before, after = (Taxonomy.load(d / "shards/taxonomy.json") for d in (workdir, destination))
    assert [c.id for c in after.classes] == [c.id for c in before.classes if c.vertical != "sky"]
    assert after.classes[after.position["file"]].parents == ("citrus",)
    old, new = load_split(workdir / "shards", "train", before), load_split(destination / "shards", "train", after)
    assert len(new.shards) == 3, "the shard with images of the sky alone is gone"
    assert f"{len(new)} training images; {len(old) - len(new)} have no label left" in out
    expected = {}
    for ordinal in range(len(old)):
        ids = [before.class_of_output(output).id for output in old.labels(ordinal)]
        if left := sorted(set(ids) - set(SKY)):
            expected[old.key(ordinal)] = left
    found = {new.key(n): sorted(after.class_of_output(o).id for o in new.labels(n)) for n in range(len(new))}
    assert found == expected
    assert any("saw" in ids for ids in found.values())


def test_stored_targets_and_teachers_of_the_others_are_those_that_were(workdir, removed):
    destination, _ = removed
    before, after = (Taxonomy.load(d / "shards/taxonomy.json") for d in (workdir, destination))
    old, new = load_split(workdir / "shards", "train", before), load_split(destination / "shards", "train", after)

    def collect(directory: Path, split, vertical: str) -> dict[str, tuple]:
        size = split.taxonomy.vertical_sizes[split.taxonomy.vertical_number(vertical)]
        found = {}
        for number, name in enumerate(split.index_names):
            path = directory / "targets/default" / vertical / f"{name}.safetensors"
            if path.exists():
                file = TargetFile(path, size, min(3, size))
                file.verify()
                index, probability, _ = file.read(np.arange(len(file.row)))
                for row, of_row in zip(file.row, zip(index.tolist(), probability.tolist(), strict=True), strict=True):
                    found[split.key(int(split.shard_start[number] + row))] = of_row
        return found

    for vertical in ("fruit", "tools"):
        assert collect(destination, new, vertical) == collect(workdir, old, vertical) != {}
        file = f"teachers/{vertical}/model.safetensors"
        assert (destination / file).samefile(workdir / file)
    assert not (destination / "targets/default/sky").exists()
    assert not (destination / "teachers/sky").exists()


def test_the_new_directory_is_one_in_which_everything_goes_on(workdir, removed):
    destination, _ = removed
    where = f"workdir={destination}"
    again = concentrate_here("remove", "vertical=sky", f"workdir={workdir}", f"destination={destination}")
    assert "finished already" in again
    assert "finished already" in concentrate_here("teacher", "vertical=tools", where, *TINY, *SIZES)
    assert "finished already" in concentrate_here("targets", where, "targets.top_k=3", "targets.codec=packed")
    concentrate_here("student", "targets.top_k=3", "targets.codec=packed", "name=anew", where, *TINY, *SIZES,
                     "trainer.max_steps=2")  # fmt: skip
    concentrate_here("evaluate", where)
    concentrate_here("calibrate", where)
    evaluation, earlier = (load_json(d / "evaluations/student.json") for d in (destination, workdir))
    assert evaluation["pvap"].keys() == {"fruit", "tools"}
    # The test images of the sky that show a saw, too, count for tools in both.
    assert evaluation["pvap"] == {vertical: earlier["pvap"][vertical] for vertical in ("fruit", "tools")}
    concentrate_here("add", "vertical=tools", "name=better", where, *ADD)
    assert load_json(destination / "students/better/DONE.json")["ap_before"].keys() == {"fruit", "tools"}


def test_what_was_made_for_the_earlier_taxonomy_is_refused(workdir, removed, tmp_path):
    destination, _ = removed
    other = tmp_path / "other"
    shutil.copytree(destination, other)
    shutil.copytree(workdir / "students/student", other / "students/old")
    with pytest.raises(DataError, match="made for another taxonomy"):
        concentrate_here("evaluate", "name=old", f"workdir={other}")
    shutil.copytree(workdir / "targets/default", other / "targets/old")
    with pytest.raises(DataError, match=r"old/fruit/manifest.json: made from another taxonomy"):
        concentrate_here("student", "name=x", "targets.name=old", "targets.top_k=3", "targets.codec=packed",
                         f"workdir={other}", *TINY, *SIZES)  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("remove", ("vertical=sea",), "vertical=sea: .*no vertical 'sea'; valid: fruit, tools, sky"),
        ("remove", ("vertical=[fruit,tools,sky]",), "no vertical would be left without"),
        ("remove", ("vertical=[]",), "vertical=.*at least 1 item"),
        ("merge", ("verticals=[fruit]", "into=things"), "expected two or more"),
        ("merge", ("verticals=[fruit,tools]", "into=sky"), "there is a vertical 'sky' already"),
    ],
)
def test_what_cannot_be_done_is_one_line(workdir, verb, arguments, message):
    with pytest.raises(ConfigError, match=message):
        concentrate_here(verb, *arguments, f"workdir={workdir}", f"destination={workdir.parent / 'never'}")
    assert not (workdir.parent / "never").exists()


def test_a_destination_that_holds_something_else_is_refused(workdir, removed):
    destination, _ = removed
    with pytest.raises(ConfigError, match="is workdir, whose taxonomy"):
        concentrate_here("remove", "vertical=sky", f"workdir={workdir}", f"destination={workdir}")
    with pytest.raises(ConfigError, match="shards: is there already and something else; give another destination"):
        concentrate_here("remove", "vertical=tools", f"workdir={workdir}", f"destination={destination}")


@pytest.mark.parametrize("call", range(3, 24, 4))
def test_a_kill_leaves_nothing_behind(workdir, removed, tmp_path, call):
    """Half-carried folders stayed, and the report took them for teachers and sets of targets."""
    command = ("remove", "vertical=sky", f"workdir={workdir}", f"destination={tmp_path / 'new'}")
    concentrate(*command, directory=tmp_path, plant=Plant("os:replace", call), code=-signal.SIGKILL)
    concentrate(*command, directory=tmp_path)
    assert not list((tmp_path / "new").rglob("*.tmp"))
    name = "students/student/model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (removed[0] / name).read_bytes()


def test_verticals_are_merged_and_then_trained_together(workdir):
    destination = workdir.parent / "merged"
    out = concentrate_here(
        "merge", "verticals=[fruit,sky]", "into=nature", f"workdir={workdir}", f"destination={destination}"
    )
    assert "outputs by vertical, in order: nature 9, tools 4" in out
    assert f"concentrate add vertical=nature student=student workdir={destination}" in out
    taxonomy = Taxonomy.load(destination / "shards/taxonomy.json")
    assert taxonomy.lineage(taxonomy.output("comet")) == ("Fruit", "Berry", "Cherry", "comet"), "a parent inside now"
    student = load_student(destination / "students/student/model.safetensors")
    assert student.config.num_blocks == {"nature": 2}
    done = load_json(destination / "students/student/DONE.json")
    assert done["pvap_after"]["tools"] == done["pvap_before"]["tools"]
    assert not (destination / "teachers/nature").exists()
    concentrate_here("add", "vertical=nature", f"workdir={destination}", *ADD)
    after = load_json(destination / "students/next/DONE.json")
    assert after["ap_before"].keys() == {"nature", "tools"}
    assert after["num_images"] < after["num_images_of_retraining"]
    concentrate_here("evaluate", "name=next", f"workdir={destination}")
    assert load_json(destination / "evaluations/next.json")["pvap"].keys() == {"nature", "tools"}
