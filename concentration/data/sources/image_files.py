"""Image files on a disk, as all sources that list files read them; classes that are named by paths; verticals of one class."""

import collections
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pydantic

from concentration.data.decoding import UNDECODABLE, decode_shrunk, describe_undecodable
from concentration.data.near_duplicates import MaxDistance
from concentration.data.split_assignment import SplitConfig
from concentration.data.views import ViewConfig
from concentration.errors import DataError
from concentration.schema import Config
from concentration.taxonomy import TaxonomyClass

#: The vertical of classes that belong to no other.
OTHER = "other"


class ImageFilesConfig(Config):
    """What all sources of image files can be told; each adds `kind`, `path`, and what it reads.

    split: how images are shared out; each source says what `split.group` names.
    image_size: of the networks' input; shards keep images as they are.
    near_duplicates: bits of 64 in which the perceptual hashes of images in different splits may differ and be reported as
        near copies; None looks for none. It may be changed by preparing again, which then only looks anew.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"near_duplicates"})

    split: SplitConfig = SplitConfig()
    image_size: pydantic.PositiveInt = 224
    view: ViewConfig = ViewConfig()
    near_duplicates: MaxDistance | None = 2


def read_image_file(path: Path) -> tuple[str, bytes]:
    """The extension and the bytes of the file as it is, after it was decoded as training will decode it.

    Raises: DataError where it is missing, is no file, or cannot be read or decoded.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # what a pipe holds would be waited for, for ever
            raise ValueError("no file, but a folder, a pipe or a device")
        content = path.read_bytes()
        decode_shrunk(content, shorter_side=1)  # all of a file is read, however small its image becomes
    except UNDECODABLE as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise DataError(f"{path}: is a link to '{os.readlink(path)}', which is missing") from None
        raise DataError(f"{path}: {describe_undecodable(error)}") from None
    return path.suffix[1:].lower(), content


def key_of_path(path: str) -> str:
    """A key that WebDataset reads back whole: no dots, and unique through a hash of the path."""
    readable = re.sub("[^A-Za-z0-9]", "-", os.path.splitext(path)[0][-60:])
    return f"{readable}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def classes_of_paths(ids: Iterable[str]) -> list[TaxonomyClass]:
    """Classes that are called CLASS, all in the vertical "all", or VERTICAL/CLASS, or deeper: each path is its parent's child.

    Raises: ValueError with the id that names no vertical where others do.
    """
    ids = sorted(set(ids))
    if all("/" not in class_id for class_id in ids):
        return [TaxonomyClass(class_id, class_id, (), "all") for class_id in ids]
    classes: dict[str, TaxonomyClass] = {}
    for class_id in ids:
        parts = class_id.split("/")
        if len(parts) == 1:
            raise ValueError(class_id)
        for depth in range(2, len(parts) + 1):
            inner, parent = "/".join(parts[:depth]), "/".join(parts[: depth - 1])
            parents = (parent,) if depth > 2 else ()
            classes.setdefault(inner, TaxonomyClass(inner, parts[depth - 1], parents, parts[0]))
    return list(classes.values())


def merge_small_verticals(classes: Sequence[TaxonomyClass]) -> tuple[list[TaxonomyClass], list[str]]:
    """Classes of which every vertical has two at least, and notes on how.

    The only class of a vertical goes to the vertical "other"; if it is alone there, too, it is left out.
    """
    sizes = collections.Counter(c.vertical for c in classes)
    small = [vertical for vertical, size in sizes.items() if size < 2 and vertical != OTHER]
    notes = [f"verticals of one class are merged into '{OTHER}': {', '.join(small)}"] if small else []
    merged = [replace(c, vertical=OTHER) if c.vertical in small else c for c in classes]
    others = [c for c in merged if c.vertical == OTHER]
    if len(others) == 1:
        merged.remove(others[0])
        notes = [f"the class '{others[0].name}' is alone in its vertical, and left out"]
    kept = {c.id for c in merged}
    return [replace(c, parents=tuple(parent for parent in c.parents if parent in kept)) for c in merged], notes
