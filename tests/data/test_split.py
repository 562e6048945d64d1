"""A split against slow references: its numbering, its labels and counts; and what keeps it from being loaded."""

import itertools
import pickle

import numpy as np
import pytest
from labelled_shards import encode_labels

from concentration.data import split as split_module
from concentration.data.index import index_shard
from concentration.data.split import check_keys, load_split
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

LABELS = [
    [["gull"], ["taxi", "osprey"], ["bird"]],
    [["egg", "osprey", "gull"], ["soup"]],
    [["tram"]],
    [["osprey"], ["ramen", "tram"], ["gull", "bird"], ["raptor", "seabird"]],
]


@pytest.fixture(scope="module", params=["several labels", "one label each"])
def split_and_labels(request, make_split, taxonomy, tmp_path_factory):
    """A split, and by ordinal the ids that were written."""
    labels = LABELS if request.param == "several labels" else [[ids[:1] for ids in shard] for shard in LABELS]
    return make_split(tmp_path_factory.mktemp("split"), labels), list(itertools.chain(*labels))


def test_a_key_that_two_shards_share_is_refused(write_tar, encode_image, taxonomy, tmp_path, monkeypatch):
    for number, key in enumerate("aba"):
        members = [(f"{key}.png", encode_image()), (f"{key}.json", encode_labels("gull"))]
        shard = write_tar(tmp_path / f"train-{number}.tar", members)
        index_shard(shard, taxonomy, shard.name).save(shard.with_suffix(".index"))
    with pytest.raises(DataError, match=r"train-2\.tar and .*train-0\.tar: .*'a'.*unique"):
        check_keys(load_split(tmp_path, "train", taxonomy))
    (tmp_path / "train-2.index").unlink()
    split = load_split(tmp_path, "train", taxonomy)
    check_keys(split)
    monkeypatch.setattr(split_module, "_hash_keys", lambda shard: np.zeros(shard.num_samples, np.int64))
    check_keys(split)  # keys are compared where their hashes meet


def test_a_split_keeps_few_indices_and_reads_the_others_again(make_split, taxonomy, tmp_path, monkeypatch):
    monkeypatch.setattr(split_module, "_KEPT_INDICES", 2)
    written = make_split(tmp_path, [[["gull"], ["taxi"]], [["egg"]], [["soup"], ["car"], ["tram"]]])
    split = pickle.loads(pickle.dumps(written))
    assert [shard.num_samples for shard in split.shards] == [2, 1, 3]
    keys = [split.key(ordinal) for ordinal in (0, 2, 5, 1)]
    assert [key.partition("/")[2] for key in keys] == [
        "train-000000-0",
        "train-000001-0",
        "train-000002-2",
        "train-000000-1",
    ]
    make_split(tmp_path, [[["car"], ["taxi"]]])
    split.shards[1], split.shards[2]
    with pytest.raises(DataError, match=r"train-000000\.index: was written anew while it was in use"):
        split.key(0)


def test_a_range_of_samples_is_split_as_the_array_of_them(split_and_labels):
    split, _ = split_and_labels
    for start, stop in itertools.combinations_with_replacement(range(11), 2):
        parts = split.by_shard(range(start, stop))
        assert all(isinstance(part, range) for part in parts)
        expected = split.by_shard(np.arange(start, stop))
        assert [list(part) for part in parts] == [part.tolist() for part in expected]


def test_a_split_without_shards_names_what_to_run(taxonomy, tmp_path):
    with pytest.raises(DataError, match="no shards of the split 'val'; run `concentrate prepare`"):
        load_split(tmp_path, "val", taxonomy)


def test_a_split_that_prepare_has_made_no_shards_of_names_those_that_are_there(taxonomy, tmp_path):
    (tmp_path / "train-000000.index").touch()
    with pytest.raises(
        DataError, match=r"no shards of the split 'test', only of train; set data.split.test_per_class"
    ) as caught:
        load_split(tmp_path, "test", taxonomy)
    assert "run `concentrate prepare` first" not in str(caught.value)


def test_a_taxonomy_that_lost_classes_is_refused(make_split, taxonomy, tmp_path):
    make_split(tmp_path, [[["gull"], ["tram"]]])
    fewer = Taxonomy(taxonomy.classes[:-1])
    with pytest.raises(DataError, match="label at position 10, but the taxonomy has 10 classes"):
        load_split(tmp_path, "train", fewer)


def test_a_split_numbers_samples_through_and_knows_their_labels(split_and_labels, taxonomy):
    split, labels = split_and_labels
    assert len(split) == 10
    assert split.shard_start.tolist() == [0, 3, 5, 6, 10]
    assert [split.shard_of(ordinal) for ordinal in range(10)] == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    for ordinal, ids in enumerate(labels):
        assert sorted(taxonomy.class_of_output(output).id for output in split.labels(ordinal)) == sorted(ids)
    assert split.key(0) == "train-000000.tar/train-000000-0"
    assert split.key(4) == "train-000001.tar/train-000001-1"


@pytest.mark.parametrize("counted_together", [1, 3, 1000])
def test_counts_and_routing_are_the_slow_ones(counted_together, split_and_labels, taxonomy, monkeypatch):
    monkeypatch.setattr(split_module, "COUNTED_TOGETHER", counted_together)
    split, labels = split_and_labels
    outputs = [{taxonomy.output(class_id) for class_id in ids} for ids in labels]
    count = [sum(output in own for own in outputs) for output in range(taxonomy.num_classes)]
    assert split.count_labels().tolist() == count
    smeared = [set(taxonomy.smear(own)) for own in outputs]
    count_smeared = [sum(output in all_of for all_of in smeared) for output in range(taxonomy.num_classes)]
    assert split.count_smeared().tolist() == count_smeared
    for vertical in taxonomy.verticals:
        expected = [
            ordinal
            for ordinal, ids in enumerate(labels)
            if any(taxonomy.classes[taxonomy.position[class_id]].vertical == vertical for class_id in ids)
        ]
        assert split.routed(vertical).tolist() == expected
        assert split.count_routed()[taxonomy.vertical_number(vertical)] == len(expected)
        by_shard = split.by_shard(split.routed(vertical))
        assert len(by_shard) == 4
        assert [part.tolist() for part in by_shard] == [
            [ordinal for ordinal in expected if split.shard_of(ordinal) == shard] for shard in range(4)
        ]


def test_labels_follow_when_classes_are_appended(split_and_labels, make_split, taxonomy, tmp_path):
    """New classes move the outputs of later verticals; positions in the file, which the index keeps, stay."""
    split, labels = split_and_labels
    entries = taxonomy.to_json()["classes"]
    more = Taxonomy.from_json({"classes": [*entries, {"id": "swan", "parents": ["bird"], "vertical": "birds"}]})
    assert more.output("taxi") != taxonomy.output("taxi")
    reloaded = load_split(split.shards[0].path.parent, "train", more)
    for ordinal, ids in enumerate(labels):
        assert sorted(more.class_of_output(output).id for output in reloaded.labels(ordinal)) == sorted(ids)


def test_the_fingerprint_is_of_keys_labels_places_and_images(make_split, write_tar, taxonomy, tmp_path):
    def fingerprint(name: str, key: str = "a", ids: tuple[str, ...] = ("gull",), image: bytes = b"12", used=taxonomy):
        folder = tmp_path / name
        members = [
            ("first.png", b"-"),
            ("first.json", encode_labels("taxi")),
            (f"{key}.png", image),
            (f"{key}.json", encode_labels(*ids)),
        ]
        shard = write_tar(folder / "train-0.tar", members)
        index_shard(shard, used, shard.name).save(shard.with_suffix(".index"))
        return load_split(folder, "train", used).fingerprint

    same = fingerprint("0")
    assert fingerprint("1") == same, "the folder is no part of it"
    renamed = Taxonomy.from_json(
        {"classes": [entry | {"name": "another name"} for entry in taxonomy.to_json()["classes"]]}
    )
    assert fingerprint("2", used=renamed) == same, "display names are no part of it"
    entries = taxonomy.to_json()["classes"]
    more = Taxonomy.from_json({"classes": [*entries, {"id": "swan", "parents": [], "vertical": "birds"}]})
    others = [
        fingerprint("3", key="b"),
        fingerprint("4", ids=("osprey",)),
        fingerprint("5", ids=("gull", "osprey")),
        fingerprint("6", image=b"123"),
        fingerprint("8", image=b"13"),
        fingerprint("7", used=more),
    ]
    assert len({same, *others}) == 7
