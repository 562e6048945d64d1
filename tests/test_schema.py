"""Every wrong value becomes one line that says which key, as a user writes it, and what would have been valid."""

import random
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from concentration.errors import ConfigError, DataError
from concentration.schema import (
    Config,
    FolderName,
    flatten,
    hash_values,
    parse_config,
    parse_json,
    suggest,
    write_override,
)

EMPTY_PATH = "empty, perhaps from a variable that is not set; give a path (. is the current folder)"


class CircleConfig(Config):
    kind: Literal["circle"] = "circle"
    radius: float
    ink: Literal["black", "red"] = "black"


class SquareConfig(Config):
    kind: Literal["square"] = "square"
    width: int = 1
    height: int = 1


class FrameConfig(Config):
    border: int = 0


class DrawingConfig(Config):
    shape: Annotated[CircleConfig | SquareConfig, pydantic.Field(discriminator="kind")] = SquareConfig()
    maybe: Annotated[CircleConfig | SquareConfig, pydantic.Field(discriminator="kind")] | None = None
    many: tuple[Annotated[CircleConfig | SquareConfig, pydantic.Field(discriminator="kind")], ...] = ()
    frame: FrameConfig | Literal["none"] = "none"
    scale: float | Literal["auto"] = "auto"
    weights: dict[str, int] = pydantic.Field(default_factory=dict)


def describe(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(DrawingConfig, values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shap": {}}, "unknown key 'shap'; did you mean 'shape'?"),
        ({"shape": {"kind": "square", "widht": 2}}, "unknown key 'shape.widht'; did you mean 'shape.width'?"),
        # The keys of the member that was chosen, not those of the others.
        (
            {"shape": {"kind": "square", "radius": 1}},
            "unknown key 'shape.radius'; valid: shape.height, shape.kind, shape.width",
        ),
        ({"maybe": {"kind": "square", "widht": 2}}, "unknown key 'maybe.widht'; did you mean 'maybe.width'?"),
        ({"many": [{"kind": "square", "widht": 2}]}, "unknown key 'many.0.widht'; did you mean 'many.0.width'?"),
        ({"shape": {"kind": "circle"}}, "'shape.radius' is missing: give shape.radius=VALUE"),
        ({"shape": {"radius": 1}}, "'shape.kind' is missing: give shape.kind=VALUE"),
        ({"shape": {"kind": "squar"}}, "shape.kind=squar: expected 'circle', 'square'; did you mean 'square'?"),
        (
            {"shape": {"kind": "circle", "radius": 1, "ink": "rd"}},
            "shape.ink=rd: expected 'black' or 'red'; did you mean 'red'?",
        ),
    ],
)
def test_a_wrong_key_is_named_as_a_user_writes_it(values: dict[str, Any], message: str) -> None:
    assert describe(values) == message


def test_the_type_that_was_tried_is_not_part_of_the_key() -> None:
    assert describe({"scale": "big"}).startswith("scale='big': ")
    assert "scale=big: expected 'auto'" in describe({"scale": "big"})
    assert "unknown key 'frame.bordr'; did you mean 'frame.border'?" in describe({"frame": {"bordr": 1}})


def test_a_key_of_a_dictionary_is_part_of_the_key() -> None:
    assert describe({"weights": {"birds": "x"}}).startswith("weights.birds='x': ")


class NamedConfig(Config):
    name: str | tuple[str, ...] = "student"
    vertical: str | None = None
    folder: Path = Path()
    verticals: tuple[str, ...] = ()
    count: int | str = 0


def test_an_integer_that_is_given_for_a_text_is_its_text() -> None:
    """Hydra reads `vertical=2020` as a number."""
    config = parse_config(NamedConfig, {"name": [1, "a"], "vertical": 2020, "folder": -1, "verticals": [7], "count": 3})
    assert config == NamedConfig(name=("1", "a"), vertical="2020", folder=Path("-1"), verticals=("7",), count=3)
    assert parse_config(NamedConfig, {"name": 2020}).name == "2020"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vertical": 1.5}, """vertical=1.5: read as a number, TEXT: "vertical='1.5'\""""),
        ({"vertical": True}, """vertical=true: read as true or false, TEXT: "vertical='true'\""""),
        ({"folder": None}, """folder=null: read as nothing, TEXT: "folder='null'\""""),
        ({"name": 1.5}, """name=1.5: read as a number, TEXT: "name='1.5'\""""),
        ({"name": ["a", 1.5]}, """name.1=1.5: read as a number, TEXT: "name=['1.5']\""""),
        (
            {"vertical": ["a"]},
            "vertical=['a']: expected a text; one with brackets or commas is put in quotes, as in \"vertical='A,B'\"",
        ),
        ({"verticals": 2020}, 'verticals=2020: expected a list, "verticals=[2020]"'),
    ],
)
def test_what_is_no_text_is_told_with_the_quotes_that_make_it_one(values, message) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(NamedConfig, values)
    assert str(caught.value) == message.replace("TEXT", "expected a text; put it in quotes as it is written")


class FolderConfig(Config):
    name: FolderName | tuple[FolderName, ...] = "student"
    path: Path = Path("there")
    inner: NamedConfig = NamedConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name='': empty, perhaps from a variable that is not set; give a name"),
        ({"name": ["a", ""]}, "name.1='': empty, perhaps from a variable that is not set; give a name"),
        ({"name": ".."}, "name='..': cannot name a folder; leave out '/', line breaks and a dot at the start"),
        ({"name": "../a"}, "name='../a': cannot name a folder; leave out '/', line breaks and a dot at the start"),
        ({"name": "a/b"}, "name='a/b': cannot name a folder; leave out '/', line breaks and a dot at the start"),
        ({"path": ""}, f"path='': {EMPTY_PATH}"),
        ({"inner": {"folder": ""}}, f"inner.folder='': {EMPTY_PATH}"),
    ],
)
def test_a_name_is_that_of_one_folder_and_a_path_is_not_empty(values, message) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(FolderConfig, values)
    assert str(caught.value) == message


def test_an_override_is_read_by_a_shell_and_hydra_as_the_text_that_was_written() -> None:
    chance = random.Random(0)
    letters = "ab1'\"\\$ {},.é[]()=:#!*~%-_日;&|\t"
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 7))) for _ in range(500)]
    texts += [
        "birds",
        "2020",
        "-5",
        "0",
        "-0",
        "007",
        "1_000",
        "1.5",
        "1e3",
        "0x10",
        "nan",
        "inf",
        "-inf",
        "true",
        "False",
    ]
    texts += ["null", "NULL", "${x}", "\\${x}", "a\\", "'", "\\'"]
    parser = OverridesParser.create()
    for text in ["", " a", "a ", *texts]:
        for value in (text, [text, "b"]):
            [word] = shlex.split(write_override("vertical", value))
            read = OmegaConf.create({"vertical": parser.parse_override(word).value(), "x": "y"})
            expected = parse_config(NamedConfig, {"name": OmegaConf.to_container(read, resolve=True)["vertical"]})
            assert expected.name == (text if value is text else (text, "b")), word
    assert write_override("vertical", "birds") == "vertical=birds"
    assert write_override("vertical", "1.5") == """"vertical='1.5'\""""


def test_all_problems_are_told_once_each() -> None:
    assert describe({"shap": 1, "scal": 1}).count("unknown key") == 2


def test_a_suggestion_is_the_nearest_word_or_all_of_a_few() -> None:
    assert suggest("brids", ["birds", "cars"]) == "; did you mean 'birds'?"
    assert suggest("xyz", ["birds", "cars"]) == "; valid: birds, cars"
    assert suggest("xyz", [str(number) for number in range(1000)]) == ""


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert hash_values({"width": 2, "height": 3}) == hash_values({"height": 3, "width": 2})
    assert hash_values({"width": 2, "height": 3}) != hash_values({"width": 3, "height": 2})


def test_the_identity_of_a_config_leaves_out_its_runtime_fields_at_any_depth() -> None:
    class WorkerConfig(Config):
        runtime_fields: ClassVar[frozenset[str]] = frozenset({"num_workers"})
        num_workers: int = 0
        seed: int = 0

    class RunConfig(Config):
        worker: WorkerConfig = WorkerConfig()

    assert RunConfig(worker=WorkerConfig(num_workers=8)).identity() == {"worker": {"seed": 0}}


def test_a_field_that_was_added_later_is_part_of_the_identity_once_it_is_used() -> None:
    class GrownConfig(Config):
        later_fields: ClassVar[frozenset[str]] = frozenset({"added"})
        seed: int = 0
        added: bool = False

    assert GrownConfig().identity() == {"seed": 0}
    assert GrownConfig(added=True).identity() == {"seed": 0, "added": True}


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"top": {"top1": 8, "deep": {"x": 1}}, "empty": {}}) == {"top.top1": 8, "top.deep.x": 1, "empty": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -0.5, "b", null, true]}', {"a": [1, -0.5, "b", None, True]}),
        (b'"\xc3\xa9"', "é"),
        (b"\xef\xbb\xbf[]", []),
        ('"\\ud83d\\ude00"', "😀"),
        ('{"a": {"a": 1}}', {"a": {"a": 1}}),
    ],
)
def test_json_is_what_it_says(text, value):
    assert parse_json(text, "here") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "here: not JSON .Expecting value"),
        ("[1, 2", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b'"\xed\xa0\xbd"', "not JSON"),
        (r'["\ud83d"]', "surrogates"),
        (r'{"\ud83d": 1}', "surrogates"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' comes twice"),
        ("[NaN]", "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[" * 100_000, "recursion|Stack overflow"),
        ("9" * 5000, "digits"),
    ],
)
def test_what_is_no_json_is_one_clear_error(text, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_json(text, "here")
    assert str(caught.value).startswith("here: not JSON (")
    assert "\n" not in str(caught.value)
