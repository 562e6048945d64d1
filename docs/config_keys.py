"""Writes docs/config.md, every key of every verb, from the config classes. `make config`, or: python docs/config_keys.py"""

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from concentration.config import VERBS
from concentration.schema import Config

PAGE = Path(__file__).with_name("config.md")

HEAD = """# Every key

Written by `make config` from the config classes; `tests/test_config_keys.py` holds it to them. A key inside another is written
with a dot: `optimizer.lr=0.1`. A key that holds one of several classes is chosen by name, `optimizer=adamw`, which takes the file
`conf/optimizer/adamw.yaml`; its own keys follow from its `kind`. The defaults here are the classes'; a file in `conf/` may give
others, and `concentrate VERB --help` shows what holds. Where a verb has several networks, theirs have a prefix:
`teacher.trainer.max_epochs` of `run` is the teachers', `trainer.max_epochs` the student's, and the generalist's where
`generalist.trainer.max_epochs` is not given.
"""


def write_page() -> str:
    """The whole page: a section for each verb, then one for each class that a key holds."""
    of_verbs = {verb: entry.load()[1] for verb, entry in VERBS.items()}
    held = {inner for config in of_verbs.values() for inner in find_classes(config)} - set(of_verbs.values())
    shared = find_shared_meanings({*of_verbs.values(), *held})
    sections = [
        write_section(f"`concentrate {verb}`", config, VERBS[verb].summary, shared) for verb, config in of_verbs.items()
    ]
    sections.append("# What keys hold\n")
    sections += [write_section(f"`{config.__name__}`", config, None, shared) for config in sorted(held, key=anchor_of)]
    return "\n".join([HEAD, *sections])


def find_classes(config: type[Config]) -> Iterator[type[Config]]:
    """The config classes that a class holds, at any depth."""
    for field in config.model_fields.values():
        for inner in list_classes(field.annotation):
            yield inner
            yield from find_classes(inner)


def list_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for inner in get_args(annotation) for found in list_classes(inner)]


def find_shared_meanings(configs: Iterable[type[Config]]) -> dict[tuple[str, str], str]:
    """By name and values: the meaning of the keys that all classes which describe them describe alike.

    So `optimizer`, which ten classes have, is described in one.
    """
    meanings = defaultdict(set)
    for config in configs:
        own = read_docstring(config)[1]
        for name, field in config.model_fields.items():
            if name in own:
                meanings[name, describe_values(field)].add(own[name])
    return {key: found.pop() for key, found in meanings.items() if len(found) == 1}


def write_section(title: str, config: type[Config], summary: str | None, shared: Mapping[tuple[str, str], str]) -> str:
    text, meanings = read_docstring(config)
    lines = [f"## {title}", "", summary[0].upper() + summary[1:] + "." if summary else text, ""]
    lines += ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in config.model_fields.items():
        values = describe_values(field)
        meaning = meanings.get(name) or shared.get((name, values), "")
        if not meaning and name == "kind":
            meaning = "chooses this class."
        cells = [f"`{name}`", values, describe_default(field), meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def read_docstring(config: type[Config]) -> tuple[str, dict[str, str]]:
    """A class's text, and the meaning of each field: of its own and of those that it inherits.

    A field is described by a line `name: ...` of the class's docstring, or by a docstring below it.
    """
    text, meanings = "", {}
    for parent in reversed([c for c in config.__mro__ if issubclass(c, Config) and c is not Config]):
        meanings |= _read_below_fields(parent)
        document = inspect.cleandoc(parent.__dict__.get("__doc__") or "")
        entries = re.split(r"\n(?=[a-z_0-9]+(?:, [a-z_0-9]+)*: )", "\n" + document)
        text = " ".join(entries[0].split())
        for entry in entries[1:]:
            names, _, meaning = entry.partition(": ")
            own, _, rest = meaning.partition("\n\n")
            text = " ".join([text, *rest.split()]).strip()
            meanings |= {name.strip(): " ".join(own.split()) for name in names.split(",")}
    return text, meanings


def _read_below_fields(config: type[Config]) -> dict[str, str]:
    """The meaning of each field of a class that has a docstring below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def describe_values(field: FieldInfo) -> str:
    words = list(dict.fromkeys(_describe_type(field.annotation, field.metadata)))
    return " or ".join(words)


def _describe_type(annotation: Any, metadata: list[Any] = ()) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = get_args(annotation)
        yield from _describe_type(inner, more)
    elif origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _describe_type(inner)
    elif origin is Literal:
        yield from (f"`{_write(value)}`" for value in get_args(annotation))
    elif annotation is types.NoneType:
        yield "`null`"
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        yield f"[{annotation.__name__}](#{anchor_of(annotation)})"
    elif origin is not None:
        inner = [" or ".join(_describe_type(each)) for each in get_args(annotation) if each is not Ellipsis]
        yield f"{'a mapping to ' + inner[-1] if len(inner) == 2 and origin is dict else 'a list of ' + inner[0]}"
    else:
        bounds = [_describe_bound(bound) for bound in metadata]
        yield " ".join([annotation.__name__.lower(), *(bound for bound in bounds if bound)])


def _describe_bound(bound: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    parts = [f"{sign} {getattr(bound, name)}" for name, sign in signs.items() if getattr(bound, name, None) is not None]
    return ", ".join(parts)


def describe_default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return f"`{_write(field.default_factory())}`"
    if field.default is PydanticUndefined:
        return "given by `conf/`"
    if isinstance(field.default, pydantic.BaseModel):
        return f"`{getattr(field.default, 'kind', type(field.default).__name__)}`"
    return f"`{_write(field.default)}`"


def _write(value: Any) -> str:
    """As it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    return str(value)


def anchor_of(config: type[Config]) -> str:
    return config.__name__.lower()


if __name__ == "__main__":
    PAGE.write_text(write_page())
    print(PAGE)
