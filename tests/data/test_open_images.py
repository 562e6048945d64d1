"""Open Images in the layout of its files: labels with confidences, names with and without a header, the tree, the authors."""

import json
import pickle
from pathlib import Path

import pytest

from concentration.data.sources.open_images import OpenImagesConfig, OpenImagesSource
from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared

NAMES = {
    "/m/0jbk": "Animal",
    "/m/015p6": "Bird",
    "/m/09ddx": "Duck",
    "/m/04rky": "Mammal",
    "/m/01yrx": "Cat",
    "/m/02wbm": "Food",
    "/m/02xwb": "Fruit",
    "/m/0cyhj_": "Orange",
    "/m/0dj6p": "Peach",
    "/m/0242l": "Coin",
    "/m/03120": "Flag",
    "/m/0k0pj": "Human nose",
    "/m/04hgtk": "Human head",
    "/m/01g317": "Person",
    "/m/0fbvv": "Chime",
    "/m/0k4j": "Car",
}


def node(name: str, *kinds: dict, parts=()) -> dict:
    found = {"LabelName": {v: k for k, v in NAMES.items()}.get(name, name)}
    if kinds:
        found["Subcategory"] = list(kinds)
    if parts:
        found["Part"] = list(parts)
    return found


#: As in bbox_labels_600_hierarchy.json: the root is no class, leaves stand at the top, an orange is a fruit and an animal's food.
TREE = node(
    "/m/0bl9f",
    node("Coin"),
    node("Flag"),
    node("Animal", node("Bird", node("Duck")), node("Mammal", node("Cat"), node("Person"))),
    node("Food", node("Fruit", node("Orange"), node("Peach")), node("Duck")),
    node("Person", parts=(node("Human head", parts=(node("Human nose"),)),)),
)
HEADER = "ImageID,Source,LabelName,Confidence"


@pytest.fixture
def write(tmp_path, encode_image):
    """(images by folder, lines of labels by file, options of the files): writes it all, and returns the root."""

    def write_all(images: dict[str, str], labels: list[str], tree=TREE, names_header=None, tables=()) -> Path:
        root = tmp_path / "open_images"
        for folder, ids in images.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for image in ids.split():
                (root / folder / f"{image}.jpg").write_bytes(encode_image("jpg", seed=sum(image.encode())))
        mids = {v: k for k, v in NAMES.items()}
        lines = []
        for line in labels:
            image, source, name, confidence = line.split()
            lines.append(f"{image},{source},{mids.get(name, name)},{confidence}")
        files = {"train": lines[::2], "validation": lines[1::2]}
        for split, rows in files.items():
            text = "\n".join([HEADER, *rows, ""])
            (root / f"{split}-annotations-human-imagelabels-boxable.csv").write_text(text)
        rows = [f'{mid},"{name}"' for mid, name in NAMES.items() if name != "Chime"]
        (root / "class-descriptions-boxable.csv").write_text(
            "\n".join([*([names_header] if names_header else []), *rows])
        )
        (root / "bbox_labels_600_hierarchy.json").write_text(json.dumps(tree))
        for name, text in tables:
            (root / name).write_text(text)
        return root

    return write_all


def open_source(root: Path, **options) -> OpenImagesSource:
    return OpenImagesSource(parse_config(OpenImagesConfig, {"path": root, **options}))


def describe(source: OpenImagesSource) -> dict[str, tuple[list[str], str]]:
    """By name: the names of the parents, and the vertical."""
    return {NAMES.get(c.id, c.id): ([NAMES[p] for p in c.parents], c.vertical) for c in source.build_taxonomy().classes}


def list_all(source: OpenImagesSource) -> dict[str, tuple[set[str], str]]:
    return {item.key: ({NAMES.get(label, label) for label in item.labels}, item.split) for item in source.list_items()}


IMAGES = {"train": "a1 a2 a3 a4", "validation": "b1", "test": "c1"}
LABELS = [
    "a1 verification Duck 1",
    "a1 verification Bird 1",
    "a1 verification Cat 0",
    "a2 crowdsource-verification Orange 1",
    "a2 verification Coin 1",
    "a2 verification Flag 1",
    "b1 verification Duck 1",
    "c1 machine Peach 0.7",
    "c1 machine Cat 0.3",
    "a3 verification Cat 0",
    "zz verification Cat 1",
]


def test_sure_labels_of_images_that_are_there_are_taken_and_restored_ancestors_left_out(write):
    source = open_source(write(IMAGES, LABELS))
    assert list_all(source) == {
        "a1": ({"Duck"}, "train"),
        "a2": ({"Orange", "Coin", "Flag"}, "train"),
        "b1": ({"Duck"}, "val"),
        "c1": ({"Peach"}, "test"),
    }
    assert "2 of 6 images have no label that is taken, and are left out" in source.list_notes()
    assert "Cat" in list_all(open_source(write(IMAGES, LABELS), min_confidence=0.25))["c1"][0]
    taxonomy = source.build_taxonomy()
    smeared = taxonomy.smear([taxonomy.output("/m/09ddx")])
    assert {taxonomy.class_of_output(o).name for o in smeared} == {"Duck", "Bird", "Animal"}


@pytest.mark.parametrize("has_source", [True, False])
def test_what_people_said_no_to_is_no_label_whatever_a_machine_says(has_source, write):
    labels = ["a1 machine Duck 0.9", "a1 machine Cat 0.8", "a1 machine Peach 0.7", "a1 machine Orange 0.4"]
    root = write({"train": "a1 a2", "validation": "b1"}, LABELS)
    rows = {
        "train": ("a1 verification Cat 0", "a1 crowdsource-verification Orange 1", "a1 verification Duck 1"),
        "machine": labels,
    }
    rows["validation"] = ("b1 verification Duck 1", "b1 verification Duck 0", "b1 verification Cat 0")
    mids = {v: k for k, v in NAMES.items()}
    for name, lines in rows.items():
        cells = [(i, s, mids[c], value) for i, s, c, value in (line.split() for line in lines)]
        if not has_source:
            cells = [(i, c, value) for i, _, c, value in cells]
        header = HEADER if has_source else HEADER.replace("Source,", "")
        text = "\n".join([header, *map(",".join, cells), ""])
        (root / f"{name}-annotations-human-imagelabels-boxable.csv").write_text(text)
    for share in (0.5, 0):
        found = list_all(open_source(root, min_confidence=share))
        assert found == {"a1": ({"Duck", "Peach", "Orange"}, "train"), "b1": ({"Duck"}, "val")}, share


def test_verticals_are_the_subtrees_at_the_top_and_small_ones_are_merged(write):
    source = open_source(write(IMAGES, LABELS))
    assert describe(source) == {
        "Coin": ([], "other"),
        "Flag": ([], "other"),
        "Animal": ([], "Animal"),
        "Bird": (["Animal"], "Animal"),
        "Mammal": (["Animal"], "Animal"),
        "Duck": (["Food", "Bird"], "Animal"),
        "Cat": (["Mammal"], "Animal"),
        "Person": (["Mammal"], "Animal"),
        "Human head": ([], "Animal"),
        "Human nose": ([], "Animal"),
        "Food": ([], "Food"),
        "Fruit": (["Food"], "Food"),
        "Orange": (["Fruit"], "Food"),
        "Peach": (["Fruit"], "Food"),
    }
    assert "verticals of one class are merged into 'other': Coin, Flag" in source.list_notes()
    alone = open_source(write(IMAGES, [line for line in LABELS if "Flag" not in line]))
    assert "the class 'Coin' is alone in its vertical, and left out" in alone.list_notes()
    assert list_all(alone)["a2"] == ({"Orange"}, "train")


def test_verticals_may_be_chosen_by_name_or_mid_and_the_first_takes_what_is_below_several(write):
    root = write(IMAGES, [*LABELS, "a4 verification Cat 1"])
    found = describe(open_source(root, verticals=["Bird", "/m/0jbk", "Food"], outside="drop"))
    assert {name: vertical for name, (_, vertical) in found.items()} == {
        **dict.fromkeys(("Bird", "Duck"), "Bird"),
        **dict.fromkeys(("Animal", "Mammal", "Cat", "Person", "Human head", "Human nose"), "Animal"),
        **dict.fromkeys(("Food", "Fruit", "Orange", "Peach"), "Food"),
    }
    for wanted in (["Birds"], ["/m/none"]):
        with pytest.raises(ConfigError, match=r"data.verticals: '.*' is the name of 0 classes .* Coin, Flag, Animal"):
            open_source(root, verticals=wanted).build_taxonomy()


def test_two_classes_of_one_name_are_two_verticals(write):
    mid_of = {name: mid for mid, name in NAMES.items()}
    names = "\n".join(f"{mid},{'Things' if name in ('Bird', 'Fruit') else name}" for mid, name in NAMES.items())
    root = write(IMAGES, LABELS, tables=[("class-descriptions-boxable.csv", names)])
    source = open_source(root, verticals=[mid_of["Bird"], mid_of["Fruit"]], outside="drop")
    names = {kind: f"Things {mid_of[kind].strip('/').replace('/', '-')}" for kind in ("Bird", "Fruit")}
    assert {name: vertical for name, (_, vertical) in describe(source).items()} == {
        **dict.fromkeys(("Bird", "Duck"), names["Bird"]),
        **dict.fromkeys(("Fruit", "Orange", "Peach"), names["Fruit"]),
    }


def test_parts_belong_to_the_vertical_of_their_whole_and_are_not_its_children(write):
    labels = ["a1 verification Human_nose 1", "a1 verification Person 1"]
    labels = [line.replace("Human_nose", "/m/0k0pj") for line in labels]
    source = open_source(write({"train": "a1 a2"}, labels), verticals=["Person"], outside="drop")
    assert describe(source) == {"Person": ([], "Person"), "Human head": ([], "Person"), "Human nose": ([], "Person")}
    assert list_all(source) == {"a1": ({"Human nose", "Person"}, "train")}


def test_classes_outside_the_verticals_are_one_of_their_own_or_dropped(write):
    labels = [*LABELS, "a4 verification Chime 1", "a1 verification Car 1"]
    root = write(IMAGES, labels)
    source = open_source(root, verticals=["Animal", "Food"])
    found = describe(source)
    assert {name for name, (_, vertical) in found.items() if vertical == "other"} == {"Coin", "Flag", "Chime", "Car"}
    assert list_all(source)["a4"] == ({"Chime"}, "train")
    assert "/m/0fbvv" in {c.name for c in source.build_taxonomy().classes}, (
        "a class without a name is called by its MID"
    )
    assert "4 classes below no vertical are the vertical 'other'" in source.list_notes()
    source = open_source(root, verticals=["Animal", "Food"], outside="drop")
    assert set(describe(source)) == set(found) - {"Coin", "Flag", "Chime", "Car"}
    assert "a4" not in list_all(source)
    assert "4 classes below no vertical are left out" in source.list_notes()


@pytest.mark.parametrize("header", [None, "LabelName,DisplayName", "id,name"])
def test_names_come_with_and_without_a_header(header, write):
    classes = open_source(write(IMAGES, LABELS, names_header=header)).build_taxonomy().classes
    assert {c.id: c.name for c in classes} == {c.id: NAMES[c.id] for c in classes}


def test_an_author_is_a_group(write):
    header = (
        "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    )
    header += "Thumbnail300KURL,Rotation"
    rows = [
        f"{i},train,u,u,l,https://x/{who},{who},t,1,m,," for i, who in (("a1", "ann"), ("a2", "ann"), ("zz", "bob"))
    ]
    rows.append("b1,validation,u,u,l,,,t,1,m,,")
    table = ("image_ids_and_rotation.csv", "\n".join([header, *rows]))
    root = write(IMAGES, LABELS, tables=[table])
    groups = {item.key: item.group for item in open_source(root, split={"group": "AuthorProfileURL"}).list_items()}
    assert groups == {"a1": "https://x/ann", "a2": "https://x/ann", "b1": None, "c1": None}
    with pytest.raises(DataError, match=r"no column 'Autor' \(data\.split\.group\); did you mean 'Author'\?"):
        open_source(root, split={"group": "Autor"}).list_items()


def test_the_files_may_lie_elsewhere_and_have_the_names_of_v7(write, tmp_path):
    root = write(IMAGES, LABELS)
    elsewhere = tmp_path / "csv"
    elsewhere.mkdir()
    for name, later in (
        ("train-annotations-human-imagelabels-boxable.csv", "oidv7-train-annotations-human-imagelabels.csv"),
        ("validation-annotations-human-imagelabels-boxable.csv", "oidv7-val-annotations-human-imagelabels.csv"),
        ("class-descriptions-boxable.csv", "oidv7-class-descriptions.csv"),
        ("bbox_labels_600_hierarchy.json", "bbox_labels_600_hierarchy.json"),
    ):
        (root / name).rename(elsewhere / later)
    options = {"labels": ["oidv7-*-imagelabels.csv"], "descriptions": "oidv7-class-descriptions.csv"}
    assert len(list_all(open_source(root, annotations=elsewhere, **options))) == 4
    source = open_source(root, annotations=elsewhere)
    with pytest.raises(
        DataError, match=r"csv: no file matches data\.labels=\*-annotations-human-imagelabels-boxable\.csv"
    ):
        source.list_items()


def test_workers_get_no_listing(write):
    source = open_source(write({"train": " ".join(f"i{n}" for n in range(200))}, [*LABELS, "i1 verification Cat 1"]))
    source.list_items()
    assert len(pickle.dumps(source)) < 2000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: (root / "test" / "a1.jpg").write_bytes(b""), "test/a1.jpg: lies in train, too"),
        (lambda root: (root / "class-descriptions-boxable.csv").unlink(), "0 files match data.descriptions="),
        (lambda root: (root / "v5-class-descriptions-boxable.csv").touch(), "2 files match data.descriptions="),
        (lambda root: (root / "bbox_labels_600_hierarchy.json").write_text("{"), "not JSON"),
        (
            lambda root: (root / "bbox_labels_600_hierarchy.json").write_text(
                '{"LabelName": "r", "Subcategory": [' * 50_000
            ),
            "not JSON",
        ),
        (lambda root: (root / "bbox_labels_600_hierarchy.json").write_text("[]"), "a node is [], expected LabelName"),
        (
            lambda root: (root / "bbox_labels_600_hierarchy.json").write_text('{"LabelName": "r", "Subcategory": 3}'),
            "expected LabelName, and lists Subcategory and Part",
        ),
        (
            lambda root: (root / "train-annotations-human-imagelabels-boxable.csv").write_text("ImageID,LabelName\n"),
            "no column 'Confidence' (data.labels)",
        ),
        (
            lambda root: (root / "train-annotations-human-imagelabels-boxable.csv").write_text(
                f"{HEADER}\na1,x,/m/0k4j,yes"
            ),
            "line 2: Confidence is 'yes', expected a number",
        ),
        (
            lambda root: (root / "train-annotations-human-imagelabels-boxable.csv").write_text(
                f"{HEADER}\na1,x,/m/0k4j"
            ),
            "line 2: 3 columns, expected 4",
        ),
    ],
)
def test_files_that_are_not_as_they_should_be_are_refused(change, expected, write):
    root = write(IMAGES, LABELS)
    change(root)
    with pytest.raises(DataError) as caught:
        open_source(root).list_items()
    assert expected in str(caught.value)
    assert str(root) in str(caught.value)


def test_folders_without_images_or_labels_are_refused(write, tmp_path):
    with pytest.raises(DataError, match="no images; expected train, validation, test with"):
        open_source(tmp_path).list_items()
    with pytest.raises(DataError, match=r"no image has a label of Confidence >= 0\.5 below a vertical"):
        open_source(write({"train": "a3"}, LABELS)).build_taxonomy()


def test_a_folder_whose_labels_are_not_there_is_named(write):
    """As where they were not fetched, or lie there as .csv.gz: its split would be empty."""
    root = write(IMAGES, [line for line in LABELS if not line.startswith("c1")])
    (root / "test-annotations-human-imagelabels-boxable.csv.gz").write_bytes(b"packed")
    with pytest.raises(
        DataError, match=r"open_images/test: none of its images is in train-annotations-.*unpack the labels of test"
    ):
        open_source(root).list_items()


def test_images_in_folders_below_are_named(write):
    root = write(IMAGES, LABELS)
    (root / "train/0").mkdir()
    for path in (root / "train").glob("*.jpg"):
        path.rename(root / "train/0" / path.name)
    with pytest.raises(
        DataError, match=r"open_images/train: no image; expected IMAGEID\.jpg right in it, found 0; unpack or move"
    ):
        open_source(root).list_items()


def test_open_images_become_shards(write, tmp_path):
    names = ("Duck", "Cat", "Orange", "Peach")
    images = {"train": " ".join(f"a{n}" for n in range(40)), "validation": "b0 b1 b2 b3"}
    labels = [f"{i} verification {names[n % 4]} 1" for ids in images.values() for n, i in enumerate(ids.split())]
    data = {"kind": "open_images", "path": write(images, labels), "split": {"test_per_class": 2}}
    prepare(parse_config(PrepareConfig, {"workdir": tmp_path / "work", "num_processes": 1, "data": data}))
    _, taxonomy, _ = load_prepared(tmp_path / "work", DataOverrides())
    assert taxonomy.verticals == ("Animal", "Food")
    counts = {}
    for name in ("train", "val", "test"):
        split = load_split(tmp_path / "work" / "shards", name, taxonomy)
        counts[name] = {NAMES[taxonomy.class_of_output(o).id]: n for o, n in enumerate(split.count_labels()) if n}
    assert counts == {"train": dict.fromkeys(names, 8), "val": dict.fromkeys(names, 1), "test": dict.fromkeys(names, 2)}


def test_a_vertical_may_come_of_which_earlier_classes_are_a_kind_too(write, tmp_path):
    """As lobsters, which are animals, and seafood: with the first image of food nothing could be appended any more."""
    ids = {"train": "t0 t1 t2 t3 t4 t5", "validation": "v0 v1", "test": "w0 w1"}
    labels = [
        f"{i} verification {'Duck' if i[1] == '0' else 'Cat'} 1" for folder in ids.values() for i in folder.split()
    ]
    data = {"kind": "open_images", "path": write(ids, labels), "image_size": 16}
    options = {"workdir": tmp_path / "work", "num_processes": 1, "data": data}
    prepare(parse_config(PrepareConfig, options))
    _, earlier, _ = load_prepared(tmp_path / "work", DataOverrides())
    more = ["f0 verification Orange 1", "f1 verification Peach 1", "f2 verification Peach 1"]
    for count in (2, 3):
        write({"train": " ".join(row.split()[0] for row in more[:count])}, [*labels, *more[:count]])
        prepare(parse_config(PrepareConfig, {**options, "append": True}))
    _, taxonomy, _ = load_prepared(tmp_path / "work", DataOverrides())
    assert taxonomy.classes[: earlier.num_classes] == earlier.classes
    assert taxonomy.verticals == ("Animal", "Food")
    assert len(load_split(tmp_path / "work" / "shards", "train", taxonomy).routed("Food")) == 3
