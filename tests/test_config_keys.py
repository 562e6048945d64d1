"""docs/config.md against the config classes, and what it says of them against what they do."""

import importlib.util
import re
from pathlib import Path

import pytest

from concentration.config import VERBS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("config_keys", DOCS / "config_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(writer) -> str:
    return writer.write_page()


def test_the_page_is_that_of_the_classes(page):
    assert (DOCS / "config.md").read_text() == page, "run `make config`"


def test_every_verb_and_every_key_is_there(page):
    for verb, entry in VERBS.items():
        section = page.split(f"## `concentrate {verb}`")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(entry.load()[1].model_fields)


def test_every_class_that_a_key_holds_has_its_section(page):
    anchors = set(re.findall(r"\]\(#(\w+)\)", page))
    assert anchors == {title.lower() for title in re.findall(r"^## `(\w+)`$", page, re.MULTILINE)}


def test_a_key_is_described_with_its_values_default_and_meaning(page):
    assert (
        "\n| `top_k` | int > 0 | `100` | K, the classes that each record keeps (all of a smaller vertical). |\n" in page
    )
    assert "\n| `overwrite` | bool or `changed` | `false` | `true` makes a finished stage anew" in page
    assert "\n| `classes` | str | given by `conf/` | Which class each output is" in page, "a docstring below a field"
    assert "\n| `tail` | `zero` or `spread` | `zero` | the targets of those classes of a sample's own verticals" in page
    assert "| `label_share` | float >= 0 < 1 | `0.0` | the share of" in page.split("## `concentrate run`")[1], (
        "of another"
    )


def test_every_key_is_described(page):
    assert re.findall(r"^\| `(\w+)` \|.* \|  \|$", page, re.MULTILINE) == []
