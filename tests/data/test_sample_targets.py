"""Targets of samples: labels against the taxonomy's own smearing, stored targets against arrays that the test wrote."""

import itertools
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy

from concentration.data.index import load_split
from concentration.data.sample_targets import LabelTargets, StoredTargets
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

SEVERAL = [
    [["gull"], ["taxi", "osprey"], ["bird"]],
    [["egg", "osprey", "car", "gull"], ["soup"]],
    [["tram"], ["raptor", "seabird"]],
]
ONE_EACH = [[ids[:1] for ids in shard] for shard in SEVERAL]
ALL = np.arange(7)
NUM_KEPT = {"birds": 3, "cars": 2, "dishes": 2}


@pytest.fixture(scope="module", params=["several labels", "one label each"])
def split(request, make_split, tmp_path_factory):
    labels = SEVERAL if request.param == "several labels" else ONE_EACH
    return make_split(tmp_path_factory.mktemp("split"), labels)


def rows_of(targets, ordinals=ALL) -> list[list[tuple[int, float]]]:
    """(output, probability) of each sample, without the unused places."""
    looked_up = targets.lookup(ordinals, 0)
    assert looked_up.index_BK.dtype.is_signed
    assert looked_up.index_BK.shape == looked_up.probability_BK.shape
    pairs = [
        list(zip(index.tolist(), probability.tolist(), strict=True))
        for index, probability in zip(looked_up.index_BK, looked_up.probability_BK, strict=True)
    ]
    for row in pairs:
        assert all(index == 0 for index, probability in row if probability == 0), "unused places hold index 0"
    return [sorted(pair for pair in row if pair[1]) for row in pairs]


def is_width_constant(targets) -> bool:
    widths = {targets.lookup(np.array(list(some)), 0).index_BK.shape[1] for some in ([0], [6], [3, 1], [2, 2, 4])}
    return len(widths) == 1


@pytest.mark.parametrize("smear", [False, True])
def test_labels_of_all_verticals_are_those_of_the_taxonomy(smear, split, taxonomy):
    targets = LabelTargets(split, smear)
    expected = [taxonomy.smear(split.labels(o)) if smear else split.labels(o) for o in ALL.tolist()]
    assert rows_of(targets) == [sorted((output, 1.0) for output in outputs) for outputs in expected]
    assert is_width_constant(targets)
    assert targets.lookup(ALL, 0).index_BK.shape[1] == max(len(outputs) for outputs in expected), "no wider than needed"


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("vertical", ["birds", "cars", "dishes"])
def test_labels_of_a_vertical_are_its_slice_of_all_labels(vertical, smear, split, taxonomy):
    targets = LabelTargets(split, smear, vertical)
    outputs = taxonomy.vertical_slice(vertical)
    dense = LabelTargets(split, smear).lookup(ALL).dense(taxonomy.num_classes)[:, outputs]
    assert (targets.lookup(ALL, 0).dense(outputs.stop - outputs.start) == dense).all()
    assert is_width_constant(targets)
    routed = split.routed(vertical)
    assert all(rows_of(targets, routed)), "every routed sample has a target"


def test_a_vertical_without_labels_here_gives_empty_targets(make_split, tmp_path):
    """As on a validation split."""
    targets = LabelTargets(make_split(tmp_path, [[["gull"], ["bird"]]]), True, "cars").lookup(np.array([0, 1]))
    assert targets.index_BK.shape == (2, 1)
    assert not targets.dense(3).any()


@pytest.fixture
def stored(split, tmp_path):
    """A folder of targets that the test made up, and what each sample should get: {output: probability}."""
    generator = np.random.default_rng(0)
    expected: list[dict[int, float]] = [{} for _ in ALL]
    for vertical, num_kept in NUM_KEPT.items():
        outputs = split.taxonomy.vertical_slice(vertical)
        for shard, (start, stop) in enumerate(itertools.pairwise(split.shard_start)):
            inside = [
                ordinal
                for ordinal in range(start, stop)
                if any(outputs.start <= output < outputs.stop for output in split.labels(ordinal))
            ]
            if not inside:
                continue
            size = outputs.stop - outputs.start
            index = np.stack([generator.permutation(size)[:num_kept] for _ in inside]).astype(np.uint16)
            probability = generator.uniform(0.1, 1, index.shape).astype(np.float16)
            for row, ordinal in enumerate(inside):
                columns = zip(index[row].tolist(), probability[row].tolist(), strict=True)
                expected[ordinal].update({outputs.start + local: value for local, value in columns})
            arrays = {
                "row": np.array(inside, dtype=np.int32) - np.int32(start),
                "index": index,
                "probability": probability,
                "tail": np.zeros(len(inside), dtype=np.float16),
            }
            path = tmp_path / vertical / f"train-{shard:06d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            safetensors.numpy.save_file(arrays, path)
        manifest = {"num_kept": num_kept, "taxonomy": split.taxonomy.fingerprint, "data": split.fingerprint}
        (tmp_path / vertical / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, expected


def test_stored_targets_of_all_verticals_of_a_sample_are_put_together(stored, split):
    directory, expected = stored
    targets = StoredTargets(directory, split)
    assert rows_of(targets) == [sorted(row.items()) for row in expected]
    assert rows_of(targets, ALL[::-1]) == [sorted(row.items()) for row in reversed(expected)]
    assert rows_of(targets, np.array([4, 4, 0])) == [sorted(expected[ordinal].items()) for ordinal in (4, 4, 0)]
    assert is_width_constant(targets)
    assert targets.lookup(ALL, 0).index_BK.shape[1] == max(len(row) for row in expected), "no wider than needed"


def test_targets_travel_to_worker_processes(stored, split):
    directory, _ = stored
    for targets in (
        StoredTargets(directory, split),
        LabelTargets(split, smear=True),
        LabelTargets(split, smear=False, vertical="cars"),
    ):
        before = rows_of(targets)  # fills its caches
        assert rows_of(pickle.loads(pickle.dumps(targets))) == before


def change_manifest(directory, vertical, **changes) -> None:
    path = directory / vertical / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path, **changes) -> None:
    arrays = safetensors.numpy.load_file(path) | changes
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def refuse(stored, split, *expected: str) -> None:
    with pytest.raises(DataError) as caught:
        StoredTargets(stored[0], split).lookup(ALL, 0)
    for text in expected:
        assert text in str(caught.value)


def test_targets_of_a_vertical_that_are_not_there_are_refused(stored, split):
    (stored[0] / "cars" / "manifest.json").unlink()
    refuse(stored, split, "cars/manifest.json", "concentrate targets vertical=cars")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"num_kept": null}', "\xff"])
def test_a_damaged_manifest_is_refused(content, stored, split):
    (stored[0] / "cars" / "manifest.json").write_text(content, encoding="latin-1")
    refuse(stored, split, "cars/manifest.json", "missing or damaged")


def test_targets_of_a_shard_that_are_not_there_or_damaged_are_refused(stored, split):
    path = stored[0] / "birds" / "train-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(stored, split, str(path), "damaged")
    path.unlink()
    refuse(stored, split, str(path), "no such file")


def test_targets_made_from_another_taxonomy_or_other_data_are_refused(stored, split, make_split, tmp_path):
    change_manifest(stored[0], "dishes", taxonomy="another")
    refuse(stored, split, "dishes/manifest.json", "made from another taxonomy (another, here", "make the targets again")
    change_manifest(stored[0], "dishes", taxonomy=split.taxonomy.fingerprint, data="other")
    refuse(stored, split, "dishes/manifest.json", "made from another data (other, here")
    change_manifest(stored[0], "dishes", data=split.fingerprint)
    entries = split.taxonomy.to_json()["classes"]
    more = Taxonomy.from_json({"classes": [*entries, {"id": "swan", "parents": ["bird"], "vertical": "birds"}]})
    refuse(stored, load_split(split.shards[0].path.parent, "train", more), "another taxonomy")
    changed = make_split(tmp_path / "changed", [[["gull"], ["taxi"], ["bird"]], *SEVERAL[1:]])
    refuse(stored, changed, "another data")


def test_targets_of_other_rows_are_refused(stored, split):
    path = stored[0] / "birds" / "train-000000.safetensors"
    rows = safetensors.numpy.load_file(path)["row"]
    rewrite(path, row=rows[::-1])
    refuse(stored, split, str(path), "other rows", "'birds'")
    rewrite(path, row=rows + 1)
    refuse(stored, split, str(path), "other rows")


@pytest.mark.parametrize("num_columns", [1, 4])
def test_targets_of_another_width_than_their_manifest_says_are_refused(num_columns, stored, split):
    path = stored[0] / "birds" / "train-000000.safetensors"
    arrays = safetensors.numpy.load_file(path)
    index, probability = (np.repeat(arrays[name], 2, axis=1)[:, :num_columns] for name in ("index", "probability"))
    rewrite(path, index=index, probability=probability)
    refuse(stored, split, str(path), f"keeps {num_columns} classes a sample", "says 3")


def test_a_class_outside_its_vertical_is_refused(stored, split):
    path = stored[0] / "cars" / "train-000002.safetensors"
    arrays = safetensors.numpy.load_file(path)
    rewrite(path, index=arrays["index"] + np.uint16(3))
    refuse(stored, split, str(path), "in a vertical of 3 classes")
