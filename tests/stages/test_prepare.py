"""`prepare` from folders of images and from glyphs: what it writes, kills at every point, repairs, and what it refuses."""

import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from PIL import Image

import concentration.stages.prepare
from concentration.data.shards import write_shard
from concentration.data.sources.image_folder import ImageFolderSource
from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config
from concentration.stages import prepare_listing
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory

CLASSES = ("birds/gull", "birds/kite", "cars/taxi", "cars/tram")
EXTENSIONS = ("png", "jpg", "webp")
#: What two runs of the same preparation must have in common, to the byte.
RESULTS = (
    "*.tar",
    "*.index",
    "taxonomy.json",
    "skipped.txt",
    "DONE.json",
    "summary.*",
    "*.hashes",
    "near_duplicates.*",
)


@pytest.fixture
def images(tmp_path, encode_image) -> Path:
    """80 small images of four classes in two verticals, 20 of them each for validation and test, one of these a copy."""
    for split, count in (("train", 10), ("val", 5), ("test", 5)):
        for class_id, number in itertools.product(CLASSES, range(count)):
            extension = EXTENSIONS[number % 3]
            path = tmp_path / "images" / split / class_id / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(extension, (9, 7), seed=sum(f"{split}{class_id}".encode()) * 100 + number))
    shutil.copy(tmp_path / "images/train/birds/gull/0.png", tmp_path / "images/test/birds/gull/0.png")
    return tmp_path / "images"


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "work"


def build_config(images: Path, workdir: Path, num_processes=1, samples_per_shard=7, overwrite=False, **values):
    data = {"kind": "image_folder", "path": images} | values.pop("data", {})
    stage = {"workdir": workdir, "num_processes": num_processes, "samples_per_shard": samples_per_shard}
    return parse_config(PrepareConfig, {**stage, "overwrite": overwrite, "data": data, **values})


def read_results(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in RESULTS for path in (workdir / "shards").glob(pattern)}


def list_names(workdir: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in (workdir / "shards").glob(pattern))


def read_images(workdir: Path, split: str) -> list[list[tuple[bytes, list[str]]]]:
    """(image, labels) of all samples of each shard, by webdataset."""
    shards = []
    for path in sorted((workdir / "shards").glob(f"{split}-*.tar")):
        samples = webdataset.WebDataset(str(path), shardshuffle=False)
        shards.append([(next(s[e] for e in EXTENSIONS if e in s), json.loads(s["json"])["labels"]) for s in samples])
    return shards


def expect_images(images: Path, split: str) -> list[tuple[bytes, list[str]]]:
    return [
        (path.read_bytes(), [str(path.parent.relative_to(images / split))]) for path in (images / split).rglob("*.*")
    ]


def refuse(config: PrepareConfig, *expected: str, error=DataError) -> None:
    with pytest.raises(error) as caught:
        prepare(config)
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (config.workdir / "shards" / "DONE.json").exists()


def test_every_image_lies_once_in_balanced_shards_that_webdataset_reads(images, workdir):
    prepare(build_config(images, workdir))
    for split, sizes in (("train", [6, 7, 7, 6, 7, 7]), ("val", [6, 7, 7]), ("test", [6, 7, 7])):
        shards = read_images(workdir, split)
        assert sorted(itertools.chain(*shards)) == sorted(expect_images(images, split))
        assert [len(shard) for shard in shards] == sizes
        assert all(len({labels[0] for _, labels in shard}) > 1 for shard in shards), "every shard mixes classes"
    assert (workdir / "shards" / "skipped.txt").read_text() == ""
    taxonomy = json.loads((workdir / "shards" / "taxonomy.json").read_text())
    assert [c["id"] for c in taxonomy["classes"]] == list(CLASSES)


def test_a_finished_set_names_the_folder_it_was_made_from_where_another_is_given(
    images, workdir, tmp_path, monkeypatch
):
    prepare(build_config(images, workdir))
    written = read_results(workdir)
    other = shutil.copytree(images, tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"finished with data\.path={images}, and {other} was not looked at"):
        prepare(build_config(other, workdir))
    assert read_results(workdir) == written
    monkeypatch.chdir(tmp_path)
    prepare(build_config(Path("images/."), workdir))  # the same one
    prepare(build_config(other, workdir, append=True))
    images.rename(tmp_path / "gone")
    prepare(build_config(other, workdir))
    assert read_results(workdir) == written
    with pytest.raises(ConfigError, match=rf"finished with data\.path={other}, and {images}"):
        prepare(build_config(images, workdir))
    other.rename(images)
    prepare(build_config(images, workdir))  # it has moved
    images.rename(other)
    (other / "train/birds/gull/0.png").unlink()
    prepare(build_config(other.rename(images), workdir, overwrite="changed"))
    assert len(list(itertools.chain(*read_images(workdir, "train")))) == 39


def test_what_was_written_is_counted_and_indexed(images, workdir):
    prepare(build_config(images, workdir))
    prepared, taxonomy, fingerprint = load_prepared(workdir, DataOverrides())
    done = RunDirectory(workdir / "shards").load_done("concentrate prepare")
    for name, facts in done["splits"].items():
        assert facts.pop("fingerprint") == load_split(workdir / "shards", name, taxonomy).fingerprint
    assert done["splits"] == {
        "train": {"samples": 40, "shards": 6, "classes_with_images": 4, "by_vertical": {"birds": 20, "cars": 20}},
        "val": {"samples": 20, "shards": 3, "classes_with_images": 4, "by_vertical": {"birds": 10, "cars": 10}},
        "test": {"samples": 20, "shards": 3, "classes_with_images": 4, "by_vertical": {"birds": 10, "cars": 10}},
    }
    split = load_split(workdir / "shards", "train", taxonomy)
    assert split.fingerprint == done["fingerprint"] == fingerprint
    assert split.count_labels().tolist() == [10] * 4
    assert prepared.image_size == 224
    overrides = DataOverrides.model_validate({"image_size": 32, "view": {"flip": 0.5}})
    assert load_prepared(workdir, overrides)[0].model_dump() == overrides.model_dump()


def test_the_summary_is_said_and_written(images, workdir, capsys):
    prepare(build_config(images, workdir))
    text = (workdir / "shards" / "summary.txt").read_text()
    assert "all             4       4     40   20    20   10      10   10         0\n" in text
    assert text in capsys.readouterr().out
    assert Image.open(workdir / "shards" / "summary.png").format == "PNG"


def test_a_finished_preparation_is_left_alone(images, workdir):
    prepare(build_config(images, workdir))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (workdir / "shards").glob("[!.]*")}
    shutil.rmtree(images / "train" / "birds")
    prepare(build_config(images, workdir))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} == before


def prepare_in_processes(good: PrepareConfig, bad: PrepareConfig) -> None:
    prepare(good)
    try:
        prepare(bad)
    except DataError as error:
        (bad.workdir / "error").write_text(str(error))


def test_several_processes_write_the_same_bytes_and_raise_the_same_errors(images, taxonomy, tmp_path):
    """In a process of its own, so that the server of its workers is not the one of other tests."""
    prepare(build_config(images, tmp_path / "one"))
    good = build_config(images, tmp_path / "two", num_processes=2)
    (tmp_path / "given").mkdir()
    for number in range(3):
        (tmp_path / "given" / f"train-{number}.tar").write_bytes(b"no tar " * 100)
    (tmp_path / "given" / "taxonomy.json").write_text(json.dumps(taxonomy.to_json()))
    bad = build_config(tmp_path / "given", tmp_path / "three", num_processes=2, data={"kind": "shards"})
    process = multiprocessing.get_context("spawn").Process(target=prepare_in_processes, args=(good, bad))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert read_results(tmp_path / "one") == read_results(tmp_path / "two")
    assert len(read_results(tmp_path / "two")) == 3 * 12 + 5 + 2
    error = (tmp_path / "three" / "error").read_text()
    assert error.startswith(f"{tmp_path}/given/train-")
    assert "no tar" in error
    assert "\n" not in error


def kill_at(owner, name: str, call: int, when: str, config: PrepareConfig) -> None:
    """Runs in a process of its own: ends it without any cleaning up at the n-th call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call_or_die(*args, **kwargs):
        is_due = next(calls) == call
        if is_due and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call_or_die)
    prepare(config)


@pytest.mark.parametrize(
    ("owner", "name", "call", "when"),
    [
        (ImageFolderSource, "build_taxonomy", 1, "after"),
        (ImageFolderSource, "read", 1, "before"),
        (ImageFolderSource, "read", 17, "after"),
        (concentration.stages.prepare, "write_shard", 3, "after"),
        (concentration.stages.prepare, "index_shard", 3, "after"),
        # Writes of whole files: the listing, the taxonomy, and then each shard's list of what is missing in it.
        *((prepare_listing, "write_atomically", call, when) for call in (1, 2) for when in ("before", "after")),
        *((concentration.stages.prepare, "write_atomically", 3, when) for when in ("before", "after")),
        *((concentration.stages.prepare, "hash_shard", 3, when) for when in ("before", "after")),
        (concentration.stages.prepare, "_summarise", 1, "before"),
        (concentration.stages.prepare, "report_near_duplicates", 1, "after"),
        (RunDirectory, "finish", 1, "before"),
        (RunDirectory, "finish", 1, "after"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_a_killed_preparation_is_continued_to_the_same_files(owner, name, call, when, images, tmp_path, workdir):
    prepare(build_config(images, tmp_path / "whole"))
    config = build_config(images, workdir)
    process = multiprocessing.get_context("fork").Process(target=kill_at, args=(owner, name, call, when, config))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    whole = [f"{Path(marker).stem}.tar" for marker in list_names(workdir, "*.skipped")] + list_names(
        workdir, "*.hashes"
    )
    inodes = {name: (workdir / "shards" / name).stat().st_ino for name in whole}
    prepare(config)
    assert read_results(workdir) == read_results(tmp_path / "whole")
    for name, inode in inodes.items():
        assert (workdir / "shards" / name).stat().st_ino == inode, "what was whole is not written again"
    assert list_names(workdir, ".*.tmp") == []


class KilledSource(ImageFolderSource):
    def read(self, item):
        if item.locator.endswith("/2.webp"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def prepare_and_be_killed(config: PrepareConfig) -> None:
    """A worker is killed while it reads, as by the kernel where memory is short."""
    concentration.stages.prepare.build_source = KilledSource
    try:
        prepare(config)
    except ConfigError as error:
        (config.workdir / "error").write_text(str(error))


def test_a_worker_that_was_killed_is_one_line(images, workdir):
    config = build_config(images, workdir, num_processes=2)
    prepare_in_another(config)
    error = (workdir / "error").read_text()
    assert "ended abruptly, probably killed for want of memory; give fewer than num_processes=2" in error
    assert "\n" not in error


def test_an_append_whose_worker_was_killed_goes_on_with_what_the_others_have_written(images, workdir):
    prepare(build_config(images, workdir, samples_per_shard=2))
    for number in range(30):
        wren = images / f"train/birds/wren/{number}.webp"  # number 2 kills
        wren.parent.mkdir(exist_ok=True)
        shutil.copy(images / f"train/birds/kite/{(2, 5, 8)[number % 3]}.webp", wren)
    config = build_config(images, workdir, num_processes=2, samples_per_shard=2, append=True)
    prepare_in_another(config)
    assert "it continues" in (workdir / "error").read_text()
    assert list_names(workdir, "DONE.json") == []
    written = {path: path.stat().st_ino for path in (workdir / "shards").glob("train-*.skipped")}
    assert written
    prepare(config)
    assert {path: path.stat().st_ino for path in written} == written
    assert sum(map(len, read_images(workdir, "train"))) == 40 + 30


def prepare_in_another(config: PrepareConfig) -> None:
    process = multiprocessing.get_context("spawn").Process(target=prepare_and_be_killed, args=(config,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_what_the_source_and_the_splits_could_not_do_is_said(images, workdir, capsys):
    (images / "train" / "birds" / "gull" / "x.gif").write_bytes(b"")
    shutil.rmtree(images / "test")
    data = {"split": {"group": r"(.)\.\w+$", "test_per_class": 60}}
    prepare(build_config(images, workdir, data=data))
    said = capsys.readouterr().out
    assert "prepare: " in said
    assert "ignored files that are not .jpg, .jpeg, .png, .webp: 1 .gif" in said
    assert "4 classes have fewer test images than data.split.test_per_class" in said
    assert "too few groups of images: birds/gull, birds/kite, cars/taxi, cars/tram" in said
    assert "5 groups lie in several splits, as the source has it" in said


def test_only_the_cores_that_a_scheduler_gave_are_used(images, workdir, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(multiprocessing, "get_context", None)  # one process needs no other
    prepare(build_config(images, workdir, num_processes=None))


def test_two_samples_with_one_key_are_refused(images, workdir, monkeypatch):
    monkeypatch.setattr("concentration.data.sources.image_folder.key_of_path", lambda path: path.split("/")[0])
    refuse(build_config(images, workdir), "two samples have the key 'train'", "train/birds/gull/0.png")


def test_overwriting_lists_the_source_again(images, workdir):
    prepare(build_config(images, workdir))
    shutil.rmtree(images / "train" / "birds" / "gull")
    prepare(build_config(images, workdir))
    assert sum(map(len, read_images(workdir, "train"))) == 40
    prepare(build_config(images, workdir, overwrite=True))
    assert sorted(itertools.chain(*read_images(workdir, "train"))) == sorted(expect_images(images, "train"))


@pytest.mark.parametrize(
    ("path", "expected"), [("nowhere", "no such folder"), ("train/birds/gull", "lies in no class's folder")], ids=str
)
def test_overwriting_with_a_mistake_loses_no_shard(path, expected, images, workdir):
    prepare(build_config(images, workdir))
    before = {name: (workdir / "shards" / name).read_bytes() for name in list_names(workdir, "*")}
    with pytest.raises(DataError, match=expected):
        prepare(build_config(images / path, workdir, overwrite=True))
    assert {name: (workdir / "shards" / name).read_bytes() for name in list_names(workdir, "*")} == before
    assert sorted(itertools.chain(*read_images(workdir, "train"))) == sorted(expect_images(images, "train"))


def run_and_stop(config: PrepareConfig, after: Callable[[], bool]) -> None:
    """Begins to prepare, and stops at the first shard that finds `after()` true."""

    class StopError(Exception):
        pass

    def write_or_stop(*args):
        if after():
            raise StopError
        return write_shard(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concentration.stages.prepare, "write_shard", write_or_stop)
        with pytest.raises(StopError):
            prepare(config)


@pytest.mark.parametrize("lost", ["train-000000.index", "train-000000.tar", "train-000001.tar"])
def test_a_shard_that_was_lost_or_cut_before_the_end_is_written_again(lost, images, tmp_path, workdir):
    prepare(build_config(images, tmp_path / "whole"))
    config = build_config(images, workdir)
    run_and_stop(config, lambda: len(list_names(workdir, "*.skipped")) == 3)
    path = workdir / "shards" / lost
    path.unlink() if lost != "train-000001.tar" else path.write_bytes(path.read_bytes()[:-1024])
    prepare(config)
    assert read_results(workdir) == read_results(tmp_path / "whole")


def test_images_that_came_and_went_before_the_end_are_there_and_gone(images, tmp_path, workdir):
    """Otherwise shards of both listings would lie side by side, with samples lost or double."""
    config = build_config(images, workdir)
    run_and_stop(config, lambda: len(list_names(workdir, "*.skipped")) == 8)
    shutil.rmtree(images / "val" / "birds")
    shutil.rmtree(images / "train" / "cars" / "tram")
    shutil.copytree(images / "train" / "cars" / "taxi", images / "train" / "cars" / "coach")
    prepare(config)
    prepare(build_config(images, tmp_path / "whole"))
    assert read_results(workdir) == read_results(tmp_path / "whole")
    assert sorted(itertools.chain(*read_images(workdir, "train"))) == sorted(expect_images(images, "train"))


def test_another_config_is_refused_until_it_may_replace(images, workdir):
    prepare(build_config(images, workdir))
    with pytest.raises(ConfigError, match="samples_per_shard was 7, is 20"):
        prepare(build_config(images, workdir, samples_per_shard=20))
    prepare(build_config(images, workdir, samples_per_shard=20, overwrite=True))
    assert [len(shard) for shard in read_images(workdir, "train")] == [20, 20]
    assert list_names(workdir, "train-*.index") == ["train-000000.index", "train-000001.index"]


def test_a_vertical_without_training_images_is_refused_and_may_be_filled(images, workdir, tmp_path):
    shutil.move(images / "train" / "cars", tmp_path / "cars")
    refuse(build_config(images, workdir), "vertical 'cars' has no training image; add some")
    assert not list_names(workdir, "*.tar"), "it is refused before anything is written"
    shutil.move(tmp_path / "cars", images / "train" / "cars")
    prepare(build_config(images, workdir))
    assert sorted(itertools.chain(*read_images(workdir, "train"))) == sorted(expect_images(images, "train"))


def test_a_folder_without_training_images_is_refused_before_anything_is_written(images, workdir):
    config = build_config(images / "train", workdir, data={"split": {"val_share": 1.0, "test_share": 0}})
    refuse(config, "no training image", "lower the shares")
    assert list_names(workdir, "*") == [".lock"]
    prepare(build_config(images / "train", workdir, data={"split": {"val_share": 0.1}}))


def test_too_many_undecodable_images_are_listed_and_may_be_repaired(images, workdir, tmp_path):
    prepare(build_config(images, tmp_path / "whole"))
    damaged = [images / "train" / "birds" / "gull" / "0.png", images / "test" / "cars" / "tram" / "1.jpg"]
    contents = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(contents[0][:40])
    damaged[1].write_bytes(b"")
    config = build_config(images, workdir)
    refuse(config, "2 of 80 images", "max_skipped_share=0.001", "skipped.txt", "repair or remove", str(damaged[0]))
    listed = (workdir / "shards" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2
    assert {line.partition(": cannot be decoded")[0] for line in listed} == {str(path) for path in damaged}
    for path, content in zip(damaged, contents, strict=True):
        path.write_bytes(content)
    prepare(config)
    assert read_results(workdir) == read_results(tmp_path / "whole")


def test_few_undecodable_images_are_told_listed_and_left_out(images, workdir, capsys):
    damaged = images / "train" / "birds" / "gull" / "0.png"
    before = expect_images(images, "train")
    good = (damaged.read_bytes(), ["birds/gull"])
    damaged.write_bytes(b"\n")
    prepare(build_config(images, workdir))  # one is never too many
    where = f"{workdir}/shards/skipped.txt; the first: {damaged}"
    assert f"prepare: 1 of 80 images cannot be read or decoded, and is left out: {where}" in capsys.readouterr().out
    assert (workdir / "shards" / "skipped.txt").read_text().startswith(f"{damaged}: cannot be decoded")
    assert sorted([*itertools.chain(*read_images(workdir, "train")), good]) == sorted(before)
    assert RunDirectory(workdir / "shards").load_done("concentrate prepare")["splits"]["train"]["samples"] == 39


def test_where_no_image_can_be_read_no_share_is_large_enough(images, workdir, tmp_path):
    """A table whose paths start elsewhere, say; before, `max_skipped_share=1` was asked for, and then a split was missing."""
    table = tmp_path / "table.csv"
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in images.rglob("*.*")]
    table.write_text("\n".join(["path,labels", *rows]))
    data = {"kind": "csv", "path": table}
    for share in (0.001, 1):
        config = build_config(images, workdir, data=data, max_skipped_share=share)
        refuse(
            config,
            "80 of 80 images cannot be read or decoded: they lie elsewhere than data says, or are no images",
            "is missing",
        )
    prepare(build_config(images, workdir, data={**data, "root": images}))


def test_a_shard_of_nothing_but_undecodable_images_is_not_there(images, workdir):
    for path in (images / "val").rglob("*.*"):
        path.write_bytes(b"no image")
    config = build_config(images, workdir, samples_per_shard=100, max_skipped_share=0.25)
    run_and_stop(config, lambda: len(list_names(workdir, "val-*.skipped")) == 1)
    prepare(config)
    assert list_names(workdir, "val-*") == ["val-000000.skipped"]
    assert list(RunDirectory(workdir / "shards").load_done("concentrate prepare")["splits"]) == ["train", "test"]


def test_what_later_stages_rely_on_is_checked_when_they_begin(images, workdir):
    with pytest.raises(ConfigError, match="not there or not finished; run `concentrate prepare` first"):
        load_prepared(workdir, DataOverrides())
    prepare(build_config(images, workdir))
    workdir = workdir.rename(workdir.with_name("moved"))
    load_prepared(workdir, DataOverrides())
    index = workdir / "shards" / "val-000002.index"
    index.rename(index.with_suffix(".kept"))
    with pytest.raises(DataError, match=r"2 files val-\*\.index, but `concentrate prepare` wrote 3; bring them back"):
        load_prepared(workdir, DataOverrides())
    index.with_suffix(".kept").rename(index)
    taxonomy = json.loads((workdir / "shards" / "taxonomy.json").read_text())
    taxonomy["classes"].reverse()
    (workdir / "shards" / "taxonomy.json").write_text(json.dumps(taxonomy))
    with pytest.raises(DataError, match=r"taxonomy\.json: changed since `concentrate prepare`; restore it"):
        load_prepared(workdir, DataOverrides())


def test_glyphs_are_drawn_into_shards(workdir):
    data = {
        "kind": "glyphs",
        "verticals": ["greek", "arrows"],
        "num_classes": 6,
        "num_drawings": 4,
        "num_val_drawings": 1,
    }
    stage = {"workdir": workdir, "num_processes": 1, "samples_per_shard": 10}
    prepare(parse_config(PrepareConfig, {**stage, "data": data | {"num_test_drawings": 1, "image_size": 16}}))
    prepared, taxonomy, _ = load_prepared(workdir, DataOverrides())
    assert prepared.image_size == 16
    assert taxonomy.verticals == ("greek", "arrows")
    train = load_split(workdir / "shards", "train", taxonomy)
    assert len(train) == 24
    assert [shard.num_samples for shard in train.shards] == [8, 8, 8]
    counts = train.count_labels()
    assert sorted(counts[counts > 0].tolist()) == [4] * 6
    for image, (class_id,) in itertools.chain(*read_images(workdir, "train")):
        assert Image.open(io.BytesIO(image)).size == (16, 16)
        assert taxonomy.is_leaf[taxonomy.output(class_id)]
