"""Samples seen with the labels of another taxonomy: which count, for what, and what a map may not say."""

import numpy as np
import pytest

from concentration.data.mapped_labels import load_class_map, map_labels
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy

LABELS = [[["gull"], ["taxi", "ramen"], ["tram"]], [["osprey", "gull"], ["car"]]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, make_split):
    return make_split(tmp_path_factory.mktemp("theirs"), LABELS)


@pytest.fixture(scope="module")
def ours() -> Taxonomy:
    """Other classes in another order; `taxi` alone has the same id."""
    classes = [
        ("vehicle", [], "things"),
        ("taxi", ["vehicle"], "things"),
        ("seagull", [], "animals"),
        ("raptor2", [], "animals"),
    ]
    return Taxonomy.from_json({"classes": [{"id": i, "name": i, "parents": p, "vertical": v} for i, p, v in classes]})


def named(split) -> list[set[str]]:
    return [{split.taxonomy.class_of_output(o).id for o in split.labels(ordinal)} for ordinal in range(len(split))]


def test_labels_count_where_they_are_mapped(theirs, ours):
    class_map = {"gull": "seagull", "osprey": "seagull", "taxi": "taxi", "car": "vehicle"}
    mapped = map_labels(theirs, ours, class_map, "there")
    assert named(mapped) == [{"seagull"}, {"taxi"}, set(), {"seagull"}, {"vehicle"}]
    assert mapped.routed("things").tolist() == [1, 4]
    assert mapped.count_labels()[ours.output("seagull")] == 2, "two labels of one class are one"
    assert mapped.count_smeared()[ours.output("vehicle")] == 2
    assert mapped.fingerprint != theirs.fingerprint
    assert named(theirs)[2] == {"tram"}, "what was mapped stays as it is"
    sample_P, _ = mapped.label_pairs(np.arange(5), smear=False)
    assert sample_P.tolist() == [0, 1, 3, 4]


def test_without_a_map_the_ids_that_both_have_count(theirs, ours):
    assert named(map_labels(theirs, ours, None, "there")) == [set(), {"taxi"}, set(), set(), set()]


@pytest.mark.parametrize(
    ("class_map", "expected"),
    [
        ({"gul": "seagull"}, "there: 'gul' to 'seagull': there is no class 'gul' among those of the samples"),
        ({"gull": "seagul"}, "there is no class 'seagul' among those of the network"),
        ({"egg": "seagull"}, "there: no sample is left with a label"),
    ],
)
def test_a_wrong_map_is_refused(theirs, ours, class_map, expected):
    with pytest.raises(DataError, match=expected):
        map_labels(theirs, ours, class_map, "there")


def test_a_map_is_a_file_of_ids(tmp_path):
    (tmp_path / "map.json").write_text('{"a": "b"}')
    assert load_class_map(tmp_path / "map.json") == {"a": "b"}
    (tmp_path / "list.json").write_text('["a"]')
    with pytest.raises(DataError, match="expected a JSON object from class ids to class ids"):
        load_class_map(tmp_path / "list.json")
    with pytest.raises(DataError, match="no such file"):
        load_class_map(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"Is a directory.*give a file"):
        load_class_map(tmp_path)
