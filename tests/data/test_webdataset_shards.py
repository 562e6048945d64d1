"""Shards that somebody else wrote, used where they lie: which tars are which split, and what `prepare` makes of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import webdataset
from servers import serve

from concentration.data.sources.webdataset_shards import ShardsConfig, list_shards, load_shards_taxonomy
from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.stages.run_directory import RunDirectory


@pytest.fixture
def given(write_shard, taxonomy, tmp_path) -> Path:
    """Two training shards, one of each other split, and a taxonomy.json."""
    folder = tmp_path / "given"
    write_shard(folder / "train-0.tar", [["gull"], ["taxi", "osprey"], ["egg"]])
    write_shard(folder / "train-1.tar", [["soup"], ["tram"]])
    write_shard(folder / "val-0.tar", [["gull"]])
    write_shard(folder / "test-0.tar", [["ramen"], ["car"]])
    (folder / "taxonomy.json").write_text(json.dumps(taxonomy.to_json()))
    return folder


def build_config(given: Path, **options) -> PrepareConfig:
    data = {"kind": "shards", "path": given, **options}
    return parse_config(PrepareConfig, {"workdir": given.with_name("work"), "num_processes": 1, "data": data})


def refuse(config: PrepareConfig, *expected: str, error=DataError) -> None:
    with pytest.raises(error) as caught:
        prepare(config)
    for text in expected:
        assert text in str(caught.value)


def list_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_given_shards_are_indexed_where_they_lie(given):
    before = list_files(given)
    prepare(build_config(given))
    assert list_files(given) == before
    work = given.with_name("work")
    assert not list(work.rglob("*.tar"))
    _, taxonomy, fingerprint = load_prepared(work, DataOverrides())
    train = load_split(work / "shards", "train", taxonomy)
    assert [shard.path for shard in train.shards] == [given / "train-0.tar", given / "train-1.tar"]
    assert train.fingerprint == fingerprint
    labels = [{taxonomy.class_of_output(o).id for o in train.labels(n)} for n in range(len(train))]
    assert labels == [{"gull"}, {"taxi", "osprey"}, {"egg"}, {"soup"}, {"tram"}]
    done = RunDirectory(work / "shards").load_done("concentrate prepare")
    assert done["splits"]["train"] == {
        "samples": 5,
        "shards": 2,
        "fingerprint": fingerprint,
        "classes_with_images": 6,
        "by_vertical": {"birds": 2, "cars": 2, "dishes": 2},
    }
    assert {split: facts["samples"] for split, facts in done["splits"].items()} == {"train": 5, "val": 1, "test": 2}


def test_the_working_directory_and_relative_paths_may_move(given, monkeypatch):
    monkeypatch.chdir(given.parent)
    prepare(build_config(Path("given")))
    monkeypatch.chdir("/")
    moved = given.with_name("moved")
    given.with_name("work").rename(moved)
    _, taxonomy, _ = load_prepared(moved, DataOverrides())
    assert len(load_split(moved / "shards", "train", taxonomy)) == 5


def test_validation_and_test_may_be_missing_and_training_may_not(given):
    for path in (given / "val-0.tar", given / "test-0.tar"):
        path.unlink()
    prepare(build_config(given))
    done = RunDirectory(given.with_name("work") / "shards").load_done("concentrate prepare")
    assert list(done["splits"]) == ["train"]
    config = ShardsConfig(path=given, train="training-*.tar")
    assert list_shards(config, "val") == []
    with pytest.raises(DataError, match=r"given: no file matches data\.train=training-\*\.tar; give the folder"):
        list_shards(config, "train")


def test_patterns_choose_the_tars_sorted_and_may_go_into_folders(given):
    (given / "more").mkdir()
    shutil.move(given / "train-1.tar", given / "more" / "a.tar")
    assert list_shards(ShardsConfig(path=given, train="**/*a*.tar"), "train") == [
        given / "more" / "a.tar",
        given / "train-0.tar",
        given / "val-0.tar",
    ]
    assert list_shards(ShardsConfig(path=given, val="more/*.tar"), "val") == [given / "more" / "a.tar"]


def test_names_in_braces_are_all_expected(given):
    config = ShardsConfig(path=given, train="train-{0..1}.tar", val="{val,test}-0.tar")
    assert list_shards(config, "train") == [given / "train-0.tar", given / "train-1.tar"]
    assert list_shards(config, "val") == [given / "test-0.tar", given / "val-0.tar"]
    assert list_shards(ShardsConfig(path=given, train="{train,val}-*.tar"), "train") == [
        *(given / f"train-{n}.tar" for n in range(2)),
        given / "val-0.tar",
    ]
    for split in ("train", "val"):
        with pytest.raises(DataError, match=rf"train-2\.tar: no file.*data\.{split}=train-\{{0\.\.2\}}\.tar"):
            list_shards(ShardsConfig(path=given, **{split: "train-{0..2}.tar"}), split)


def test_names_in_braces_behind_a_url_are_not_looked_up():
    """Nothing is served there."""
    config = ShardsConfig(path="http://127.0.0.1:1/given/", train="train-{08..11}.tar", val=None)
    assert list_shards(config, "train") == [f"http://127.0.0.1:1/given/train-{n}.tar" for n in ("08", "09", "10", "11")]
    assert list_shards(config, "val") == []


def test_splits_that_are_null_are_not_there(given):
    prepare(build_config(given, val=None, test=None))
    done = RunDirectory(given.with_name("work") / "shards").load_done("concentrate prepare")
    assert list(done["splits"]) == ["train"]


def test_samples_with_both_kinds_of_labels_need_a_choice(given, write_tar, encode_image, taxonomy):
    members = [("both.png", encode_image()), ("both.json", b'{"labels": ["gull"]}'), ("both.cls", b"10")]
    write_tar(given / "train-2.tar", members)
    refuse(build_config(given), "'both' has 2 labels", "data.labels=json or data.labels=cls")
    prepare(build_config(given, labels="json").model_copy(update={"overwrite": True}))
    train = load_split(given.with_name("work") / "shards", "train", taxonomy)
    assert train.labels(5) == (taxonomy.output("gull"),)


def test_a_config_with_a_url_stays_as_it_is_when_it_is_written_and_read(given):
    config = build_config(given)
    url = config.model_copy(update={"data": ShardsConfig(path="s3://bucket/x", taxonomy="https://host/taxonomy.json")})
    for whole in (config, url):
        assert parse_config(PrepareConfig, whole.model_dump(mode="json")) == whole
    assert url.data.path == "s3://bucket/x"
    assert url.data.taxonomy == "https://host/taxonomy.json"


def test_where_and_how_shards_are_reached_is_no_part_of_the_identity():
    plain = ShardsConfig(path="s3://bucket/x")
    other = ShardsConfig(path="s3://other/y", storage_options={"anon": True}, cache={"gib": 3})
    assert plain.identity() == other.identity()
    assert plain.identity() != ShardsConfig(path="s3://bucket/x", labels="cls").identity()


@pytest.mark.parametrize("pattern", ["", "/data/train-*.tar", "{a,}", "s3://bucket/x.tar", "{train,/x}-*.tar"])
def test_what_is_no_pattern_is_refused(pattern, given):
    refuse(build_config(given, train=pattern), f"data.train={pattern}: expected a pattern", error=ConfigError)


def test_a_folder_or_a_link_to_nowhere_is_no_shard(given):
    (given / "train-2.tar").symlink_to(given / "gone.tar")
    refuse(build_config(given), "train-2.tar: no file", "data.train=train-*.tar")
    (given / "train-2.tar").unlink()
    (given / "train-2.tar").mkdir()
    refuse(build_config(given), "train-2.tar: no file")


def test_a_tar_may_not_be_for_training_and_for_the_test(given):
    refuse(build_config(given, train="*.tar"), "val-0.tar", "data.train=*.tar and data.val=val-*.tar", "no file shares")


def test_shards_are_not_taken_from_where_prepare_writes(given):
    """It would clear them together with its own files."""
    shards = given.with_name("work") / "shards"
    shutil.copytree(given, shards)
    before = list_files(shards)
    config = PrepareConfig(workdir=given.with_name("work"), data=ShardsConfig(path=given / ".." / "work" / "shards"))
    refuse(config, "is what `prepare` writes to", error=ConfigError)
    assert list_files(shards) == before


def test_a_taxonomy_may_lie_elsewhere_but_must_be_there(given):
    elsewhere = given.with_name("elsewhere.json")
    shutil.move(given / "taxonomy.json", elsewhere)
    assert load_shards_taxonomy(ShardsConfig(path=given, taxonomy=elsewhere)).num_classes == 11
    refuse(build_config(given), "given/taxonomy.json: no such file")
    elsewhere.write_text("{")
    refuse(build_config(given, taxonomy=elsewhere), "elsewhere.json: not JSON")


def test_samples_that_share_a_key_are_refused_and_may_be_repaired(given, write_tar, encode_image):
    again = [("train-0-1.png", encode_image()), ("train-0-1.cls", b"0")]
    write_tar(given / "train-2.tar", again)
    refuse(build_config(given), "train-2.tar and", "train-0.tar", "'train-0-1'", "make keys unique")
    write_tar(given / "train-2.tar", [(name.replace("train", "other"), content) for name, content in again])
    prepare(build_config(given))


def test_a_damaged_shard_is_named_and_may_be_repaired(given, write_shard):
    content = (given / "train-1.tar").read_bytes()
    (given / "train-1.tar").write_bytes(content[:3000])
    refuse(build_config(given), "given/train-1.tar", "write or fetch it again")
    (given / "train-1.tar").write_bytes(content)
    prepare(build_config(given))


def test_a_vertical_without_training_images_is_refused_and_may_be_filled(given, write_shard):
    write_shard(given / "train-0.tar", [["gull"], ["egg"]])
    (given / "train-1.tar").unlink()
    refuse(build_config(given), "vertical 'cars' has no training image; add some")
    write_shard(given / "train-1.tar", [["car"]])
    prepare(build_config(given))


def test_what_changed_before_preparing_was_finished_is_indexed_anew(given, taxonomy, write_shard):
    """Shards of the same size, more of them, and a taxonomy in another order: indices hold positions in it."""
    write_shard(given / "train-9.tar", [["gull"], ["gull"]])
    (given / "val-0.tar").write_bytes(b"")
    refuse(build_config(given), "val-0.tar")
    write_shard(given / "val-0.tar", [["gull"]])
    write_shard(given / "train-9.tar", [["taxi"], ["taxi"]])
    stat = (given / "train-9.tar").stat()
    os.utime(given / "train-9.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    shutil.copy(given / "train-9.tar", given / "train-00.tar")
    refuse(build_config(given), "train-9.tar and", "train-00.tar")
    (given / "train-00.tar").unlink()
    turned = {"classes": taxonomy.to_json()["classes"][::-1]}
    (given / "taxonomy.json").write_text(json.dumps(turned))
    prepare(build_config(given))
    _, taxonomy, _ = load_prepared(given.with_name("work"), DataOverrides())
    train = load_split(given.with_name("work") / "shards", "train", taxonomy)
    assert [shard.path.name for shard in train.shards] == ["train-0.tar", "train-1.tar", "train-9.tar"]
    labels = [{taxonomy.class_of_output(o).id for o in train.labels(n)} for n in range(len(train))]
    assert labels == [{"gull"}, {"taxi", "osprey"}, {"egg"}, {"soup"}, {"tram"}, {"taxi"}, {"taxi"}]


def test_shards_of_webdatasets_own_writer_with_positions_for_labels(given, encode_image, taxonomy):
    for path in given.glob("train-*.tar"):
        path.unlink()
    with webdataset.ShardWriter(str(given / "train-%06d.tar"), maxcount=8, verbose=0) as writer:
        for number in range(22):
            writer.write({"__key__": f"{number:05d}", "jpg": encode_image("jpg", seed=number), "cls": number % 11})
    prepare(build_config(given))
    train = load_split(given.with_name("work") / "shards", "train", taxonomy)
    assert len(train.shards) == 3
    assert train.count_labels().tolist() == [2] * 11


def test_the_folder_is_no_part_of_the_stages_identity(given):
    prepare(build_config(given))
    done = (given.with_name("work") / "shards" / "DONE.json").read_bytes()
    given.rename(given.with_name("moved"))
    prepare(PrepareConfig(workdir=given.with_name("work"), data=ShardsConfig(path=given.with_name("moved"))))
    assert (given.with_name("work") / "shards" / "DONE.json").read_bytes() == done


@pytest.mark.parametrize(
    ("content", "expected"), [(b'{"classes": [], "classes": []}', "comes twice"), (b"[" * 10**5, "not JSON")]
)
def test_a_taxonomy_behind_a_url_is_read_as_strictly_as_one_here(content, expected, tmp_path):
    (tmp_path / "taxonomy.json").write_bytes(content)
    with serve(tmp_path) as server, pytest.raises(DataError, match=expected):
        load_shards_taxonomy(ShardsConfig(path=server.url))
