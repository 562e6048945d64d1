"""`concentrate VERB --help`: choices, keys and their values, with what the files under conf/ say of each."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from concentration.config import VERBS, find_config_directory, list_options


def describe_verb(verb: str, choices: Mapping[str, str | None], values: str) -> str:
    """The text.

    Args:
        choices: of every group of the verb's defaults list, with where it goes ("top", "top@teacher.top"), what is chosen.
        values: the composed config as YAML.
    """
    parts = [f"concentrate {verb}: {VERBS[verb].summary}"]
    # A folder below a group's holds a part of a verb's own defaults, which is no choice.
    groups = {group: chosen for group, chosen in choices.items() if "/" not in group}
    if lines := [_describe_group(group, chosen) for group, chosen in reversed(groups.items())]:
        parts.append("Choices:\n" + "\n".join(lines))
    comments = dict(_read_comments(find_config_directory() / f"{verb}.yaml"))
    for group, chosen in choices.items():
        name, _, place = group.partition("@")
        path = find_config_directory() / name / f"{chosen}.yaml"
        if path.exists():
            comments |= {f"{place or name}.{key}": comment for key, comment in _read_comments(path)}
    parts.append(f"Keys and their values (KEY=VALUE changes one):\n{_annotate(values, comments)}")
    return "\n\n".join(parts)


def list_alternatives(verb: str, key: str, value: Any) -> list[str]:
    """What the comment behind a key under conf/ says that it may be, `none | batch | layer, ...`, where `value` is among it."""
    parts = key.split(".")
    files = {f"{verb}.yaml": key} | {f"{part}/*.yaml": ".".join(parts[at + 1 :]) for at, part in enumerate(parts)}
    for pattern, own in files.items():
        for path in find_config_directory().glob(pattern):
            first, *others = dict(_read_comments(path)).get(own, "").split(" | ")
            words = [re.match(r"[\w.-]*", other)[0] for other in others]
            if words and str(value) in re.findall(r"[\w.-]+", first):  # which may say first what the key is
                return [str(value), *words]
            if str(value) in words:
                return [*re.findall(r"^[\w.-]+$", first), *words]
    return []


def _describe_group(group: str, chosen: str | None) -> str:
    return f"  {group}={'|'.join(list_options(group.partition('@')[0], chosen))}"


def _read_comments(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted key, comment) of the lines `key: value  # comment` of a file."""
    for key, line in _walk_keys(path.read_text(encoding="utf-8")):
        if key and (found := re.search(r"\s#\s*(.+)$", line)):
            yield key, found[1]


def _annotate(values: str, comments: Mapping[str, str]) -> str:
    """The comments behind the lines of their keys, under each other."""
    lines = list(_walk_keys(values))
    width = min(40, max((len(line) for key, line in lines if key in comments), default=0))
    return "\n".join(
        f"{line:<{width}}  # {comments[key]}" if key in comments and not line.startswith("#") else line
        for key, line in lines
    )


def _walk_keys(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, line) of YAML in blocks; lines without a key have an empty one."""
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)([\w@./]+):(?:\s|$)", line)
        if found is None:
            yield "", line
            continue
        depth = len(found[1])
        path = [*((other, key) for other, key in path if other < depth), (depth, found[2])]
        yield ".".join(key for _, key in path), line
