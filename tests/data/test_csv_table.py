"""Tables of images: their columns, labels, splits and groups, and every way in which a row can be wrong."""

import json
import pickle
from pathlib import Path

import pytest

from concentration.data.sources.csv_table import CsvConfig, CsvSource
from concentration.data.split import load_split
from concentration.errors import DataError
from concentration.schema import parse_config
from concentration.stages.prepare import PrepareConfig, prepare
from concentration.stages.prepared import DataOverrides, load_prepared


@pytest.fixture
def write(tmp_path):
    def write_table(*lines: str, name="images.csv", encoding="utf-8") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
        return path

    return write_table


def open_table(path: Path, **options) -> CsvSource:
    return CsvSource(parse_config(CsvConfig, {"path": path, **options}))


def list_rows(path: Path, **options) -> list[tuple]:
    return [(item.locator, item.labels, item.split, item.group) for item in open_table(path, **options).list_items()]


def refuse(path: Path, *expected: str, **options) -> None:
    source = open_table(path, **options)
    with pytest.raises(DataError) as caught:
        source.list_items() and source.build_taxonomy()
    for text in (str(path), *expected):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_is_an_image_with_its_labels_split_and_group(write):
    path = write(
        "id,path,labels,split,product",
        "1,a/1.jpg,birds/gull|birds/kite,train,p1",
        '2,"a, b/2.png", birds/gull ,validation,p2',
        "",
        "3,/abs/3.webp,cars/taxi|cars/taxi|cars/tram,,",
        "4,é/4.JPEG,cars/tram,test,p1",
    )
    assert list_rows(path, split={"group": "product"}) == [
        ("a/1.jpg", ("birds/gull", "birds/kite"), "train", "p1"),
        ("a, b/2.png", ("birds/gull",), "val", "p2"),
        ("/abs/3.webp", ("cars/taxi", "cars/tram"), "train", None),
        ("é/4.JPEG", ("cars/tram",), "test", "p1"),
    ]
    assert {group for *_, group in list_rows(path)} == {None}
    classes = open_table(path).build_taxonomy().classes
    assert [(c.id, c.vertical) for c in classes] == [
        ("birds/gull", "birds"),
        ("birds/kite", "birds"),
        ("cars/taxi", "cars"),
        ("cars/tram", "cars"),
    ]


def test_a_class_may_be_the_only_one_of_a_vertical_that_has_others_elsewhere(write):
    source = open_table(write("path,labels", "1.jpg,birds/gull", "2.jpg,cars/taxi", "3.jpg,cars/tram"))
    assert [c.id for c in source.list_classes()] == ["birds/gull", "cars/taxi", "cars/tram"]
    with pytest.raises(DataError, match="birds"):
        source.build_taxonomy()


def test_columns_separators_and_formats_are_those_of_the_config(write):
    lines = ("file\ttags\tfold", "1.jpg\tred;blue\ttrain", "2.jpg\tblue\ttest")
    options = {"path_column": "file", "labels_column": "tags", "label_separator": ";"}
    expected = [("1.jpg", ("red", "blue"), "train", None), ("2.jpg", ("blue",), "test", None)]
    path = write(*lines, name="images.tsv", encoding="utf-8-sig")
    assert list_rows(path, split_column="fold", **options) == expected
    assert [split for _, _, split, _ in list_rows(path, **options)] == ["train", "train"], (
        "it is called fold, not split"
    )
    assert [c.vertical for c in open_table(path, **options).build_taxonomy().classes] == ["all", "all"]


def test_keys_come_from_paths_alone(write):
    first = open_table(write("path,labels", "a/1.jpg,x", "a/2.jpg,y")).list_items()
    later = open_table(write("labels,path", "z,a/0.jpg", "x,a/1.jpg", "z,a/2.jpg")).list_items()
    assert [item.key for item in later][1:] == [item.key for item in first]
    assert len({item.key for item in later}) == 3


def test_a_key_does_not_depend_on_how_the_path_is_written(write, tmp_path):
    """A second table made by `find .`, or with whole paths, appended every image again, some to other splits."""
    keys = {
        path: open_table(write("path,labels", f"{path},x")).list_items()[0].key
        for path in ("a/1.jpg", "./a/1.jpg", "a/b/..//1.jpg", f"{tmp_path}/a/1.jpg", "../a/1.jpg", "/elsewhere/a/1.jpg")
    }
    assert len({keys[path] for path in list(keys)[:4]}) == 1
    assert len(set(keys.values())) == 3
    assert keys["a/1.jpg"].startswith("a-1-")


def test_a_column_that_may_be_the_split_is_told_or_refused(write):
    path = write("path,labels,Split", "1.jpg,a,train", "2.jpg,b,test")
    refuse(path, "the column 'Split' is not called 'split', and would not be read; give data.split_column=Split")
    source = open_table(path, split_column="Split")
    assert ([item.split for item in source.list_items()], source.list_notes()) == (["train", "test"], [])
    path = write(f"path,labels,fold,{','.join(f'c{n}' for n in range(11))}", "1.jpg,a,train" + "," * 11)
    [note] = open_table(path).list_notes()
    assert note.startswith(f"{path}: columns that are not read: fold, c0, c1, ")
    assert note.endswith("c8 and 2 more")


def test_a_split_has_the_names_of_its_folder_in_capitals_or_not(write):
    rows = ("1.jpg,a,Train", "2.jpg,b,training", "3.jpg,a,DEV", "4.jpg,b,testing", "5.jpg,b,")
    splits = [split for _, _, split, _ in list_rows(write("path,labels,split", *rows), split={})]
    assert sorted(splits) == ["test", "train", "train", "train", "val"]


def test_workers_get_no_listing(write):
    source = open_table(write("path,labels", *(f"{n}.jpg,{n % 2}" for n in range(1000))))
    source.list_items()
    assert len(pickle.dumps(source)) < 1500


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("path,labels", "1.jpg,a", "2.jpg"), "line 3: 1 columns, but 2 in the header"),
        (("path,labels", "1.jpg,a,b"), "line 2: 3 columns, but 2 in the header"),
        (("path,labels", "1.jpg,"), "line 2: a label is ''; expected LABEL or LABEL|LABEL"),
        (("path,labels", "1.jpg,a||b"), "line 2: a label is ''"),
        (("path,labels", "1.jpg,a/"), "line 2: a label is 'a/'"),
        (
            ("path,labels", """1.jpg,"['a', 'b']\""""),
            "line 2: the labels are ['a', 'b'], a list; expected LABEL or LABEL|LABEL",
        ),
        (("path,labels", '1.jpg,"[""a""]"'), 'line 2: the labels are ["a"], a list'),
        (("path,labels", ",a"), "line 2: the path is '', expected one that ends with .jpg"),
        (("path,labels", "1.gif,a"), "line 2: the path is '1.gif'"),
        (
            ("path,labels", "https://host/1.jpg,a"),
            "line 2: the path is 'https://host/1.jpg', an address; fetch the images",
        ),
        (("path,labels", "1.jpg,a", "", "1.jpg,b"), "line 4: '1.jpg' is on line 2 already"),
        (
            ("path,labels", "im/1.jpg,a", "./im/1.jpg,b"),
            "line 3: './im/1.jpg' is on line 2 already, as 'im/1.jpg'; write",
        ),
        (
            ("path,labels", "im/1.jpg,a", "im/../im//1.jpg,b"),
            "line 3: 'im/../im//1.jpg' is on line 2 already, as 'im/1.jpg'",
        ),
        (("path,labels,split", "1.jpg,a,tets"), "line 2: the split is 'tets'; did you mean 'test'?"),
        (("path,labels", '1.jpg,"a'), "cannot be parsed"),
        (("path,label", "1.jpg,a"), "no column 'labels' (data.labels_column); did you mean 'label'?"),
        (
            ("path,labels,path", "1.jpg,a,2.jpg"),
            "several columns 'path' (data.path_column): the columns 1, 3; leave one, or rename the others",
        ),
        (
            ("path;labels", "1.jpg;a"),
            "no column 'path' (data.path_column): its columns are parted by semicolons, expected commas; part them by commas",
        ),
        (("path\tlabels", "1.jpg\ta"), "its columns are parted by tabs, expected commas"),
        (
            ('"path";"labels"', '"1.jpg";"a"'),
            "line 1: cannot be parsed (',' expected after '\"'); correct its quotes, or part",
        ),
        (("path,labels",), "no rows below the header"),
        ((), "no column 'path'"),
        (("path,labels", "1.jpg,a/x", "2.jpg,a/y", "3.jpg,b"), "label 'b' has no vertical, but others do"),
        (("path,labels", "1.jpg,a/x", "2.jpg,b/y"), "vertical 'a' has 1 class"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(lines, expected, write):
    refuse(write(*lines), expected)


def test_a_file_that_comes_again_as_an_absolute_path_is_refused(write, tmp_path):
    path = write("path,labels", "im/1.jpg,a", f"{tmp_path}/im/1.jpg,b")
    refuse(path, f"line 3: '{tmp_path}/im/1.jpg' is on line 2 already, as 'im/1.jpg'")
    refuse(write("path,labels", "1.jpg,a", "./1.jpg,b"), "on line 2 already", root=tmp_path / "im")


def test_a_table_of_the_other_ending_is_told_what_parts_its_columns(write):
    refuse(
        write("path,labels", "1.jpg,a", name="images.tsv"),
        "parted by commas, expected tabs; part them by commas in a .csv",
    )


def test_a_missing_table_or_column_and_other_encodings_are_refused(write, tmp_path):
    refuse(tmp_path / "gone.csv", "cannot be read (No such file", "give the path of the table")
    refuse(write("path,labels", "é.jpg,a", encoding="latin-1"), "not UTF-8", "save it as UTF-8")
    path = write("path,labels", "1.jpg,a")
    refuse(path, "no column 'fold' (data.split_column)", split_column="fold")
    refuse(path, "no column 'product' (data.split.group)", split={"group": "product"})


def test_labels_of_a_given_taxonomy_are_checked_with_their_line(write, tmp_path):
    taxonomy = tmp_path / "taxonomy.json"
    taxonomy.write_text(json.dumps({"classes": [{"id": f"/m/{c}", "vertical": "v"} for c in "ba"]}))
    path = write("path,labels", "1.jpg,/m/a", "2.jpg,/m/b|/m/c")
    refuse(path, "line 3: no class '/m/c' in", "taxonomy.json", taxonomy=taxonomy)
    path = write("path,labels", "1.jpg,/m/a", "2.jpg,/m/b")
    assert [c.id for c in open_table(path, taxonomy=taxonomy).build_taxonomy().classes] == ["/m/b", "/m/a"]
    assert len(list_rows(path, taxonomy=taxonomy)) == 2


@pytest.mark.parametrize("separator", [";", ","])
def test_labels_that_are_others_side_by_side_are_told_with_the_separator_that_parts_them(write, separator):
    """`Bach, J. S.` is nobody else's name; `a/x;a/y` is two classes of other rows."""
    rows = [f'1.jpg,"a/x{separator} a/y"', "2.jpg,a/x", "3.jpg,a/y", '4.jpg,"a/Bach, J. S."']
    path = write("path,labels", *rows)
    [note] = open_table(path).list_notes()
    assert f"1 of 4 classes are named as several others, 'a/x{separator} a/y' say" in note
    assert note.endswith(f"prepare with data.label_separator='{separator}'")
    assert [note for note in open_table(path, label_separator=separator).list_notes() if "several" in note] == []


def test_a_table_becomes_shards(write, tmp_path, encode_image):
    rows = []
    for number in range(60):
        path = tmp_path / "photos" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_image("jpg", seed=number))
        rows.append(f"{number}.jpg,{('birds/gull', 'birds/kite', 'cars/taxi|cars/tram')[number % 3]},s{number // 4}")
    data = {"kind": "csv", "path": write("path,labels,session", *rows), "root": tmp_path / "photos"}
    data["split"] = {"group": "session", "val_per_class": 2, "test_per_class": 3}
    prepare(parse_config(PrepareConfig, {"workdir": tmp_path / "work", "num_processes": 1, "data": data}))
    _, taxonomy, _ = load_prepared(tmp_path / "work", DataOverrides())
    sessions: dict[str, set[str]] = {}
    for name in ("train", "val", "test"):
        split = load_split(tmp_path / "work" / "shards", name, taxonomy)
        sessions[name] = {split.key(n).split("/")[1].split("-")[0] for n in range(len(split))}
        sessions[name] = {str(int(number) // 4) for number in sessions[name]}
        counts = split.count_labels()
        assert counts.min() >= {"train": 1, "val": 2, "test": 3}[name]
    assert len(set().union(*sessions.values())) == sum(map(len, sessions.values())) == 15


def test_images_without_the_group_that_is_asked_for_are_told(write, tmp_path, encode_image, capsys):
    """An empty column made every image a group of its own without a word: those of one session lay in all splits."""
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(encode_image("jpg", seed=number))
    path = write("path,labels,session", *(f"{n}.jpg,{'xy'[n % 2]},{'s' if n == 7 else ''}" for n in range(40)))
    data = {"kind": "csv", "path": path, "split": {"group": "session"}, "near_duplicates": None}
    prepare(parse_config(PrepareConfig, {"workdir": tmp_path / "work", "num_processes": 1, "data": data}))
    expected = "prepare: 39 images have nothing as data.split.group=session, and go to a split one by one"
    assert expected in capsys.readouterr().out
