"""iNaturalist in the layout of its files: COCO's JSON, ranks, names that occur twice, observers, years with fewer fields."""

import json
import pickle
import time
from pathlib import Path

import pytest

from concentration.data.sources.image_files import merge_small_verticals
from concentration.data.sources.inaturalist import INaturalistConfig, INaturalistSource
from concentration.data.split import load_split
from concentration.errors import ConfigError, DataError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared
from concentration.taxonomy import TaxonomyClass

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
#: (name, common name, supercategory, ranks): Ficus is a genus of figs and one of snails.
SPECIES = (
    ("Ficus carica", "Fig", "Plants", ("Plantae", "Tracheophyta", "Magnoliopsida", "Rosales", "Moraceae", "Ficus")),
    ("Ficus ficus", "", "Mollusks", ("Animalia", "Mollusca", "Gastropoda", "Littorinimorpha", "Ficidae", "Ficus")),
    ("Rosa canina", "Dog Rose", "Plants", ("Plantae", "Tracheophyta", "Magnoliopsida", "Rosales", "Rosaceae", "Rosa")),
    ("Rosa rugosa", "", "Plants", ("Plantae", "Tracheophyta", "Magnoliopsida", "Rosales", "Rosaceae", "Rosa")),
    ("Helix pomatia", "", "Mollusks", ("Animalia", "Mollusca", "Gastropoda", "Stylommatophora", "Helicidae", "Helix")),
)


def list_categories(with_ranks=True) -> list[dict]:
    categories = []
    for number, (name, common, supercategory, ranks) in enumerate(SPECIES):
        category = {"id": number, "name": name, "supercategory": supercategory}
        if with_ranks:
            category |= {"common_name": common, **dict(zip(RANKS, ranks, strict=True))}
            category |= {"specific_epithet": name.split()[1], "image_dir_name": f"{number:05d}_{'_'.join(ranks)}"}
        categories.append(category)
    return categories


@pytest.fixture
def write(tmp_path, encode_image):
    """(split, number of images, first id, options): writes one file of annotations and its images, and returns the root."""

    def write_split(
        split: str, count: int, start: int, with_ranks=True, name=None, change=lambda content: None
    ) -> Path:
        images, annotations = [], []
        for number in range(start, start + count):
            category = number % len(SPECIES)
            file_name = f"{split}/{category:05d}/{number:04x}-uuid.jpg"
            path = tmp_path / "inat" / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image("jpg", seed=number))
            image = {"id": number, "width": 500, "height": 375, "file_name": file_name, "license": 0}
            image |= {"rights_holder": f"observer {number // 7}", "date": "2015-07-05 00:00:00+00:00"}
            image |= {"latitude": float("nan"), "longitude": 1.5, "location_uncertainty": None}
            images.append(image)
            annotations.append({"id": number, "image_id": number, "category_id": category})
        content = {"info": {"year": 2021}, "licenses": [{"id": 0, "name": "CC", "url": "u"}], "images": images}
        content |= {"annotations": annotations, "categories": list_categories(with_ranks)}
        change(content)
        (tmp_path / "inat" / (name or f"{split}.json")).write_text(json.dumps(content))
        return tmp_path / "inat"

    return write_split


def open_source(root: Path, **options) -> INaturalistSource:
    return INaturalistSource(parse_config(INaturalistConfig, {"path": root, **options}))


def describe(source: INaturalistSource) -> dict[str, tuple[tuple[str, ...], str]]:
    return {c.id: (c.parents, c.vertical) for c in source.build_taxonomy().classes}


def test_species_are_leaves_below_their_ranks_and_names_that_occur_twice_are_told_apart(write):
    source = open_source(write("train", 10, 0))
    assert describe(source) == {
        "order:Rosales": ((), "Plants"),
        "family:Moraceae": (("order:Rosales",), "Plants"),
        "genus:Ficus": (("family:Moraceae",), "Plants"),
        "Ficus carica": (("genus:Ficus",), "Plants"),
        "order:Littorinimorpha": ((), "Mollusks"),
        "family:Ficidae": (("order:Littorinimorpha",), "Mollusks"),
        "genus:Ficus (Mollusks, order:Littorinimorpha, family:Ficidae)": (("family:Ficidae",), "Mollusks"),
        "Ficus ficus": (("genus:Ficus (Mollusks, order:Littorinimorpha, family:Ficidae)",), "Mollusks"),
        "family:Rosaceae": (("order:Rosales",), "Plants"),
        "genus:Rosa": (("family:Rosaceae",), "Plants"),
        "Rosa canina": (("genus:Rosa",), "Plants"),
        "Rosa rugosa": (("genus:Rosa",), "Plants"),
        "order:Stylommatophora": ((), "Mollusks"),
        "family:Helicidae": (("order:Stylommatophora",), "Mollusks"),
        "genus:Helix": (("family:Helicidae",), "Mollusks"),
        "Helix pomatia": (("genus:Helix",), "Mollusks"),
    }
    names = {c.id: c.name for c in source.build_taxonomy().classes}
    assert names["Rosa canina"] == "Rosa canina (Dog Rose)"
    assert names["Rosa rugosa"] == "Rosa rugosa"
    assert names["genus:Ficus"] == "Ficus"


@pytest.mark.parametrize(
    ("rank", "ranks", "verticals", "num_inner"),
    [
        ("supercategory", None, {"Plants", "Mollusks"}, 3 + 4 + 4),
        ("supercategory", ["genus"], {"Plants", "Mollusks"}, 4),
        ("supercategory", ["family", "class"], {"Plants", "Mollusks"}, 2 + 4),
        ("supercategory", [], {"Plants", "Mollusks"}, 0),
        ("kingdom", None, {"Plantae", "Animalia"}, 2 + 2 + 3 + 4 + 4),
        ("family", None, {"Moraceae", "Ficidae", "Rosaceae", "Helicidae"}, 4),
        ("family", [], {"other", "Rosaceae"}, 0),
    ],
)
def test_any_rank_may_part_the_verticals_and_those_below_it_be_inner_classes(rank, ranks, verticals, num_inner, write):
    source = open_source(write("train", 10, 0), vertical_rank=rank, ranks=ranks)
    taxonomy = source.build_taxonomy()
    assert set(taxonomy.verticals) == verticals
    assert taxonomy.num_classes == len(SPECIES) + num_inner
    merged = ["verticals of one class are merged into 'other': Moraceae, Ficidae, Helicidae"]
    assert source.list_notes() == (merged if "other" in verticals else [])


def test_a_class_that_is_alone_is_left_out_with_its_images(write):
    """As the only bacterium of 2018, where no rank is an inner class."""
    source = open_source(write("train", 10, 0), vertical_rank="genus")
    assert set(source.build_taxonomy().verticals) == {"Ficus", "Rosa"}
    assert {item.labels[0] for item in source.list_items()} == {name for name, *_ in SPECIES[:4]}
    assert source.list_notes() == [
        "the class 'Helix pomatia' is alone in its vertical, and left out",
        "2 images have no other label than that class, and are left out",
    ]


def test_an_image_keeps_its_labels_beside_a_class_that_is_left_out(write):
    def change(content):
        content["annotations"].append({"id": 99, "image_id": 2, "category_id": 4})

    source = open_source(write("train", 6, 0, change=change), vertical_rank="genus")
    labels = {item.locator[-11:-9]: item.labels for item in source.list_items()}
    assert labels == {
        "00": ("Ficus carica",),
        "01": ("Ficus ficus",),
        "02": ("Rosa canina",),
        "03": ("Rosa rugosa",),
        "05": ("Ficus carica",),
    }


def test_many_small_verticals_are_one_short_note_and_little_work():
    classes = [TaxonomyClass(str(n), str(n), (), f"genus {n}") for n in range(30_000)]
    started = time.monotonic()
    merged, [note] = merge_small_verticals(classes)
    seconds = time.monotonic() - started
    assert seconds < 4, "it is a tenth of a second, and was 8 where each looked through a list of all"
    assert {c.vertical for c in merged} == {"other"}
    assert (
        note
        == f"verticals of one class are merged into 'other': {', '.join(f'genus {n}' for n in range(10))} and 29990 more"
    )


def test_official_splits_are_kept_and_observers_are_groups(write):
    write("train", 20, 0)
    root = write("val", 5, 100)
    items = open_source(root, split={"group": "rights_holder"}).list_items()
    assert [item.split for item in items] == ["train"] * 20 + ["val"] * 5
    assert [item.group for item in items] == [f"observer {n // 7}" for n in [*range(20), *range(100, 105)]]
    assert [item.labels for item in items[:5]] == [(name,) for name, *_ in SPECIES]
    assert len({item.key for item in items}) == 25
    assert {item.group for item in open_source(root).list_items()} == {None}
    assert {item.split for item in open_source(root, val="none.json").list_items()} == {"train"}


def test_the_files_of_2017_have_supercategories_alone(write, tmp_path):
    root = write("train_val2017", 10, 0, with_ranks=False, name="train2017.json")
    assert describe(open_source(root)) == {name: ((), supercategory) for name, _, supercategory, _ in SPECIES}
    with pytest.raises(ConfigError, match=r"data\.ranks: no category has a 'genus'; there are: none"):
        open_source(root, ranks=["genus"]).build_taxonomy()
    with pytest.raises(DataError, match="category 0: 'kingdom' is None"):
        open_source(root, vertical_rank="kingdom").build_taxonomy()


def test_a_rank_above_the_verticals_is_refused(write):
    with pytest.raises(ConfigError, match="ranks: 'order' is not below vertical_rank=family"):
        open_source(write("train", 5, 0), vertical_rank="family", ranks=["order", "genus"])


def test_names_that_occur_twice_among_species_carry_their_numbers(write):
    def double(content):
        content["categories"][3]["name"] = "Rosa canina"

    ids = describe(open_source(write("train", 5, 0, change=double)))
    assert {"Rosa canina", "Rosa canina #3"} <= set(ids)


def test_a_species_that_is_called_as_an_inner_class_is_refused(write):
    """It would take the place of the genus, and its parents be its children."""
    root = write("train", 20, 0, change=lambda content: content["categories"][2].update(name="genus:Rosa"))
    with pytest.raises(DataError, match=r"category 2 \('genus:Rosa'\) is called as another class"):
        open_source(root).build_taxonomy()


def test_images_without_an_annotation_are_left_out_and_those_with_several_have_all_labels(write):
    def change(content):
        del content["annotations"][0]
        content["annotations"].append({"id": 99, "image_id": 2, "category_id": 4})

    source = open_source(write("train", 6, 0, change=change))
    assert [item.labels for item in source.list_items()][:2] == [("Ficus ficus",), ("Rosa canina", "Helix pomatia")]
    assert source.list_notes() == ["1 images have no annotation, and are left out"]


def test_what_pandas_writes_for_nothing_is_nothing(write):
    def change(content):
        content["categories"][0] |= {"genus": float("nan"), "common_name": float("nan")}
        for image in content["images"][:2]:
            image["rights_holder"] = float("nan")

    source = open_source(write("train", 10, 0, change=change), split={"group": "rights_holder"})
    assert describe(source)["Ficus carica"] == (("family:Moraceae",), "Plants")
    assert source.build_taxonomy().classes[source.build_taxonomy().position["Ficus carica"]].name == "Ficus carica"
    assert [item.group for item in source.list_items()][:3] == [None, None, "observer 0"]


def test_the_number_0_is_a_group(write):
    def change(content):
        for image in content["images"]:
            image["rights_holder"] = image["id"] // 5

    source = open_source(write("train", 10, 0, change=change), split={"group": "rights_holder"})
    assert [item.group for item in source.list_items()] == ["0"] * 5 + ["1"] * 5


def test_a_file_that_begins_with_a_mark_is_read(write):
    root = write("train", 5, 0)
    (root / "train.json").write_bytes(b"\xef\xbb\xbf" + (root / "train.json").read_bytes())
    assert len(open_source(root).list_items()) == 5


def test_one_file_under_two_spellings_is_refused(write, tmp_path):
    def change(content):
        content["images"][1]["file_name"] = f"./{content['images'][0]['file_name']}"

    data = {"kind": "inaturalist", "path": write("train", 5, 0, change=change)}
    with pytest.raises(DataError, match=r"two samples have the key .*; list each image once"):
        prepare(parse_config(PrepareConfig, {"workdir": tmp_path / "work", "num_processes": 1, "data": data}))


def test_workers_get_no_listing(write):
    source = open_source(write("train", 300, 0))
    source.list_items()
    assert len(pickle.dumps(source)) < 2000


def remove(name):
    return lambda content: content.pop(name)


def put(list_name, place, **values):
    return lambda content: content[list_name][place].update(values)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove("annotations"), "no list of objects 'annotations'; expected COCO's form"),
        (lambda content: content.update(images=[1]), "no list of objects 'images'"),
        (put("annotations", 1, category_id=77), "annotations[1] has the category 77, which is none"),
        (put("annotations", 1, image_id=77), "an annotation has the image_id 77, which is no image"),
        (put("annotations", 1, image_id=[1]), "annotations[1]: 'image_id' is [1], expected a number"),
        (put("images", 2, file_name=None), "images[2]: 'file_name' is None"),
        (put("images", 2, file_name="a.tif"), "images[2] is 'a.tif', expected .jpg"),
        (put("images", 2, id=0), "images[2] has the id 0, as one before it; give each image its own"),
        (put("images", 2, file_name="\ud83d.jpg"), "surrogates not allowed"),
        (put("categories", 2, name=""), "categories[2]: 'name' is ''"),
        (put("categories", 2, genus=5), "category 2: 'genus' is 5"),
        (put("categories", 2, common_name="half \ud83d"), "surrogates not allowed"),
        (
            lambda content: content["categories"].append(content["categories"][0] | {"name": "Rosa"}),
            "category 0 ('Rosa') has another name",
        ),
        (put("categories", 2, supercategory=None), "category 2: 'supercategory' is None"),
    ],
)
def test_files_of_another_form_are_refused(change, expected, write):
    root = write("train", 5, 0, change=change)
    with pytest.raises(DataError) as caught:
        open_source(root).build_taxonomy()
    assert expected in str(caught.value)


def test_files_that_are_missing_several_or_of_two_years_are_refused(write, tmp_path):
    with pytest.raises(DataError, match=r"0 files match data\.train=train\*\.json, expected one"):
        open_source(tmp_path).list_items()
    root = write("train", 5, 0)
    (root / "train_mini.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"2 files match .* \(train\.json, train_mini\.json\), expected one; give data\.train=NAME"
    ):
        open_source(root).list_items()
    assert len(open_source(root, train="train.json").list_items()) == 5
    write("val", 5, 10, change=put("categories", 2, name="Rosa rosa"))
    with pytest.raises(DataError, match=r"val\.json: categories\[2\]: category 2 \('Rosa rosa'\) has another name"):
        open_source(root, train="train.json").list_items()
    (root / "train.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"train\.json: cannot be read as JSON"):
        open_source(root, train="train.json").list_items()
    (root / "train.json").write_text("{")
    with pytest.raises(DataError, match=r"train\.json: cannot be read as JSON"):
        open_source(root, train="train.json").list_items()
    root = write("train", 5, 0)
    with pytest.raises(ConfigError, match=r"data\.split\.group=user_id: no such field in the images of .*train\.json"):
        open_source(root, train="train.json", split={"group": "user_id"}).list_items()


def test_inaturalist_becomes_shards(write, tmp_path):
    write("train", 70, 0)
    data = {
        "kind": "inaturalist",
        "path": write("val", 10, 100),
        "split": {"group": "rights_holder", "test_per_class": 2},
    }
    prepare(parse_config(PrepareConfig, {"workdir": tmp_path / "work", "num_processes": 1, "data": data}))
    _, taxonomy, _ = load_prepared(tmp_path / "work", DataOverrides())
    assert taxonomy.verticals == ("Plants", "Mollusks")
    counts = {}
    for name in ("train", "val", "test"):
        split = load_split(tmp_path / "work" / "shards", name, taxonomy)
        counts[name] = sum(split.count_labels())
        assert set(taxonomy.route(split.labels(0))) <= {"Plants", "Mollusks"}
    assert counts == {"train": 56, "val": 10, "test": 14}, "two observers of seven images each"
