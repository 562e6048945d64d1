"""`concentrate targets`: what is stored is what the teachers say."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from real_runs import TINY, concentrate, load_json, one_line, prepare_shards, read_labels, taxonomy_of_fruit_and_tools

from concentration.data.index import load_split
from concentration.data.sample_targets import StoredTargets
from concentration.networks.student import load_student
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
