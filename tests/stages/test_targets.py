"""`concentrate targets`: what is stored is what the teachers say."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from pages import list_examples
from real_runs import (
    TINY,
    Running,
    concentrate,
    load_json,
    load_weights,
    one_line,
    prepare_shards,
    read_labels,
    taxonomy_of_fruit_and_tools,
)

from concentration.data.reader import SampleReader
from concentration.data.sample_targets import StoredTargets
from concentration.data.split import load_split
from concentration.networks.student import load_student
from concentration.targets import TargetFile, TargetRecords
from concentration.taxonomy import Taxonomy

TOP_K = 3
CLASSES = {
    vertical: [c["id"] for c in taxonomy_of_fruit_and_tools()["classes"] if c["vertical"] == vertical]
    for vertical in ("fruit", "tools")
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Two teachers and their targets; every seventh image has a label in each vertical."""
    directory = tmp_path_factory.mktemp("targets")
    workdir = prepare_shards(directory, damaged=(8,))
    for vertical in CLASSES:
        concentrate("teacher", f"vertical={vertical}", f"workdir={workdir}", "trainer.max_skipped_share=0.1", *TINY,
                    directory=directory)  # fmt: skip
    concentrate("targets", f"targets.top_k={TOP_K}", "batch_size=13", f"workdir={workdir}", directory=directory)
    return workdir


@pytest.fixture(scope="module")
def images(workdir) -> dict[str, torch.Tensor]:
    """The decoded training images by shard, (S, 3, H, W); black where one cannot be decoded."""
    import io
    import tarfile

    from PIL import Image, UnidentifiedImageError

    decoded = {}
    for path in sorted((workdir.parent / "given").glob("train-*.tar")):
        pictures = []
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".png"):
                    try:
                        pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
                    except UnidentifiedImageError:
                        pixels = np.zeros((16, 16, 3), np.uint8)
                    pictures.append(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        decoded[path.stem] = torch.stack(pictures)
    return decoded


@pytest.fixture(scope="module")
def labels(workdir) -> dict[str, list[list[str]]]:
    every = read_labels(workdir.parent / "given", "train")
    return {f"train-{shard:06d}": every[shard * 50 : (shard + 1) * 50] for shard in range(4)}


@pytest.mark.parametrize("vertical", ["fruit", "tools"])
def test_every_record_is_the_top_of_the_teachers_own_sigmoids(workdir, images, labels, vertical):
    teacher = load_student(workdir / "teachers" / vertical / "model.safetensors")
    num_records = 0
    for shard, pictures in images.items():
        records = safetensors.numpy.load_file(workdir / "targets/default" / vertical / f"{shard}.safetensors")
        with torch.no_grad():
            probability_SV = teacher(pictures).sigmoid().numpy()
        expected_rows = [n for n, ids in enumerate(labels[shard]) if set(ids) & set(CLASSES[vertical])]
        assert records["row"].tolist() == expected_rows, "F_map: the samples with a label in the vertical"
        for row, index_K, kept_K, tail in zip(
            *(records[n] for n in ("row", "index", "probability", "tail")), strict=True
        ):
            if shard == "train-000000" and row == 2:  # image 8 cannot be decoded
                assert not kept_K.any()
                assert tail == 0
                continue
            order = np.argsort(-probability_SV[row], kind="stable")
            np.testing.assert_allclose(kept_K, probability_SV[row, order[:TOP_K]], rtol=2**-10, atol=1e-6)
            np.testing.assert_allclose(probability_SV[row, index_K], kept_K, rtol=2**-10, atol=1e-6)
            assert len(set(index_K.tolist())) == TOP_K
            assert tail == pytest.approx(probability_SV[row, order[TOP_K:]].sum(), rel=2**-9, abs=1e-6)
            num_records += 1
    assert num_records > 80


def test_the_page_of_the_library_reads_shards_and_targets(workdir, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    [example] = list_examples("docs/library.md", "Shards and stored targets")
    variables = {"torch": torch, "DataLoader": torch.utils.data.DataLoader}
    exec(compile(example, "docs/library.md", "exec"), variables)
    train, reader, taxonomy = variables["train"], variables["reader"], variables["taxonomy"]
    assert int(reader.read(np.arange(len(train)), epoch=0).skipped_B.sum()) == 1  # the damaged one
    # Of the first shard's samples with a label in the first vertical, the file has what the reader gives.
    index_NK = variables["index_NK"] + variables["first_output"]
    read = reader.read(variables["sample_N"].astype(np.int64), epoch=0).targets.dense(taxonomy.num_classes)
    found = torch.gather(read, 1, torch.from_numpy(index_NK))
    torch.testing.assert_close(found, torch.from_numpy(variables["probability_NK"]))


def test_a_sample_of_two_verticals_has_what_both_teachers_say_and_zero_elsewhere(workdir, labels):
    taxonomy = Taxonomy.load(workdir / "shards" / "taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    stored = StoredTargets(workdir / "targets" / "default", split)
    dense_NC = stored.lookup(np.arange(len(split)), 0).dense(taxonomy.num_classes).numpy()
    every = [(shard, row, ids) for shard, of_shard in labels.items() for row, ids in enumerate(of_shard)]
    assert sum(len(ids) == 2 for _, _, ids in every) >= 20
    for ordinal, (shard, row, ids) in enumerate(every):
        expected_C = np.zeros(taxonomy.num_classes)
        for vertical in CLASSES:
            if set(ids) & set(CLASSES[vertical]):
                records = safetensors.numpy.load_file(workdir / "targets/default" / vertical / f"{shard}.safetensors")
                place = records["row"].tolist().index(row)
                outputs = taxonomy.vertical_slice(vertical)
                expected_C[outputs.start + records["index"][place].astype(int)] = records["probability"][place]
        np.testing.assert_array_equal(dense_NC[ordinal], expected_C)
        num_verticals = len({v for v in CLASSES if set(ids) & set(CLASSES[v])})
        assert np.count_nonzero(dense_NC[ordinal]) <= TOP_K * num_verticals


def test_the_manifest_says_what_the_targets_are(workdir):
    manifest = load_json(workdir / "targets/default/fruit/manifest.json")
    assert manifest["codec"] == "plain"
    assert manifest["num_kept"] == TOP_K
    assert manifest["teacher"] == load_json(workdir / "teachers/fruit/DONE.json")["checkpoint"]
    assert manifest["preprocessing"]["image_size"] == 16


def test_the_batch_size_changes_no_byte(workdir, tmp_path):
    concentrate("targets", "targets.name=again", f"targets.top_k={TOP_K}", "batch_size=50", f"workdir={workdir}",
                directory=tmp_path)  # fmt: skip
    for path in (workdir / "targets/default").rglob("*.safetensors"):
        again = safetensors.numpy.load_file(str(path).replace("/default/", "/again/"))
        for name, array in safetensors.numpy.load_file(path).items():
            np.testing.assert_allclose(again[name].astype(float), array.astype(float), rtol=2**-10, atol=1e-6)


def test_a_student_asks_for_the_top_k_that_is_stored(workdir, tmp_path):
    command = ("student", f"workdir={workdir}", *TINY, "trainer.max_skipped_share=0.1")
    message = one_line(concentrate(*command, "targets.top_k=4", directory=tmp_path, code=2))
    assert "targets.top_k=4" in message
    assert "was made with 3" in message
    message = one_line(concentrate(*command, "targets.name=defualt", directory=tmp_path, code=2))
    assert "targets.name=defualt" in message
    assert "default" in message


def test_targets_before_their_teacher_are_refused(tmp_path):
    workdir = prepare_shards(tmp_path)
    finished = concentrate("targets", f"workdir={workdir}", directory=tmp_path, code=2)
    assert "run `concentrate teacher vertical=fruit` first" in finished.err
    assert "Traceback" not in finished.err


def read_all(workdir: Path, name: str, verticals=("fruit", "tools")) -> dict[str, dict[str, np.ndarray]]:
    return {
        f"{vertical}/{path.stem}": safetensors.numpy.load_file(path)
        for vertical in verticals
        for path in sorted((workdir / "targets" / name / vertical).glob("*.safetensors"))
    }


def test_parts_made_by_several_processes_are_the_whole(workdir, tmp_path):
    command = ("targets", "targets.name=parts", f"targets.top_k={TOP_K}", "batch_size=13", f"workdir={workdir}")
    running = [
        Running([*command, f"part={part}", "num_parts=3"], tmp_path) for part in (2, 0, 1)
    ]  # at the same time, on one directory
    finished = [process.wait() for process in running]
    assert [one.code for one in finished] == [0, 0, 0], [one.err for one in finished]
    said = "".join(one.out for one in finished)
    assert "records of" in said
    assert (
        load_json(workdir / "targets/parts/fruit/DONE.json")["targets"]
        == (load_json(workdir / "targets/default/fruit/DONE.json")["targets"])
    )
    for path in (workdir / "targets/default").rglob("*.safetensors"):
        assert Path(str(path).replace("/default/", "/parts/")).read_bytes() == path.read_bytes()
    message = one_line(concentrate(*command, "part=3", "num_parts=3", directory=tmp_path, code=2))
    assert "parts count from 0 to 2" in message


def test_a_part_alone_does_not_finish_the_stage(workdir, tmp_path):
    command = ("targets", "vertical=fruit", "targets.name=alone", f"workdir={workdir}")
    finished = concentrate(*command, "part=1", "num_parts=4", directory=tmp_path)
    assert "3 of 4 shards belong to others" in finished.out
    assert not (workdir / "targets/alone/fruit/DONE.json").exists()
    concentrate(*command, directory=tmp_path)  # one process may finish what parts have begun
    assert load_json(workdir / "targets/alone/fruit/DONE.json")["num_records"] > 50


def test_stored_views_are_what_the_teachers_saw_and_the_same_for_all_verticals(workdir, images, labels, tmp_path):
    view = "view={crop_area: 0.4, crop_aspect: 1.5, flip: 0.5, brightness: 0.3, contrast: 0.3}"
    concentrate("targets", "targets.name=views", "targets.views=3", view, f"targets.top_k={TOP_K}", "batch_size=13",
                f"workdir={workdir}", directory=tmp_path)  # fmt: skip
    taxonomy = Taxonomy.load(workdir / "shards" / "taxonomy.json")
    split = load_split(workdir / "shards", "train", taxonomy)
    stored = StoredTargets(workdir / "targets" / "views", split)
    reader = SampleReader(split, stored, 16, views=None, seed=5)
    teachers = {v: load_student(workdir / "teachers" / v / "model.safetensors") for v in CLASSES}
    ordinals = np.arange(len(split))
    seen = []
    for epoch in range(4):
        read = reader.read(ordinals, epoch)
        seen.append(read.images)
        dense_NC = read.targets.dense(taxonomy.num_classes)
        for vertical, teacher in teachers.items():
            outputs = taxonomy.vertical_slice(vertical)
            routed = split.routed(vertical)
            routed = routed[~read.skipped_B[routed].numpy()]
            with torch.no_grad():
                probability_NV = teacher(read.images[routed]).sigmoid()
            kept = probability_NV.topk(TOP_K)
            expected = torch.zeros_like(probability_NV).scatter_(1, kept.indices, kept.values)
            torch.testing.assert_close(dense_NC[routed, outputs], expected, rtol=2**-10, atol=1e-4)
    assert torch.equal(seen[0], seen[3]), "view (epoch mod R)"
    assert not torch.equal(seen[0], seen[1])
    manifest = load_json(workdir / "targets/views/fruit/manifest.json")
    assert manifest["preprocessing"]["view"]["crop_area"] == 0.4
    assert "pillow" in manifest["preprocessing"]["decoder"]


def test_a_student_replays_stored_views_and_takes_no_others(workdir, tmp_path):
    options = ("targets.name=replayed", "targets.views=2", f"workdir={workdir}")
    concentrate("targets", *options, "targets.codec=packed", directory=tmp_path)
    student = ("student", *options, *TINY, "trainer.max_skipped_share=0.1", "name=replayed")
    message = one_line(concentrate(*student, directory=tmp_path, code=2))
    assert "targets.codec=plain, but" in message
    assert "was made with packed" in message
    message = one_line(
        concentrate(*student, "targets.codec=packed", "data.view={flip: 0.5}", directory=tmp_path, code=2)
    )
    assert "the student replays the stored views" in message
    concentrate(*student, "targets.codec=packed", directory=tmp_path)
    message = one_line(concentrate("targets", "view={flip: 0.5}", f"workdir={workdir}", directory=tmp_path, code=2))
    assert "targets.views=0" in message


@pytest.mark.parametrize("codec", ["plain", "packed"])
@pytest.mark.parametrize("views", [0, 2])
def test_verifying_finds_what_was_stored_and_what_was_changed(codec, views, workdir, tmp_path):
    name = f"{codec}{views}"
    options = (f"targets.name={name}", f"targets.codec={codec}", f"targets.views={views}", f"targets.top_k={TOP_K}",
               f"workdir={workdir}")  # fmt: skip
    concentrate("targets", *options, directory=tmp_path)
    said = concentrate("targets", *options, "verify=true", "num_verified=60", directory=tmp_path).out
    assert "60 records: index_agreement 1.0000" in said
    facts = load_json(workdir / "targets" / name / "fruit" / "verification.json")
    assert facts["mean_difference"] < (0.01 if codec == "packed" else 1e-3)
    assert 0.3 < facts["retained_mass"] <= 1
    assert 0 < facts["ap"] <= 1
    # Another teacher's targets, in files that are whole.
    directory = workdir / "targets" / name / "fruit"
    taxonomy = Taxonomy.load(workdir / "shards" / "taxonomy.json")
    size = len(range(*taxonomy.vertical_slice("fruit").indices(taxonomy.num_classes)))
    for path in directory.glob("*.safetensors"):
        file = TargetFile(path, size, TOP_K)
        every = np.arange(len(file.row) * file.num_views)
        index, probability, tail = file.read(every)
        changed = np.sort((index + 2) % size, axis=1)
        TargetRecords(file.row, changed, probability[:, ::-1].copy(), tail, file.read_views(every)).save(
            path, codec, size
        )
    finished = concentrate("targets", *options, "verify=true", "vertical=fruit", directory=tmp_path, code=2)
    assert "not what the teacher says now" in finished.err
    assert "Traceback" not in finished.err


def test_teachers_in_the_loop_train_the_student_of_their_stored_targets(workdir, tmp_path):
    """The images are as large as the network's input: without augmentation every view is the centre view."""
    plain = "data.view={crop_area: 1.0, crop_aspect: 1.0, flip: 0.0, brightness: 0.0, contrast: 0.0}"
    options = (*TINY, plain, "trainer.max_skipped_share=0.1", "optimizer.lr=0.01", f"targets.top_k={TOP_K}",
               f"workdir={workdir}")  # fmt: skip
    for number, more in enumerate(
        ((), ("tail=spread", "outside=0.25", "label_share=0.3"), ("outside=mask", "trainer.accumulate=2"))
    ):
        for kind in ("soft", "online"):
            concentrate("student", f"targets={kind}", f"name={kind}{number}", *options, *more, directory=tmp_path)
        stored, loop = (load_weights(workdir / "students" / f"{kind}{number}") for kind in ("soft", "online"))
        assert stored.keys() == loop.keys(), "no teacher inside the student"
        for weight, expected in loop.items():
            np.testing.assert_allclose(stored[weight], expected, atol=3e-3, err_msg=weight)


def test_options_of_targets_change_what_is_learned(workdir, tmp_path):
    options = (*TINY, "trainer.max_skipped_share=0.1", "trainer.max_steps=10", f"targets.top_k={TOP_K}",
               f"workdir={workdir}")  # fmt: skip
    found = []
    for number, more in enumerate(
        (
            (),
            ("tail=spread",),
            ("outside=mask",),
            ("outside=0.5",),
            ("label_share=0.5",),
            ("label_share=0.5", "smear=false"),
        )
    ):
        concentrate("student", f"name=options{number}", *options, *more, directory=tmp_path)
        found.append(load_weights(workdir / "students" / f"options{number}")["base.blocks.0.0.weight"])
    assert len({weight.tobytes() for weight in found}) == 6
    whole = load_json(workdir / "students/options0/config.json")
    assert "label_share" not in whole, "students that were trained before there was one are still known"
    message = one_line(
        concentrate("student", "targets=labels", "tail=spread", f"workdir={workdir}", directory=tmp_path, code=2)
    )
    assert "labels have no tail mass" in message
    message = one_line(
        concentrate("student", "targets=labels", "label_share=0.5", f"workdir={workdir}", directory=tmp_path, code=2)
    )
    assert "label_share=0.5 with targets=labels: there is nothing to mix them with; remove it" in message
    message = one_line(concentrate("student", "outside=2", f"workdir={workdir}", directory=tmp_path, code=2))
    assert "outside" in message


def test_a_teacher_in_the_loop_takes_the_students_image_size(workdir, tmp_path):
    message = one_line(concentrate("student", "targets=online", "data.image_size=20", f"workdir={workdir}", *TINY,
                                   directory=tmp_path, code=2))  # fmt: skip
    assert "takes images of 16 pixels, the student of 20" in message
