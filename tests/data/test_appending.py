"""What a prepared set keeps when it grows: positions and outputs of classes, numbers of shards, splits of samples."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concentration.data.appending import Before, append_classes, find_kept
from concentration.data.sources.source import Item
from concentration.errors import DataError
from concentration.taxonomy import Taxonomy, TaxonomyClass


@st.composite
def draw_classes(draw) -> list[TaxonomyClass]:
    """Two to twelve classes in verticals of two or more; a parent lies before its child."""
    verticals = draw(st.lists(st.sampled_from("uvw"), min_size=2, max_size=12))
    verticals = [v for v in verticals if verticals.count(v) > 1] or ["u", "u"]
    parents = [
        draw(st.lists(st.integers(0, n - 1), max_size=2, unique=True)) if n else [] for n in range(len(verticals))
    ]
    return [
        TaxonomyClass(f"c{n}", f"C{n}", tuple(f"c{p}" for p in parents[n]), vertical)
        for n, vertical in enumerate(verticals)
    ]


@given(draw_classes(), st.data())
def test_earlier_classes_keep_their_positions_and_outputs_and_gone_ones_stay(classes, data):
    order = data.draw(st.permutations(range(len(classes))))
    some = {classes[place].id for place in order[: data.draw(st.integers(2, len(classes)))]}
    while missing := {p for c in classes if c.id in some for p in c.parents} - some:
        some |= missing
    kept = [classes[place] for place in order if classes[place].id in some]
    gone = [TaxonomyClass(f"gone-{v}", "Gone", (), v) for v in sorted({c.vertical for c in kept})]
    earlier = Taxonomy([*kept, *gone])
    grown = append_classes(earlier, classes, "here")
    assert grown.classes[: earlier.num_classes] == earlier.classes
    assert list(grown.classes[earlier.num_classes :]) == [c for c in classes if c.id not in some]
    for vertical in earlier.verticals:
        before, after = earlier.restrict(vertical), grown.restrict(vertical)
        assert after.classes[: before.num_classes] == before.classes
    assert append_classes(grown, classes, "here").classes == grown.classes


def test_names_may_change_and_parents_may_be_told_in_another_order(taxonomy):
    changed = [replace(c, name="other", parents=c.parents[::-1]) for c in taxonomy.classes]
    assert append_classes(taxonomy, changed, "here").classes == taxonomy.classes


def test_a_parent_in_another_vertical_may_come_and_go(taxonomy):
    """It changes no label; the parents that were stored stay."""
    changed = [replace(c, parents=(*c.parents, "soup")) if c.id == "gull" else c for c in taxonomy.classes]
    assert append_classes(taxonomy, changed, "here").classes == taxonomy.classes
    assert append_classes(Taxonomy(changed), taxonomy.classes, "here").classes == tuple(changed)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vertical": "cars"}, "here: class 'gull' had the vertical 'birds', and now 'cars'; restore it, or prepare"),
        ({"parents": ("bird",)}, r"class 'gull' had the parents \['seabird'\], and now \['bird'\]"),
    ],
)
def test_a_class_that_moved_is_refused_by_name(change, expected, taxonomy):
    now = [replace(c, **change) if c.id == "gull" else c for c in taxonomy.classes]
    with pytest.raises(DataError, match=expected):
        append_classes(taxonomy, now, "here")


def test_what_was_there_is_found_by_the_numbers_of_its_shards(make_split, taxonomy, tmp_path):
    make_split(tmp_path, [[["gull"], ["taxi", "osprey"]], [["egg"]]], "train")
    make_split(tmp_path, [[["tram"], ["car"]]], "test")
    before = Before.look(tmp_path, taxonomy)
    assert before == Before(11, {"train": 2, "val": 0, "test": 1})
    before.save(tmp_path)
    assert Before.load(tmp_path) == before
    make_split(tmp_path, [[], [], [["soup"]]][2:], "val")
    assert not before.holds(tmp_path / "val-000000.tar")
    labels = {"train-000000-0": ("gull",), "train-000000-1": ("osprey", "taxi"), "train-000001-0": ("soup",)}
    labels |= {"test-000000-1": ("car",), "val-000000-0": ("soup",)}
    items = {key: Item(key, ids, None) for key, ids in labels.items()}
    kept = find_kept(tmp_path, before, taxonomy, items)
    assert kept.splits == {key: key.split("-")[0] for key in labels if key[0] != "v"}
    assert kept.num_gone == 1
    assert kept.num_other_labels == 1
    before.forget(tmp_path)
    assert Before.load(tmp_path) is None


def test_a_foreign_tar_among_the_shards_is_refused(taxonomy, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"mine\.tar: no shard of `concentrate prepare`; move it elsewhere"):
        Before.look(tmp_path, taxonomy)
