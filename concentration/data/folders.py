"""Folders in folders, also behind links: what images are looked for in, to be trained on or to be answered."""

import os
from collections.abc import Iterator
from pathlib import Path

from concentration.errors import unreadable


def walk_folders(top: str, hidden: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, the names of the files in it) of a folder and of all below it, sorted.

    A link back to a folder that led to it is not followed. Hidden folders are left out, and added to `hidden`.

    Raises: DataError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error)

    above: dict[str, tuple[str, ...]] = {top: (os.path.realpath(top),)}
    for folder, inner, files in os.walk(top, onerror=refuse, followlinks=True):
        way = above.pop(folder)
        hidden += [os.path.join(folder, name) for name in inner if name.startswith(".")]
        ways = {name: _follow(folder, name, way) for name in sorted(inner) if not name.startswith(".")}
        inner[:] = [name for name, found in ways.items() if found is not None]
        above |= {os.path.join(folder, name): ways[name] for name in inner}
        yield folder, sorted(files)


def _follow(folder: str, name: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
    """The way to a folder that lies in `folder`, which `way` leads to: the real paths of all folders from the top down.

    None where it is a link back to one of them, or above: it would be followed for ever.
    """
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return (*way, os.path.join(way[-1], name))
    real = os.path.realpath(path)
    return None if any(Path(passed).is_relative_to(real) for passed in way) else (*way, real)
