"""The taxonomy: which output is whose, smearing and routing against slow references, and what a wrong file is told."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.schema import MAX_NAME_BYTES
from concentration.taxonomy import Taxonomy, TaxonomyClass


def make_class(class_id: str, vertical: str, *parents: str) -> TaxonomyClass:
    return TaxonomyClass(class_id, class_id.title(), parents, vertical)


# Verticals are interleaved, children stand before parents, "robin" has two parents, "penguin" one in another vertical.
ANIMALS_AND_CARS = (
    make_class("robin", "birds", "songbird", "garden bird"),
    make_class("car", "cars"),
    make_class("songbird", "birds", "bird"),
    make_class("taxi", "cars", "car"),
    make_class("garden bird", "birds", "bird"),
    make_class("bird", "birds"),
    make_class("penguin", "birds", "swimmer", "bird"),
    make_class("swimmer", "athletics"),
    make_class("diver", "athletics", "swimmer"),
)


@st.composite
def taxonomies(draw: st.DrawFn) -> Taxonomy:
    """Random DAGs over two or three verticals: parents may be several, lie elsewhere, and follow their children."""
    verticals = draw(st.permutations([*"aabbcc", *draw(st.lists(st.sampled_from("abc"), max_size=8))]))
    size = len(verticals)
    parents = [draw(st.sets(st.integers(0, child - 1), max_size=3)) if child else set() for child in range(size)]
    classes = [
        make_class(f"c{child}", verticals[child], *(f"c{parent}" for parent in sorted(parents[child])))
        for child in range(size)
    ]
    return Taxonomy(draw(st.permutations(classes)))


def find_ancestors_slowly(taxonomy: Taxonomy, class_id: str) -> set[str]:
    by_id = {c.id: c for c in taxonomy.classes}
    found = set()
    for parent in by_id[class_id].parents:
        if by_id[parent].vertical == by_id[class_id].vertical:
            found |= {parent} | find_ancestors_slowly(taxonomy, parent)
    return found


def ids_of(taxonomy: Taxonomy, outputs: tuple[int, ...]) -> list[str]:
    return [taxonomy.class_of_output(output).id for output in outputs]


def test_outputs_are_ordered_by_the_first_appearance_of_their_vertical_and_then_as_in_the_file():
    taxonomy = Taxonomy(ANIMALS_AND_CARS)
    assert taxonomy.verticals == ("birds", "cars", "athletics")
    assert ids_of(taxonomy, range(9)) == [
        *("robin", "songbird", "garden bird", "bird", "penguin"),
        *("car", "taxi"),
        *("swimmer", "diver"),
    ]
    assert taxonomy.vertical_sizes == (5, 2, 2)
    assert taxonomy.vertical_starts == (0, 5, 7, 9)
    assert taxonomy.vertical_slice("cars") == slice(5, 7)
    assert taxonomy.vertical_of_output.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert (taxonomy.num_classes, taxonomy.num_verticals) == (9, 3)


@given(taxonomies())
@settings(max_examples=40, deadline=None, database=None)
def test_positions_and_outputs_are_two_orders_of_the_same_classes(taxonomy):
    for output in range(taxonomy.num_classes):
        c = taxonomy.class_of_output(output)
        assert taxonomy.output(c.id) == output
        assert taxonomy.classes[taxonomy.position_of_output[output]] is c
        assert taxonomy.verticals[taxonomy.vertical_of_output[output]] == c.vertical
        assert taxonomy.vertical_slice(c.vertical).start <= output < taxonomy.vertical_slice(c.vertical).stop
    np.testing.assert_array_equal(
        taxonomy.output_of_position[taxonomy.position_of_output], np.arange(taxonomy.num_classes)
    )
    for name in taxonomy.verticals:
        positions = taxonomy.position_of_output[taxonomy.vertical_slice(name)]
        assert (np.diff(positions) > 0).all()


@given(taxonomies(), st.lists(st.sampled_from("abcdd"), max_size=6))
@settings(max_examples=40, deadline=None, database=None)
def test_appended_classes_move_no_class_inside_its_vertical(taxonomy, verticals):
    appended = [make_class(f"new{number}", vertical) for number, vertical in enumerate([*verticals, "d", "d"])]
    longer = Taxonomy([*taxonomy.classes, *appended])
    assert longer.verticals == (*taxonomy.verticals, "d")
    for c in taxonomy.classes:
        before = taxonomy.output(c.id) - taxonomy.vertical_slice(c.vertical).start
        assert longer.output(c.id) - longer.vertical_slice(c.vertical).start == before


def test_smearing_follows_several_parents_and_stays_inside_the_vertical():
    taxonomy = Taxonomy(ANIMALS_AND_CARS)
    assert ids_of(taxonomy, taxonomy.smear([taxonomy.output("robin")])) == ["robin", "songbird", "garden bird", "bird"]
    assert ids_of(taxonomy, taxonomy.smear([taxonomy.output("penguin")])) == ["bird", "penguin"]
    several = [taxonomy.output(class_id) for class_id in ("diver", "taxi", "taxi")]
    assert ids_of(taxonomy, taxonomy.smear(several)) == ["car", "taxi", "swimmer", "diver"]
    assert taxonomy.smear([]) == ()


def test_a_parent_that_is_listed_twice_is_one_parent():
    taxonomy = Taxonomy([make_class("robin", "birds", "bird", "bird"), make_class("bird", "birds")])
    assert taxonomy.smear([0]) == (0, 1)
    assert taxonomy.lineage(0) == ("Bird", "Robin")


def test_an_ancestor_that_is_reached_through_another_vertical_only_is_left_out():
    taxonomy = Taxonomy(
        [make_class("a1", "a"), make_class("b1", "b", "a1"), make_class("a2", "a", "b1"), make_class("b2", "b")]
    )
    assert taxonomy.ancestors[taxonomy.output("a2")] == ()


@given(taxonomies(), st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_smearing_is_that_of_a_recursive_walk(taxonomy, data):
    outputs = data.draw(st.lists(st.integers(0, taxonomy.num_classes - 1), max_size=4))
    expected = set(ids_of(taxonomy, outputs)).union(
        *(find_ancestors_slowly(taxonomy, class_id) for class_id in ids_of(taxonomy, outputs))
    )
    smeared = taxonomy.smear(outputs)
    assert set(ids_of(taxonomy, smeared)) == expected
    assert list(smeared) == sorted(set(smeared))
    assert taxonomy.smear(smeared) == smeared


def test_a_chain_deeper_than_pythons_stack_is_smeared_whole():
    classes = [make_class("0", "v")] + [make_class(str(n), "v", str(n - 1)) for n in range(1, 3000)]
    assert len(Taxonomy(classes).smear([2999])) == 3000


def test_a_sample_is_routed_to_the_vertical_of_each_of_its_labels_once_and_in_order():
    taxonomy = Taxonomy(ANIMALS_AND_CARS)
    labels = [taxonomy.output(class_id) for class_id in ("diver", "robin", "bird", "swimmer")]
    assert taxonomy.route(labels) == ("birds", "athletics")
    assert taxonomy.route(labels[:1]) == ("athletics",)
    assert taxonomy.route([]) == ()


@pytest.mark.parametrize("wrong", [-1, 11])
def test_what_is_no_output_is_refused(taxonomy, wrong):
    """-1, with which others fill up rows of labels, would be the last class."""
    calls = (
        lambda: taxonomy.smear([0, wrong]),
        lambda: taxonomy.route([0, wrong]),
        lambda: taxonomy.class_of_output(wrong),
        lambda: taxonomy.lineage(wrong),
    )
    for call in calls:
        with pytest.raises(DataError, match=f"no output {wrong}; expected 0 to 10"):
            call()


def test_tensors_and_arrays_are_smeared_to_plain_numbers(taxonomy):
    expected = taxonomy.smear([3, 5])
    for outputs in (torch.tensor([3, 5, 3]), np.array([3, 5, 3])):
        assert taxonomy.smear(outputs) == expected
        assert {type(output) for output in taxonomy.smear(outputs)} == {int}


def test_a_leaf_is_a_class_that_is_nobodys_parent():
    taxonomy = Taxonomy(ANIMALS_AND_CARS)
    assert ids_of(taxonomy, np.flatnonzero(taxonomy.is_leaf)) == ["robin", "penguin", "taxi", "diver"]


def test_the_lineage_runs_from_the_furthest_ancestor_along_first_parents_inside_the_vertical():
    taxonomy = Taxonomy(ANIMALS_AND_CARS)
    assert taxonomy.lineage(taxonomy.output("robin")) == ("Bird", "Songbird", "Robin")
    assert taxonomy.lineage(taxonomy.output("penguin")) == ("Bird", "Penguin")
    assert taxonomy.lineage(taxonomy.output("car")) == ("Car",)


@given(taxonomies())
@settings(max_examples=40, deadline=None, database=None)
def test_a_restricted_taxonomy_is_its_slice_of_the_whole(taxonomy):
    for name in taxonomy.verticals:
        inside = taxonomy.vertical_slice(name)
        alone = taxonomy.restrict(name)
        assert alone.verticals == (name,)
        assert ids_of(alone, range(alone.num_classes)) == ids_of(taxonomy, range(inside.start, inside.stop))
        shifted = tuple(tuple(a - inside.start for a in ancestors) for ancestors in taxonomy.ancestors[inside])
        assert alone.ancestors == shifted
        assert [alone.lineage(output) for output in range(alone.num_classes)] == [
            taxonomy.lineage(output) for output in range(inside.start, inside.stop)
        ]


def test_an_unknown_vertical_or_class_is_an_error_that_says_where_and_what_is_valid():
    taxonomy = Taxonomy(ANIMALS_AND_CARS, "animals.json")
    for look_up in (taxonomy.vertical_slice, taxonomy.vertical_number, taxonomy.restrict):
        with pytest.raises(DataError, match=r"animals.json: no vertical 'fish'; valid: birds, cars, athletics"):
            look_up("fish")
    with pytest.raises(DataError, match=r"animals.json: no class 'trout'"):
        taxonomy.output("trout")
    with pytest.raises(DataError, match=r"animals.json \[cars\]: no class 'robin'"):
        taxonomy.restrict("cars").output("robin")


def test_the_fingerprint_is_of_what_outputs_mean():
    def fingerprint(classes):
        return Taxonomy(classes).fingerprint

    classes = list(ANIMALS_AND_CARS)
    robin = classes[0]
    renamed = TaxonomyClass(robin.id, "Redbreast", robin.parents, robin.vertical)
    assert fingerprint([renamed, *classes[1:]]) == fingerprint(classes)
    turned = TaxonomyClass(robin.id, robin.name, robin.parents[::-1], robin.vertical)
    assert fingerprint([turned, *classes[1:]]) == fingerprint(classes)

    fewer_parents = TaxonomyClass(robin.id, robin.name, robin.parents[:1], robin.vertical)
    other_id = TaxonomyClass("redbreast", robin.name, robin.parents, robin.vertical)
    other_vertical = TaxonomyClass(robin.id, robin.name, robin.parents, "cars")
    changed = [[other, *classes[1:]] for other in (fewer_parents, other_id, other_vertical)] + [classes[::-1]]
    assert len({fingerprint(classes), *map(fingerprint, changed)}) == 5


def test_json_round_trips(tmp_path):
    taxonomy = Taxonomy([make_class("größe", "maße"), make_class("länge", "maße", "größe")])
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps(taxonomy.to_json(), ensure_ascii=False), encoding="utf-8")
    loaded = Taxonomy.load(path)
    assert loaded.classes == taxonomy.classes
    assert loaded.fingerprint == taxonomy.fingerprint


def test_a_class_without_name_or_parents_is_a_root_named_by_its_id():
    taxonomy = Taxonomy.from_json({"classes": [{"id": "x", "vertical": "v"}, {"id": "y", "vertical": "v"}]})
    assert taxonomy.classes[0] == TaxonomyClass("x", "x", (), "v")


ROBIN = {"id": "robin", "name": "Robin", "parents": [], "vertical": "birds"}
WREN = {"id": "wren", "name": "Wren", "parents": [], "vertical": "birds"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([{**ROBIN, "parents": ["wren"]}, {**WREN, "parents": ["robin"]}], "cycle: 'robin' -> 'wren' -> 'robin'"),
        ([{**ROBIN, "parents": ["robin"]}, WREN], "cycle: 'robin' -> 'robin'"),
        (
            [
                {**ROBIN, "id": "chick", "parents": ["robin"]},
                {**ROBIN, "parents": ["wren"]},
                {**WREN, "parents": ["robin"]},
            ],
            "cycle: 'robin' -> 'wren' -> 'robin'",  # "chick" hangs below the cycle and is no part of it
        ),
        ([{**ROBIN, "parents": ["brid"]}, WREN], "class 'robin' has the parent 'brid', which is no class"),
        ([ROBIN, WREN, {**WREN, "name": "Other"}], r"classes\[1\] and classes\[2\] share the id 'wren'"),
        ([ROBIN, WREN, {**WREN, "id": "car", "vertical": "cars"}], "vertical 'cars' has 1 class, expected at least 2"),
        ([ROBIN, {"id": "", "vertical": "birds"}], r"classes\[1\]: 'id' is '', expected a text"),
        ([ROBIN, {"id": "wren"}], r"classes\[1\]: 'vertical' is None"),
        ([ROBIN, {**WREN, "name": 7}], r"classes\[1\]: 'name' is 7"),
        ([ROBIN, {**WREN, "parents": "robin"}], r"classes\[1\] \('wren'\): 'parents' is 'robin', expected a list"),
        ([ROBIN, {**WREN, "parents": [0]}], r"classes\[1\] \('wren'\): 'parents' is \[0\], expected a list"),
        ([ROBIN, "wren"], r"classes\[1\]: expected an object .*'wren'"),
        ([], "'classes' is empty"),
        ({}, r'expected \{"classes": \[...\]\}, found dict'),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it_and_the_entry(tmp_path: Path, classes: object, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"classes": classes}))
    with pytest.raises(DataError, match=rf"wrong\.json: .*{message}") as caught:
        Taxonomy.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"classes": [\n{"id": "robin"', r"not JSON \(.*line 2"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", r'expected \{"classes": \[...\]\}, found list'),
    ],
)
def test_a_file_that_is_no_taxonomy_is_an_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"wrong\.json: {message}"):
        Taxonomy.load(path)
    with pytest.raises(
        DataError, match=r"absent\.json: no such file; correct the path or bring it back; `concentrate prepare`"
    ):
        Taxonomy.load(tmp_path / "absent.json")


def test_a_hundred_thousand_classes_are_indexed_and_smeared_in_a_few_seconds():
    rng = random.Random(0)
    classes = [
        make_class(str(n), str(n % 20), *([str(rng.randrange(n % 20, n, 20))] if n >= 20 else []))
        for n in range(100_000)
    ]
    taxonomy = Taxonomy(classes)
    assert Counter(taxonomy.vertical_sizes) == {5000: 20}
    assert max(map(len, taxonomy.ancestors)) < 60


def test_siblings_share_their_ancestors():
    groups = [make_class(f"g{n}", "v", "root") for n in range(3)]
    leaves = [make_class(f"c{n}", "v", f"g{n % 3}") for n in range(300)]
    taxonomy = Taxonomy([make_class("root", "v"), *groups, *leaves, make_class("x", "w"), make_class("y", "w")])
    assert len({id(ancestors) for ancestors in taxonomy.ancestors}) == 1 + 1 + 3
    assert taxonomy.ancestors[taxonomy.output("c4")] == (taxonomy.output("root"), taxonomy.output("g1"))


def test_a_key_that_is_nearly_a_known_one_is_refused_and_a_users_own_key_is_not():
    classes = [{"id": "a", "vertical": "v", "note": "mine"}, {"id": "b", "vertical": "v", "parent": ["a"]}]
    with pytest.raises(DataError, match=r"classes\[1\].*'parent'; did you mean 'parents'"):
        Taxonomy.from_json({"classes": classes})
    del classes[1]["parent"]
    assert Taxonomy.from_json({"classes": classes}).num_classes == 2


@pytest.mark.parametrize("name", ["home/garden", ".hidden", "home\ngarden", "\0"])
def test_a_vertical_whose_name_cannot_be_a_folder_is_refused(name):
    with pytest.raises(DataError, match="cannot name a folder"):
        Taxonomy.from_json({"classes": [{"id": "a", "vertical": name}, {"id": "b", "vertical": name}]})


@pytest.mark.parametrize("letter", ["a", "é", "日"])
def test_the_length_of_a_verticals_name_is_in_bytes_as_file_systems_count_it(tmp_path, letter):
    def load(name: str) -> Taxonomy:
        return Taxonomy.from_json({"classes": [{"id": "a", "vertical": name}, {"id": "b", "vertical": name}]})

    most = MAX_NAME_BYTES // len(letter.encode())
    [name] = load(letter * most).verticals
    write_atomically(tmp_path / f"targets-{name}.json", "")  # the longest of the files that have it in their name
    with pytest.raises(DataError, match=r"vertical .* bytes, too many .* at most 200: shorten it"):
        load(letter * (most + 1))


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x7f", "\x85", "\u2028"])
def test_a_class_id_with_a_control_character_is_refused(character):
    classes = [{"id": f"a{character}b", "vertical": "v"}, {"id": "b", "vertical": "v"}]
    with pytest.raises(DataError, match="has a line break or another control character; leave it out") as caught:
        Taxonomy.from_json({"classes": classes}, "here")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("ids", "verticals", "expected"),
    [
        (["a", "b", "b "], "vvv", "the class ids 'b' and 'b ' differ in spaces or how accents are encoded alone"),
        (["v/a", "v/b", "v / a"], "vvv", "the class ids 'v/a' and 'v / a' differ in spaces"),
        (["a b", "c", "a\xa0 b"], "vvv", r"the class ids 'a b' and 'a\xa0 b' differ in spaces"),
        (
            "abcd",
            ["Birds", "Birds", "Birds ", "Birds "],
            "the verticals 'Birds' and 'Birds ' differ in capitals, spaces",
        ),
        ("abcd", ["Birds", "Birds", "birds", "birds"], "the verticals 'Birds' and 'birds' differ in capitals, spaces"),
    ],
)
def test_what_people_read_alike_is_not_two(ids, verticals, expected):
    classes = [{"id": class_id, "vertical": v} for class_id, v in zip(ids, verticals, strict=True)]
    with pytest.raises(DataError) as caught:
        Taxonomy.from_json({"classes": classes}, "here")
    assert f"here: {expected}" in str(caught.value)


def test_a_folder_in_place_of_a_file_is_said_to_be_one(tmp_path):
    with pytest.raises(DataError) as caught:
        Taxonomy.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory); give a file"


def test_classes_may_differ_in_capitals():
    classes = [{"id": class_id, "vertical": "v"} for class_id in ("Polish", "polish")]
    assert Taxonomy.from_json({"classes": classes}).num_classes == 2


def test_ids_or_verticals_that_differ_in_how_accents_are_encoded_alone_are_refused():
    """macOS writes an accent after its letter, and Linux keeps what it is given."""
    composed, decomposed = "caf\xe9", "cafe\u0301"
    for what, pairs in (
        ("class ids", [(composed, "v"), ("b", "v"), (decomposed, "v")]),
        ("verticals", [("a", composed), ("b", composed), ("c", decomposed), ("d", decomposed)]),
    ):
        with pytest.raises(DataError) as caught:
            Taxonomy.from_json({"classes": [{"id": class_id, "vertical": v} for class_id, v in pairs]}, "here")
        assert f"here: the {what} 'caf\\xe9' and 'cafe\\u0301' differ in" in str(caught.value)
    alone = Taxonomy.from_json(
        {"classes": [{"id": "a", "vertical": decomposed}, {"id": decomposed, "vertical": decomposed}]}
    )
    assert alone.verticals == (decomposed,)


def test_one_vertical_of_many_is_taken_out_without_a_look_at_the_others():
    class Seen(tuple):
        count = 0

        def __iter__(self):
            for c in super().__iter__():
                Seen.count += 1
                yield c

        def __getitem__(self, place):
            Seen.count += 1
            return super().__getitem__(place)

    taxonomy = Taxonomy([TaxonomyClass(f"{v}/{n}", "x", (), f"v{v}") for n in range(20) for v in range(50)])
    taxonomy.classes = Seen(taxonomy.classes)
    assert [c.id for c in taxonomy.restrict("v7").classes] == [f"7/{n}" for n in range(20)]
    assert Seen.count <= 40, "of 1,000"
