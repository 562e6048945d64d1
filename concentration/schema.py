"""`Config`, the base of every configuration class; how a wrong value becomes one clear line; how JSON is read."""

import difflib
import functools
import hashlib
import json
import re
import shlex
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import pydantic

from concentration.errors import ConfigError, DataError

#: Of the name of a vertical or a run in UTF-8. File systems take names of 255, and the name's own files have something before and
#: after it: `.targets-NAME.json.1234567.tmp`.
MAX_NAME_BYTES = 200

#: Of a seed, and of any other integer.
MOST_SEED, MOST_COUNT = 2**63 - 1, 2**31 - 1

#: Control characters, and what else ends a line for `str.splitlines`.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_folder_name(name: str) -> str:
    """The name, which is one folder's: `overwrite` clears what it names, and with "" or ".." that would be all others, too.

    Raises: ValueError that says why it is none.
    """
    if not name:
        raise ValueError("empty, perhaps from a variable that is not set; give a name")
    if name.startswith(".") or "/" in name or CONTROL.search(name):
        raise ValueError("cannot name a folder; leave out '/', line breaks and a dot at the start")
    if (size_bytes := len(name.encode(errors="replace"))) > MAX_NAME_BYTES:
        raise ValueError(
            f"has {size_bytes} bytes, too many for the names of its files; at most {MAX_NAME_BYTES}: shorten it"
        )
    return name


#: What a run directory is called.
FolderName = Annotated[str, pydantic.AfterValidator(check_folder_name)]


class Config(pydantic.BaseModel):
    """A frozen set of options in which an unknown key is an error.

    `runtime_fields` of a subclass name the options that change where or how fast something is computed, not what:
    they are no part of the config's identity, so a run may be resumed with others. `later_fields` were added when runs had been
    made: while they have their default, they are no part of it either, so those runs are still known.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    later_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> "type[Config]":
        """The class that checks `values`: this one, unless it stands for another one beside itself."""
        return cls

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_integers_as_text(cls, values: Any) -> Any:
        """Hydra reads `vertical=2020` as a number. Of a float it is not known how it was written: it stays an error."""
        if not isinstance(values, Mapping):
            return values
        texts = {name for name, field in cls.model_fields.items() if _is_text(field.annotation)}
        return {name: _write_integers(value) if name in texts else value for name, value in values.items()}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_empty_paths(cls, values: Any) -> Any:
        """An empty path would be the current folder, whose images would be taken for the data.

        NOTE: not by a validator of all fields, which pydantic takes on none that tells classes apart.
        """
        if isinstance(values, Mapping):
            for name, field in cls.model_fields.items():
                if values.get(name) == "" and Path in _types_in(field.annotation):
                    raise _WrongField(name, "", _EMPTY_PATH)
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_giants(cls, values: Any) -> Any:
        """Python's integers have no end, those of what is called with them have: counts and sizes 32 bits, a seed 64."""
        if isinstance(values, Mapping):
            for name, field in cls.model_fields.items():
                most = MOST_SEED if name == "seed" else MOST_COUNT
                given = value if isinstance(value := values.get(name), list | tuple) else [value]
                giants = [one for one in given if type(one) is int and abs(one) > most]
                if giants and not _is_text(field.annotation):
                    raise _WrongField(name, giants[0], f"expected an integer from {-most} to {most}")
        return values

    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain JSON values."""
        defaults = type(self).model_fields
        unused = {name for name in self.later_fields if getattr(self, name) == defaults[name].default}
        values = self.model_dump(mode="json", exclude=self.runtime_fields | unused)
        for name in values:
            inner = getattr(self, name)
            if isinstance(inner, Config):
                values[name] = inner.identity()
        return values


C = TypeVar("C", bound=Config)


def parse_config(model: type[C], values: Mapping[str, Any]) -> C:
    """Checks `values` against `model`.

    Raises:
        ConfigError: with the first wrong key, what was found, and the nearest valid key or value.
    """
    model = model.choose(values)
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe_error(model, error)) from None


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        DataError: it is not JSON in UTF-8, has a key twice (the first would be lost without a word), a number that is none or
            half a letter (which no file can be written with), or nests deeper than Python reads.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
        if "\\u" in decoded:  # "\ud83d" alone is half of an emoji
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); bring it back, or write it again") from None


def hash_values(values: Mapping[str, Any]) -> str:
    """A hash of plain JSON values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping from dotted keys: `{"top": {"top1": 8}}` becomes `{"top.top1": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def suggest(word: str, valid: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean 'x'?"` with the nearest valid word, or the list of all where none is near and they are few.

    `prefix` is put before the words that are shown: they are keys inside it.
    """
    valid = sorted(set(valid))
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    if 0 < len(valid) <= 30:
        return f"; valid: {', '.join(prefix + name for name in valid)}"
    return ""


def check_choice(name: str, found: object, choices: Any) -> None:
    """Raises: ConfigError where an argument is none of a Literal's words: a misspelt one would be taken for another of them."""
    if found not in get_args(choices):
        raise ConfigError(_describe_choice(name, found, " or ".join(map(repr, get_args(choices)))))


def write_override(key: str, value: str | Sequence[str]) -> str:
    """`KEY=VALUE` as it is typed in a shell, so that Hydra takes it for this text, or for a list of these texts.

    `vertical=birds` needs nothing; `"vertical='1.5'"` is in quotes for Hydra, and those are in quotes for the shell.
    """
    word = f"{key}={write_value(value)}"
    if shlex.quote(word) == word:
        return word
    return shlex.quote(word) if re.search(r'["$`!]|\\\\', word) else f'"{word}"'


def write_value(value: Any) -> str:
    """As Hydra's grammar takes it: texts, numbers, null, and lists and mappings of them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {write_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(write_value, value))}]"
    return quote(value) if isinstance(value, str) else json.dumps(value)


def quote(text: str) -> str:
    """As Hydra's grammar takes it: in quotes unless it can be read as nothing but this text."""
    is_name = re.fullmatch(r"[A-Za-z_/][\w./:%+-]*", text, re.ASCII) is not None
    is_number = re.fullmatch(r"-?[1-9]\d*|0", text, re.ASCII) is not None  # which is taken for its text
    if is_number or (is_name and text.lower() not in ("true", "false", "null", "nan", "inf")):
        return text
    mark = '"' if re.search(r'["$`!]', text) and "'" not in text else "'"  # then the shell's are the others
    text = re.sub(rf"(\\*)({mark}|$)", lambda found: found[1] * 2 + (f"\\{mark}" if found[2] else ""), text)
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)  # else OmegaConf would look for a key
    return f"{mark}{text}{mark}"


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


_EMPTY_PATH = "empty, perhaps from a variable that is not set; give a path (. is the current folder)"


class _WrongField(ValueError):
    """What is wrong with the value of a field."""

    def __init__(self, name: str, found: Any, problem: str):
        super().__init__(problem)
        self.name, self.found = name, found


#: What pydantic calls a value that is no text.
_TEXT_PROBLEMS = ("string_type", "path_type")


def _describe_error(model: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    problems = error.errors()
    # Where a text or a list may be given, pydantic tells why it is not the one and why it is not the other.
    paths = [_follow(model, problem["loc"])[0] for problem in problems if problem["type"] != "tuple_type"]
    lines = []
    for problem in problems:
        path = _follow(model, problem["loc"])[0]
        is_told = problem["type"] == "tuple_type" and path in paths
        is_told |= problem["type"] in _TEXT_PROBLEMS and any(path == other[:-1] for other in paths)
        if not is_told:
            lines.append(_describe_problem(model, problem))
    lines = list(dict.fromkeys(lines))
    return "; ".join(lines[:4])


def _describe_problem(model: type[pydantic.BaseModel], problem: Mapping[str, Any]) -> str:
    path, siblings = _follow(model, problem["loc"])
    dotted, found = ".".join(path), problem["input"]
    if problem["type"] == "extra_forbidden":
        prefix = "".join(f"{part}." for part in path[:-1])
        return f"unknown key '{dotted}'{suggest(path[-1], siblings, prefix)}"
    if problem["type"] == "missing":
        return f"'{dotted}' is missing: give {dotted}=VALUE"
    if problem["type"] == "value_error" and isinstance(wrong := problem["ctx"]["error"], _WrongField):
        return f"{'.'.join([*path, wrong.name])}={wrong.found!r}: {wrong}"
    if problem["type"] == "literal_error":
        return _describe_choice(dotted, found, problem["ctx"]["expected"])
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key = f"{dotted}.{problem['ctx']['discriminator'].strip(chr(39))}"
        if problem["type"] == "union_tag_not_found":
            return f"'{key}' is missing: give {key}=VALUE"
        return _describe_choice(key, problem["ctx"]["tag"], problem["ctx"]["expected_tags"])
    if problem["type"] in _TEXT_PROBLEMS:
        return _describe_no_text(path, found)
    if problem["type"] == "tuple_type":
        return f"{dotted}={found}: expected a list, {write_override(dotted, [str(found)])}"
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{dotted}={found!r}: " if dotted and not isinstance(found, Mapping) else ""
    return f"{where}{message}"


def _describe_no_text(path: Sequence[str], found: Any) -> str:
    key = ".".join(path)
    if isinstance(found, Mapping | list | tuple):
        example = write_override(key, "A,B")
        return f"{key}={found}: expected a text; one with brackets or commas is put in quotes, as in {example}"
    text = "null" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
    kind = {bool: "true or false", type(None): "nothing"}.get(type(found), "a number")
    is_in_list = path[-1].isdigit()
    example = write_override(".".join(path[:-1]), [text]) if is_in_list else write_override(key, text)
    return f"{key}={text}: read as {kind}, expected a text; put it in quotes as it is written: {example}"


def _describe_choice(dotted: str, found: Any, expected: str) -> str:
    """`expected` is pydantic's list: `'a', 'b' or 'c'`."""
    words = [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(found), words, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{dotted}={found}: expected {expected}{hint}"


def _follow(model: type[pydantic.BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], set[str]]:
    """What a user would write for pydantic's `location`, and the names of the fields that lie beside its last part.

    NOTE: after a field that may hold one of several types, pydantic adds which one it tried: the tag of a discriminated
    union, the name of a class, or of a plain type (`float`). Users write none of these.
    """
    path: list[str] = []
    siblings: set[str] = set()
    models, annotation = [model], None  # the models that may stand at this point, and the annotation they come from
    tag_may_follow = False
    for part in location:
        tagged = [inner for inner in models if part in _tags_of(inner)] if tag_may_follow else []
        fields = [inner.model_fields[part] for inner in models if part in inner.model_fields]
        if tagged:
            models, tag_may_follow = tagged, False
        elif fields:
            path.append(str(part))
            siblings = {name for inner in models for name in inner.model_fields}
            annotation = tuple(field.annotation for field in fields)
            models = _models_in(annotation)
            tag_may_follow = _has_union(annotation)
        elif models or isinstance(part, int) or _has_mapping(annotation):  # an unknown key, a position, a key of a dict
            path.append(str(part))
            siblings = {name for inner in models for name in inner.model_fields}
    return path, siblings


def _tags_of(model: type[pydantic.BaseModel]) -> set[Any]:
    """How pydantic may call `model` as the member of a union: its name, or the one value of a field like `kind`."""
    literals = [field.annotation for field in model.model_fields.values() if get_origin(field.annotation) is Literal]
    return {model.__name__} | {get_args(literal)[0] for literal in literals if len(get_args(literal)) == 1}


def _types_in(annotation: Any) -> Iterator[Any]:
    """`annotation` and all that it is made of: `A | dict[str, B]` gives itself, A, the dict, str and B."""
    yield annotation
    for inner in annotation if isinstance(annotation, tuple) else get_args(annotation):
        yield from _types_in(inner)


@functools.cache
def _is_text(annotation: Any) -> bool:
    """Whether a field holds texts or paths, perhaps several, and no integer."""
    types_in = {inner for inner in _types_in(annotation) if isinstance(inner, type)}
    return bool(types_in & {str, Path}) and not types_in & {int, float, bool, dict, Mapping} and Any not in types_in


def _write_integers(value: Any) -> Any:
    """An integer, or those in a list, as text."""
    if isinstance(value, list | tuple):
        return [_write_integers(inner) for inner in value]
    return str(value) if type(value) is int else value


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    found = [inner for inner in _types_in(annotation) if isinstance(inner, type)]
    return [inner for inner in found if issubclass(inner, pydantic.BaseModel)]


def _has_union(annotation: Any) -> bool:
    unions = [get_args(inner) for inner in _types_in(annotation) if get_origin(inner) in (Union, types.UnionType)]
    return any(len([member for member in members if member is not type(None)]) > 1 for members in unions)


def _has_mapping(annotation: Any) -> bool:
    return any((get_origin(inner) or inner) in (dict, Mapping) for inner in _types_in(annotation))
