"""Walks a folder and all folders below it, also through symbolic links, to find images."""

import os
from collections.abc import Iterator
from pathlib import Path

from concentration.errors import unreadable


def walk_folders(top: str, hidden: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, the sorted names of its files) for the folder `top` and every folder below it, in sorted order.

    Symbolic links are followed, except to a folder that the walk is already inside, which would never end. Hidden folders (whose
    names begin with a dot) are left out, and their paths are appended to `hidden`.

    Raises:
        DataError: a folder cannot be read.
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
    """The way to the folder `name` inside `folder`; None if it is a link that would be followed for ever.

    A way is the real paths of all folders from the top down; `way` is that of `folder`. A link to one of these folders, or to a
    folder above them, leads back to itself.
    """
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return (*way, os.path.join(way[-1], name))
    real = os.path.realpath(path)
    return None if any(Path(passed).is_relative_to(real) for passed in way) else (*way, real)
