"""Targets of samples: labels against the taxonomy's own smearing, stored targets against arrays that the test wrote."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from concentration.array_files import compute_checksum, load_metadata
from concentration.data.mapped_labels import map_labels
from concentration.data.sample_targets import LabelTargets, MixedTargets, StoredTargets, WeightedOutside
from concentration.data.split import load_split
from concentration.data.views import View, describe_decoder
from concentration.errors import ConfigError, DataError
from concentration.label_mix import LabelMix
from concentration.targets import TargetFile, TargetRecords
from concentration.taxonomy import Taxonomy

SEVERAL = [
    [["gull"], ["taxi", "osprey"], ["bird"]],
    [["egg", "osprey", "car", "gull"], ["soup"]],
    [["tram"], ["raptor", "seabird"]],
]
ONE_EACH = [[ids[:1] for ids in shard] for shard in SEVERAL]
ALL = np.arange(7)
TAIL = 0.5
NUM_KEPT = {"birds": 3, "cars": 2, "dishes": 2}


@pytest.fixture(scope="module", params=["several labels", "one label each"])
def split(request, make_split, tmp_path_factory):
    labels = SEVERAL if request.param == "several labels" else ONE_EACH
    return make_split(tmp_path_factory.mktemp("split"), labels)


def rows_of(targets, ordinals=ALL, epoch=0) -> list[list[tuple[int, float]]]:
    """(output, probability) of each sample, without the unused places."""
    looked_up = targets.lookup(ordinals, epoch)
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


def write_targets(directory: Path, split, num_views: int = 0, codec: str = "plain") -> list[list[dict[int, float]]]:
    """A folder of targets that the test makes up; returns what each sample should get: by view, {output: probability}."""
    generator = np.random.default_rng(0)
    expected: list[list[dict[int, float]]] = [[{} for _ in range(max(1, num_views))] for _ in ALL]
    view_of_sample = generator.integers(0, 100, (len(ALL), max(1, num_views), 13)).astype(np.uint8)
    view_of_sample[..., 4:8] += 100  # right and bottom
    view_of_sample[..., 12] %= 4  # interpolation
    for vertical, num_kept in NUM_KEPT.items():
        outputs = split.taxonomy.vertical_slice(vertical)
        size = outputs.stop - outputs.start
        for shard, (start, stop) in enumerate(itertools.pairwise(split.shard_start.tolist())):
            inside = [o for o in range(start, stop) if any(outputs.start <= c < outputs.stop for c in split.labels(o))]
            if not inside:
                continue
            records = [(ordinal, view) for ordinal in inside for view in range(max(1, num_views))]
            index = np.stack([generator.permutation(size)[:num_kept] for _ in records])
            probability = generator.uniform(0.1, 1, index.shape).astype(np.float16).astype(np.float32)
            for (ordinal, view), index_K, probability_K in zip(records, index, probability, strict=True):
                pairs = zip(index_K.tolist(), probability_K.tolist(), strict=True)
                expected[ordinal][view].update({outputs.start + local: value for local, value in pairs})
            view = np.stack([view_of_sample[record] for record in records]) if num_views else None
            tail = np.full(len(records), TAIL, dtype=np.float32)
            written = TargetRecords(np.array(inside) - start, index, probability, tail, view)
            written.save(directory / vertical / f"train-{shard:06d}.safetensors", codec, size)
        manifest = {
            "num_kept": num_kept,
            "views": num_views,
            "taxonomy": split.taxonomy.fingerprint,
            "data": split.fingerprint,
            "preprocessing": {"interpolation": "bilinear", "decoder": describe_decoder()},
        }
        (directory / vertical / "manifest.json").write_text(json.dumps(manifest))
    return expected


@pytest.fixture
def stored(split, tmp_path):
    """A folder of targets of the centre view, and what each sample should get: {output: probability}."""
    return tmp_path, [views[0] for views in write_targets(tmp_path, split)]


def test_stored_targets_of_all_verticals_of_a_sample_are_put_together(stored, split):
    directory, expected = stored
    targets = StoredTargets(directory, split)
    assert rows_of(targets) == [sorted(row.items()) for row in expected]
    assert rows_of(targets, ALL[::-1]) == [sorted(row.items()) for row in reversed(expected)]
    assert rows_of(targets, np.array([4, 4, 0])) == [sorted(expected[ordinal].items()) for ordinal in (4, 4, 0)]
    assert is_width_constant(targets)
    assert targets.lookup(ALL, 0).index_BK.shape[1] == max(len(row) for row in expected), "no wider than needed"


@pytest.fixture
def uneven(make_split, taxonomy, tmp_path):
    """As many labels as samples, but not one each: some were mapped to nothing."""
    labels = [[["gull"], ["taxi", "osprey"], ["bird"]], [["egg", "car", "gull"], ["soup"]], [["tram"], ["raptor"]]]
    kept = ("taxi", "osprey", "egg", "gull", "car", "soup")
    split = map_labels(make_split(tmp_path / "given", labels), taxonomy, dict(zip(kept, kept, strict=True)), "there")
    assert len(split.label_output) == len(split)
    return split


@pytest.mark.parametrize("smear", [False, True])
def test_as_many_labels_as_samples_need_not_be_one_each(smear, uneven, taxonomy):
    own = [uneven.labels(ordinal) for ordinal in ALL.tolist()]
    expected = [taxonomy.smear(labels) if smear else labels for labels in own]
    assert rows_of(LabelTargets(uneven, smear)) == [sorted((output, 1.0) for output in row) for row in expected]


def test_stored_targets_of_as_many_labels_as_samples_that_are_not_one_each(uneven, tmp_path):
    expected = write_targets(tmp_path, uneven)
    assert rows_of(StoredTargets(tmp_path, uneven)) == [sorted(views[0].items()) for views in expected]


def test_epochs_take_turns_with_the_stored_views(split, tmp_path):
    expected = write_targets(tmp_path, split, num_views=3)
    targets = StoredTargets(tmp_path, split)
    for epoch in range(7):
        assert rows_of(targets, epoch=epoch) == [sorted(views[epoch % 3].items()) for views in expected]
    views = [targets.views(ALL, epoch).record_BV for epoch in range(6)]
    assert all(np.array_equal(views[epoch], views[epoch + 3]) for epoch in range(3))
    assert len({view.tobytes() for view in views}) == 3
    for row, ordinal in enumerate([5, 0, 5]):
        np.testing.assert_array_equal(targets.views(np.array([5, 0, 5]), 1).record_BV[row], views[1][ordinal])
    assert LabelTargets(split, smear=True).views(ALL, 0) is None
    assert isinstance(targets.views(ALL, 0).at(0, (30, 20)), View)


def test_targets_of_the_centre_view_leave_the_view_to_the_student(stored, split):
    assert StoredTargets(stored[0], split).views(ALL, 2) is None


@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_a_spread_tail_is_shared_by_the_classes_that_are_not_listed(codec, split, tmp_path, taxonomy):
    expected = [views[0] for views in write_targets(tmp_path, split, codec=codec)]
    dense_BC = StoredTargets(tmp_path, split, tail="spread").lookup(ALL, 0).dense(*taxonomy.vertical_sizes).numpy()
    for ordinal, row in enumerate(expected):
        wanted_C = np.zeros(taxonomy.num_classes)
        for vertical in taxonomy.route(split.labels(ordinal)):
            outputs = taxonomy.vertical_slice(vertical)
            left_out = outputs.stop - outputs.start - NUM_KEPT[vertical]
            wanted_C[outputs] = TAIL / left_out if left_out else 0
        for output, probability in row.items():
            wanted_C[output] = probability
        np.testing.assert_allclose(dense_BC[ordinal], wanted_C, atol=0.02 if codec == "packed" else 1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_only_verticals_without_a_label_of_the_sample_are_weighed(weight, stored, split, taxonomy):
    targets = WeightedOutside(StoredTargets(stored[0], split), split, weight)
    looked_up = targets.lookup(ALL, 0)
    for ordinal, weight_M in enumerate(looked_up.weight_BM.tolist()):
        routed = taxonomy.route(split.labels(ordinal))
        assert weight_M == [1.0 if vertical in routed else weight for vertical in taxonomy.verticals]
    assert torch.equal(looked_up.index_BK, StoredTargets(stored[0], split).lookup(ALL, 0).index_BK)
    assert targets.views(ALL, 0) is None


@pytest.mark.parametrize("tail", ["zero", "spread"])
@pytest.mark.parametrize("smear", [False, True])
def test_labels_take_their_share_in_the_verticals_where_they_say_a_leaf(smear, tail, stored, split, taxonomy):
    kept, labels = StoredTargets(stored[0], split, tail), LabelTargets(split, smear)
    mix = LabelMix(0.5, taxonomy.is_leaf, taxonomy.vertical_of_output)
    mixed = MixedTargets(kept, labels, mix)
    dense = {name: targets.lookup(ALL, 1).dense(*taxonomy.vertical_sizes).numpy()
             for name, targets in (("kept", kept), ("labels", labels), ("mixed", mixed))}  # fmt: skip
    num_mixed = 0
    for ordinal in ALL.tolist():
        known = {taxonomy.vertical_of_output[o] for o in split.labels(ordinal) if taxonomy.is_leaf[o]}
        is_known_C = np.isin(taxonomy.vertical_of_output, list(known))
        half_C = (dense["kept"][ordinal] + dense["labels"][ordinal]) / 2
        np.testing.assert_allclose(
            dense["mixed"][ordinal], np.where(is_known_C, half_C, dense["kept"][ordinal]), rtol=1e-6, atol=1e-9
        )
        num_mixed += len(known)
    assert 0 < num_mixed < len(ALL) * taxonomy.num_verticals
    assert is_width_constant(mixed)
    assert mixed.views(ALL, 0) is None


def test_another_decoder_than_the_teachers_is_said(split, tmp_path):
    write_targets(tmp_path, split, num_views=1)
    change_manifest(tmp_path, "cars", preprocessing={"interpolation": "bilinear", "decoder": {"pillow": "9.0"}})
    with pytest.warns(UserWarning, match=r"decoded by \{'pillow': '9.0'\}, here by"):
        StoredTargets(tmp_path, split)


def test_views_that_cannot_be_right_are_refused(split, tmp_path):
    write_targets(tmp_path, split, num_views=2)
    path = tmp_path / "cars" / "train-000002.safetensors"
    view = safetensors.numpy.load_file(path)["view"]
    rewrite(path, view=np.full_like(view, 7))
    refuse((tmp_path,), split, str(path), "an empty crop")
    if len(split.label_output) > len(split):
        rewrite(tmp_path / "birds" / "train-000000.safetensors", view=np.arange(78, dtype=np.uint8).reshape(6, 13))
        refuse((tmp_path,), split, "in another view than by the teacher of another vertical")
    write_targets(tmp_path, split)
    change_manifest(tmp_path, "dishes", views=2)
    refuse((tmp_path,), split, "different numbers of views, {'birds': 0, 'cars': 0, 'dishes': 2}")
    for vertical in NUM_KEPT:
        change_manifest(tmp_path, vertical, views=2)
    refuse((tmp_path,), split, "1 views of a sample, but its manifest says 2")


def test_another_preprocessing_is_refused(stored, split):
    change_manifest(stored[0], "cars", preprocessing={"interpolation": "nearest"})
    refuse(stored, split, "cars/manifest.json", "expected bilinear")


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
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, path, load_metadata(path) | {"crc32": compute_checksum(arrays)})


def refuse(stored, split, *expected: str) -> None:
    with pytest.raises(DataError) as caught:
        StoredTargets(stored[0], split).lookup(ALL, 0)
    for text in expected:
        assert text in str(caught.value)


def test_targets_of_a_vertical_that_are_not_there_are_refused(stored, split):
    (stored[0] / "cars" / "manifest.json").unlink()
    refuse(stored, split, "cars/manifest.json", "vertical=cars overwrite=true`")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"num_kept": null}', "\xff", "[" * 10**5])
def test_a_damaged_manifest_is_refused(content, stored, split):
    (stored[0] / "cars" / "manifest.json").write_text(content, encoding="latin-1")
    refuse(stored, split, "cars/manifest.json")


@pytest.mark.parametrize("name", ["num_kept", "views"])
@pytest.mark.parametrize("value", [True, None, "1", 1.0, -1, 2**40, 10**30, [1]])
def test_numbers_of_a_manifest_that_cannot_be_are_refused_by_name(name, value, stored, split):
    change_manifest(stored[0], "cars", **{name: value})
    refuse(stored, split, f"cars/manifest.json: '{name}' is {value!r}, expected {int(name == 'num_kept')} to ")


def test_no_kept_class_at_all_is_refused(stored, split):
    change_manifest(stored[0], "cars", num_kept=0)
    refuse(stored, split, "cars/manifest.json: 'num_kept' is 0, expected 1 to 3")


@pytest.mark.parametrize("codec", ["plain", "packed"])
def test_every_changed_byte_of_stored_targets_is_noticed(codec, split, tmp_path):
    write_targets(tmp_path, split, num_views=2, codec=codec)
    path = tmp_path / "birds" / "train-000000.safetensors"
    content = path.read_bytes()
    for place in range(8 + int.from_bytes(content[:8], "little"), len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refuse((tmp_path,), split, str(path), "its checksum is")


def test_a_file_is_held_against_its_checksum_once(split, tmp_path, monkeypatch):
    verified = []
    monkeypatch.setattr(TargetFile, "verify", lambda file: verified.append(file))
    write_targets(tmp_path, split, num_views=2)
    targets = StoredTargets(tmp_path, split)
    for epoch in range(4):
        targets.lookup(ALL, epoch)
    assert len(verified) == len(list(tmp_path.glob("*/*.safetensors")))


def test_targets_of_a_shard_that_are_not_there_or_damaged_are_refused(stored, split):
    path = stored[0] / "birds" / "train-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(stored, split, str(path), "damaged")
    path.unlink()
    refuse(stored, split, str(path), "no such file")


def test_targets_made_from_another_taxonomy_or_other_data_are_refused(stored, split, make_split, tmp_path):
    change_manifest(stored[0], "dishes", taxonomy="another")
    refuse(
        stored, split, "dishes/manifest.json", "made from another taxonomy ('another', here", "make the targets again"
    )
    change_manifest(stored[0], "dishes", taxonomy=split.taxonomy.fingerprint, data="other")
    refuse(stored, split, "dishes/manifest.json", "made from another data ('other', here")
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


@pytest.mark.parametrize("num_kept", [1, 4])
def test_targets_of_another_width_than_their_manifest_says_are_refused(num_kept, stored, split):
    change_manifest(stored[0], "birds", num_kept=num_kept)
    refuse(
        stored,
        split,
        "birds/train-000000.safetensors",
        "'num_kept': '3'",
        f"expected {{'vertical_size': '5', 'num_kept': '{num_kept}'}}",
    )


def test_a_class_outside_its_vertical_is_refused(stored, split):
    path = stored[0] / "cars" / "train-000002.safetensors"
    arrays = safetensors.numpy.load_file(path)
    rewrite(path, index=arrays["index"] + np.uint16(3))
    refuse(stored, split, str(path), "in a vertical of 3 classes")


def test_a_misspelt_tail_is_refused(split, tmp_path):
    """The tail mass would be left out."""
    with pytest.raises(ConfigError, match="tail=spred: expected 'zero' or 'spread'; did you mean 'spread'"):
        StoredTargets(tmp_path, split, tail="spred")
