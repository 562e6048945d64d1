"""Groups of classes as verticals: valid ones, the control of the same sizes, and what is said of them."""

import numpy as np
import pytest

from concentration.errors import DataError
from concentration.grouping.class_groups import NO_GROUP, ClassGroups, find_majority_groups, load_class_groups
from concentration.taxonomy import Taxonomy


def group_of(taxonomy: Taxonomy, **groups: str) -> np.ndarray:
    """(C,) by output, from `a="bird car"`; the others have none."""
    group_C = np.full(taxonomy.num_classes, NO_GROUP)
    for number, ids in enumerate(groups.values()):
        group_C[[taxonomy.output(class_id) for class_id in ids.split()]] = number
    return group_C


def test_groups_become_verticals_by_falling_size_and_classes_keep_their_places(taxonomy):
    group_C = group_of(taxonomy, a="bird car", b="seabird osprey soup gull ramen", c="raptor taxi egg tram")
    grouped = ClassGroups.build(group_C, taxonomy).build_taxonomy()
    assert [c.id for c in grouped.classes] == [c.id for c in taxonomy.classes]
    assert {c.id for c in grouped.classes if c.vertical == "group-0"} == {"seabird", "osprey", "soup", "gull", "ramen"}
    assert {c.id for c in grouped.classes if c.vertical == "group-2"} == {"bird", "car"}
    assert grouped.classes[grouped.position["osprey"]].parents == ("raptor", "seabird")
    # What is read back is the same partition.
    again = load_class_groups(taxonomy, Taxonomy.from_json(grouped.to_json()), "there")
    assert again.group_C.tolist() == ClassGroups.build(group_C, taxonomy).group_C.tolist()


def test_classes_without_a_group_or_alone_in_it_go_to_those_of_their_vertical(taxonomy):
    group_C = group_of(taxonomy, a="bird seabird car", b="soup egg ramen", c="taxi")
    groups = ClassGroups.build(group_C, taxonomy)
    named = {c.id: c.vertical for c in groups.build_taxonomy().classes}
    assert named["taxi"] == named["tram"] == named["car"] == named["gull"] == named["osprey"] != named["soup"]
    assert (groups.num_placed, groups.num_alone) == (5, 1)
    said = "5 classes were put to those of their vertical: of 4 nothing was known, and 1 were alone in their group, so that there"
    assert said in groups.describe()
    assert groups.sizes == (8, 3)


def test_what_cannot_be_verticals_is_refused(taxonomy):
    with pytest.raises(DataError, match="1 groups of two classes or more are left of 2"):
        ClassGroups.build(group_of(taxonomy, a="bird car soup", b="taxi"), taxonomy)
    with pytest.raises(DataError, match="not of the classes of this data: 8 are in one of them alone, 'bird' for one"):
        load_class_groups(taxonomy, taxonomy.restrict("cars"), "there")


def test_the_control_keeps_the_sizes_and_loses_the_groups(taxonomy):
    groups = ClassGroups(taxonomy.vertical_of_output, taxonomy)
    assert groups.compute_purity() == 1
    permuted = [groups.permute(seed) for seed in range(20)]
    assert all(p.sizes == groups.sizes for p in permuted)
    assert np.mean([p.compute_purity() for p in permuted]) < 0.8
    assert groups.permute(3).group_C.tolist() == permuted[3].group_C.tolist()


def test_each_class_is_where_most_of_its_samples_are(taxonomy):
    output = taxonomy.output
    pairs = [(0, "gull"), (0, "bird"), (1, "gull"), (1, "bird"), (2, "osprey"), (2, "bird"), (3, "taxi"), (4, "tram")]
    sample_P, output_P = np.array([(sample, output(name)) for sample, name in pairs]).T
    group_C = find_majority_groups(np.array([1, 1, 0, 2, NO_GROUP]), sample_P, output_P, 3, taxonomy.num_classes)
    found = {name: group_C[output(name)] for name in ("gull", "osprey", "bird", "taxi", "tram", "soup")}
    assert found == {"gull": 1, "osprey": 0, "bird": 1, "taxi": 2, "tram": NO_GROUP, "soup": NO_GROUP}


def test_the_description_names_sizes_verticals_and_classes(taxonomy):
    group_C = group_of(taxonomy, a="bird seabird osprey raptor gull egg", b="car taxi tram soup ramen")
    text = ClassGroups.build(group_C, taxonomy).describe(num_shown=2)
    assert "2 groups of 11 classes; 72.7% of the classes" in text
    assert "group-0: 6 classes (5 birds, 1 dishes)\n    Bird, Seabird, ..." in text
    assert "group-1: 5 classes (3 cars, 2 dishes)\n    Car, Taxi, ..." in text
