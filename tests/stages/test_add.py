"""`concentrate add`: a vertical comes, the old ones stay, and only what is new is made."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from real_runs import (
    TINY,
    TINY_TRAINER,
    Plant,
    append_sky,
    concentrate,
    concentrate_here,
    draw_image,
    load_json,
    load_weights,
    prepare_shards_here,
    start_ranks,
    write_tar,
)

from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.stages.add import choose_samples
from concentration.taxonomy import Taxonomy

TINY_ADD = (
    *TINY_TRAINER, "teacher.base.channels=[4,8]", "teacher.base.norm=group", "teacher.top.top1=12", "teacher.top.top2=8",
    "teacher.top.norm=layer", "teacher.trainer.num_workers=0", "teacher.trainer.batch_size=16", "teacher.trainer.max_epochs=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A student of fruit and tools in service, and the images of a third vertical that have just come."""
    directory = tmp_path_factory.mktemp("add")
    workdir = prepare_shards_here(directory)
    common = (f"workdir={workdir}", *TINY)
    for vertical in ("fruit", "tools"):
        concentrate_here("teacher", f"vertical={vertical}", *common)
    concentrate_here("targets", f"workdir={workdir}", "targets.top_k=5")
    concentrate_here("student", "targets.top_k=5", *common)
    append_sky(directory)
    return workdir


def test_a_vertical_comes_and_the_old_ones_stay(workdir):
    arguments = ("add", "vertical=sky", f"workdir={workdir}", "trainable=new", "tolerance=0.0001", *TINY_ADD)
    out = concentrate_here(*arguments)
    assert "that training next anew would take" in out
    done = load_json(workdir / "students/next/DONE.json")
    assert done["ap_before"].keys() == {"fruit", "tools"}
    assert done["ap_after"] == pytest.approx(done["ap_before"], abs=1e-4)
    # 48 images of sky and as many old ones, twice; the whole would be 248 twice.
    assert (done["num_images"], done["num_images_of_retraining"]) == (192, pytest.approx(2 * 248, rel=0.05))
    before, after = load_weights(workdir / "students/student"), load_weights(workdir / "students/next")
    for name, array in before.items():
        np.testing.assert_array_equal(after[name][: len(array)] if array.ndim else after[name], array, err_msg=name)
    assert len(after["top.top2.weight"]) == 3 * 8
    assert "top.classifiers.2.weight" in after
    for vertical in ("fruit", "tools"):
        for file in (workdir / "targets/default" / vertical).glob("*.safetensors"):
            assert file.samefile(workdir / "targets/next" / vertical / file.name), "old targets are not made again"
    assert not (workdir / "targets/next/fruit/train-000004.safetensors").exists(), "no new image is a fruit"
    assert (workdir / "targets/next/tools/train-000004.safetensors").exists(), "some are labelled with a tool"
    assert "finished already" in concentrate_here(*arguments)
    concentrate_here("evaluate", "name=next", f"workdir={workdir}")
    assert load_json(workdir / "evaluations/next.json")["pvap"].keys() == {"fruit", "tools", "sky"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("teacher", "vertical=fruit", *TINY),
        ("targets", "vertical=fruit", "targets.top_k=5"),
        ("evaluate", "name=student"),
        ("student", "name=new", "targets.top_k=5", *TINY),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_from_before_says_that_classes_may_have_come_and_how_a_student_gets_them(workdir, arguments):
    with pytest.raises((ConfigError, DataError)) as error:
        concentrate_here(*arguments, f"workdir={workdir}")
    assert "another configuration" not in str(error.value)
    assert (
        "where `prepare append=true` has brought classes, extend a student by them: `concentrate add vertical=NAME`"
        in str(error.value)
    )


def test_two_processes_add_what_one_adds_its_teacher_and_targets_included(workdir, tmp_path):
    for folder in ("given", "work"):
        shutil.copytree(workdir.parent / folder, tmp_path / folder)
    shutil.rmtree(tmp_path / "work/teachers/sky", ignore_errors=True)
    command = ("add", "vertical=sky", "workdir=work", "tolerance=0.99", *TINY_ADD, "optimizer.lr=0.01")
    for running in start_ranks((*command, "name=two", "trainer.devices=2"), tmp_path, 2, [{}, {}]):
        finished = running.wait()
        assert finished.code == 0, finished.err
    concentrate(*command, "name=one", directory=tmp_path)
    one, two = (load_weights(tmp_path / "work/students" / name) for name in ("one", "two"))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    same = [(tmp_path / f"work/targets/{name}/sky/train-000004.safetensors").read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]


def test_what_old_verticals_lose_is_an_error_that_a_larger_tolerance_lifts(workdir):
    arguments = ("add", "vertical=sky", f"workdir={workdir}", "name=hasty", "replay=0", "optimizer.lr=3", *TINY_ADD)
    with pytest.raises(ConfigError) as error:
        concentrate_here(*arguments)
    message = str(error.value)
    assert "the AP of old verticals fell on val: " in message
    assert "give more replay than 0, a lower optimizer.lr or trainable=new" in message
    assert not (workdir / "students/hasty/DONE.json").exists()
    concentrate_here(*arguments, "tolerance=0.99")
    done = load_json(workdir / "students/hasty/DONE.json")
    assert min(done["ap_after"][v] - done["ap_before"][v] for v in ("fruit", "tools")) < -0.01


def test_names_that_are_taken_and_verticals_that_are_none_are_refused(workdir):
    with pytest.raises(ConfigError, match="name=student is taken"):
        concentrate_here("add", "vertical=sky", "name=student", f"workdir={workdir}")
    with pytest.raises(DataError, match="no vertical 'sea'; valid: fruit, tools, sky"):
        concentrate_here("add", "vertical=sea", f"workdir={workdir}")


def test_a_student_that_learned_from_labels_goes_on_with_labels(earlier):
    workdir = earlier["labels"]
    done = _add_sky(workdir, "student=generalist", "name=grown")
    assert done["learning"]["targets"] == {"kind": "labels"}
    assert done["learning"]["smear"] is True
    assert not (workdir / "targets").exists()
    assert not (workdir / "teachers").exists()
    again = _add_sky(workdir, "student=grown", "name=more", verticals="tools")
    assert again["learning"] == done["learning"]
    assert again["epochs"] == done["epochs"]


def test_a_student_of_teachers_in_the_loop_gets_stored_targets_of_all(earlier):
    workdir = earlier["online"]
    done = _add_sky(workdir, "student=student", "name=next")
    kept = {"kind": "soft", "name": "next", "top_k": 4, "views": 0, "codec": "plain"}
    assert done["learning"]["targets"] == kept
    assert done["learning"]["outside"] == 0.5, "as it learned"
    assert {path.name for path in (workdir / "targets/next").iterdir()} == {"fruit", "tools", "sky"}


def test_a_view_is_refused_where_stored_ones_are_replayed(earlier):
    with pytest.raises(
        ConfigError, match="replaying replays 2 stored views of each image, and so does next; remove it"
    ):
        _add_sky(earlier["online"], "student=replaying", "name=next", "data.view={flip: 0.5}")


def test_a_softmax_is_refused_before_anything_is_made(earlier):
    workdir = earlier["labels"]
    with pytest.raises(ConfigError, match="loss=softmax cannot be extended: its classes exclude each other"):
        _add_sky(workdir, "student=softmax")
    assert not (workdir / "teachers").exists()


def _copy_with_next(workdir: Path, directory: Path) -> Path:
    """A copy of a working directory, in which sky is added."""
    if not (workdir / "students/next/DONE.json").exists():
        concentrate_here("add", "vertical=sky", f"workdir={workdir}", "tolerance=0.99", *TINY_ADD)
    shutil.copytree(workdir, directory / "work")
    return directory / "work"


def _add_sky(workdir: Path, *arguments: str, verticals: str = "sky") -> dict:
    concentrate_here("add", f"vertical={verticals}", f"workdir={workdir}", *TINY_ADD, "tolerance=0.99", *arguments)
    [name] = [word.removeprefix("name=") for word in arguments if word.startswith("name=")]
    return load_json(workdir / "students" / name / "DONE.json")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> dict[str, Path]:
    """By how a student learned: a working directory with one of fruit and tools, and the sky that came."""
    found, plain = {}, tmp_path_factory.mktemp("add-plain")
    prepare_shards_here(plain)
    for kind in ("labels", "online"):
        directory = plain / kind
        directory.mkdir()
        workdir = directory / "work"
        shutil.copytree(plain / "given", directory / "given")
        concentrate_here("prepare", "data=shards", f"data.path={directory / 'given'}", "data.image_size=16",
                         f"workdir={workdir}", "num_processes=1")  # fmt: skip
        common = (f"workdir={workdir}", *TINY, "trainer.max_epochs=1")
        if kind == "online":
            for vertical in ("fruit", "tools"):
                concentrate_here("teacher", f"vertical={vertical}", *common)
            concentrate_here("student", "targets=online", "targets.top_k=4", "outside=0.5", *common)
            views = ("targets.name=views", "targets.views=2")
            concentrate_here("targets", *views, f"workdir={workdir}")
            concentrate_here("student", "name=replaying", *views, *common, "trainer.max_steps=1")
        else:
            concentrate_here("student", "name=generalist", "targets=labels", "smear=true", *common)
            concentrate_here(
                "student", "name=softmax", "targets=labels", "loss=softmax", *common, "trainer.max_steps=1"
            )
        append_sky(directory)
        found[kind] = workdir
    return found


def test_all_new_samples_and_as_many_old_ones_as_asked_are_seen(workdir):
    taxonomy = Taxonomy.load(workdir / "shards/taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    new = set(split.routed("sky").tolist())
    for replay in (0.0, 0.5, 2.0, 99.0):
        chosen = choose_samples(split, ("sky",), replay, seed=1)
        assert new <= set(chosen.tolist())
        assert len(chosen) == min(len(split), len(new) + round(replay * len(new)))
        assert (np.diff(chosen) > 0).all()


def test_a_better_teacher_is_learned_from_and_the_old_verticals_stay(workdir):
    if not (workdir / "students/next/DONE.json").exists():
        concentrate_here("add", "vertical=sky", f"workdir={workdir}", *TINY_ADD, "tolerance=0.99")
    shutil.copytree(workdir, workdir.parent / "better")
    workdir = workdir.parent / "better"
    same = (f"workdir={workdir}", "student=next", "vertical=tools", *TINY_ADD)
    with pytest.raises(ConfigError, match="trainable=new: next has all classes of tools, so nothing would be trained"):
        concentrate_here("add", *same, "name=held", "trainable=new")
    before = load_json(workdir / "teachers/tools/DONE.json")["checkpoint"]
    concentrate_here("teacher", "vertical=tools", f"workdir={workdir}", *TINY, "trainer.max_epochs=6", "overwrite=true")
    after = load_json(workdir / "teachers/tools/DONE.json")["checkpoint"]
    assert after != before
    with pytest.raises(ConfigError, match=r"another teacher than made .*; add this vertical, too"):
        concentrate_here("add", f"workdir={workdir}", "student=next", "vertical=fruit", "name=wrong", *TINY_ADD)
    concentrate_here("add", *same, "name=taught", "tolerance=0.99")
    assert load_json(workdir / "targets/taught/tools/DONE.json")["teacher"] == after
    assert load_json(workdir / "targets/next/tools/DONE.json")["teacher"] == before, "the old set stays"
    for vertical in ("fruit", "sky"):
        for file in (workdir / "targets/next" / vertical).glob("*.safetensors"):
            assert file.samefile(workdir / "targets/taught" / vertical / file.name)
    done = load_json(workdir / "students/taught/DONE.json")
    assert done["ap_before"].keys() == {"fruit", "tools", "sky"}
    assert done["num_images"] < done["num_images_of_retraining"]


def test_an_add_that_more_images_overtake_is_refused_with_what_then_works(workdir, tmp_path):
    given, workdir = workdir.parent / "given", _copy_with_next(workdir, tmp_path)
    arguments = ("add", "vertical=sky", f"workdir={workdir}", "tolerance=0.99", *TINY_ADD)
    late = given / "train-000005.tar"
    write_tar(late, [(f"late{n}", ["saw"], draw_image("saw", n)) for n in range(5)])
    concentrate_here("prepare", "data=shards", f"data.path={given}", "data.image_size=16",
                     f"workdir={workdir}", "num_processes=1", "append=true")  # fmt: skip
    with pytest.raises(ConfigError, match=r"upstream\.data .*; make it anew with overwrite=changed"):
        concentrate_here(*arguments)
    concentrate_here(*arguments, "overwrite=changed")
    late.unlink()
    for vertical in ("fruit", "tools"):
        for file in (workdir / "targets/default" / vertical).glob("*.safetensors"):
            carried = workdir / "targets/next" / vertical / file.name
            assert file.samefile(carried), "old targets are carried over again"
    assert (workdir / "targets/next/tools/train-000005.safetensors").exists()


def test_targets_of_a_finished_add_are_replaced_where_that_is_asked_for_alone(workdir, tmp_path):
    workdir = _copy_with_next(workdir, tmp_path)
    arguments = ("add", "vertical=sky", f"workdir={workdir}", "tolerance=0.99", *TINY_ADD)
    targets = workdir / "targets/next/sky"
    before = {path: path.read_bytes() for path in targets.glob("*.*") if path.name != "status.json"}
    concentrate_here("teacher", "vertical=sky", f"workdir={workdir}", *TINY, "seed=4", "overwrite=true")
    with pytest.raises(
        ConfigError, match=r"targets/next/sky: .*upstream\.teacher .*make it anew with overwrite=changed"
    ):
        concentrate_here(*arguments)
    assert {path: path.read_bytes() for path in before} == before
    concentrate_here(*arguments, "overwrite=changed")
    teacher = load_json(workdir / "teachers/sky/DONE.json")["checkpoint"]
    assert load_json(targets / "DONE.json")["teacher"] == teacher


def test_a_set_knows_its_teacher_before_old_targets_are_in_it(workdir, tmp_path):
    """Or those of a killed run would be taken for those of a teacher that came since."""
    arguments = ("add", "vertical=sky", "name=killed", f"workdir={workdir}", *TINY_ADD)
    concentrate(
        *arguments, directory=tmp_path, plant=Plant("concentration.stages.carried_targets:link_file", call=2), code=-9
    )
    begun = load_json(workdir / "targets/killed/fruit/config.json")["identity"]["upstream"]
    assert begun["teacher"] == load_json(workdir / "teachers/fruit/DONE.json")["checkpoint"]
    assert len(list((workdir / "targets/killed/fruit").glob("*.safetensors"))) == 1
    concentrate_here(*arguments, "tolerance=0.99")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "students/student/model.safetensors",
            b"",
            "students/student/model.safetensors: missing or changed since training",
        ),
        ("targets/default/fruit/manifest.json", None, "targets.name=default vertical=fruit overwrite=true`"),
        ("targets/default/fruit/manifest.json", b"{}", "targets/default/fruit: made for another taxonomy"),
    ],
)
def test_what_an_earlier_stage_made_and_is_another_file_now_is_refused(workdir, file, content, message):
    path = workdir / file
    was = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        with pytest.raises(DataError) as error:
            concentrate_here("add", "vertical=sky", "name=other", f"workdir={workdir}", *TINY_ADD)
    finally:
        path.write_bytes(was)
    assert message in str(error.value)


def test_an_extended_student_is_extended_again_by_classes_that_come_to_an_old_vertical(workdir):
    """The last test here: it changes the data."""
    directory, same = workdir.parent, (f"workdir={workdir}", *TINY_ADD)
    if not (workdir / "students/next/DONE.json").exists():
        concentrate_here("add", "vertical=sky", *same, "tolerance=0.99")
    given = directory / "given"
    taxonomy = json.loads((given / "taxonomy.json").read_text())
    taxonomy["classes"].append({"id": "melon", "vertical": "fruit", "parents": ["fruit"]})
    (given / "taxonomy.json").write_text(json.dumps(taxonomy))
    for split, number in (("train", 5), ("val", 2)):
        samples = [(f"melon-{split}{n}", ["melon"], draw_image("melon", 5000 + n)) for n in range(20)]
        write_tar(given / f"{split}-{number:06d}.tar", samples)
    concentrate_here("prepare", "data=shards", f"data.path={given}", "data.image_size=16", f"workdir={workdir}",
                "num_processes=1", "append=true")  # fmt: skip
    later = ("add", "student=next", "name=later", "tolerance=0.99", *same)
    with pytest.raises(ConfigError) as error:
        concentrate_here(*later, "vertical=tools")
    message = str(error.value)
    assert "fruit came or got classes since next was trained, too; give all: vertical=[tools,fruit]" in message
    concentrate_here(*later, "vertical=fruit")
    done = load_json(workdir / "students/later/DONE.json")
    assert done["ap_before"].keys() == {"fruit", "tools", "sky"}
    assert done["epochs"] == pytest.approx(2.0, rel=0.05), "of the first student's training"
    concentrate_here("evaluate", "name=later", "split=val", f"workdir={workdir}")
    weights = load_weights(workdir / "students/later")
    assert len(weights["top.classifiers.0.weight"]) == 7
