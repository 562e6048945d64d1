"""What the sources of image files share: their configuration, reading a file, classes from paths, and verticals of one class."""

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

#: The vertical of classes that belong to no other vertical.
OTHER = "other"


class ImageFilesConfig(Config):
    """The options of all sources of image files; each source adds `kind`, `path` and options of its own.

    split: how images are divided into train, val and test; each source says what `split.group` names.
    image_size: the side of the networks' input in pixels; shards keep images in their own size.
    view: the augmentation of training images.
    near_duplicates: images of different splits are reported as near-duplicates if their perceptual hashes differ in at most this
        many of 64 bits; None does not look for any. If it is changed, preparing again only repeats the search.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"near_duplicates"})

    split: SplitConfig = SplitConfig()
    image_size: pydantic.PositiveInt = 224
    view: ViewConfig = ViewConfig()
    near_duplicates: MaxDistance | None = 2


def read_image_file(path: Path) -> tuple[str, bytes]:
    """The extension and the content of an image file. It is decoded, as in training, to find out whether it is sound.

    Raises:
        DataError: the file is missing, is not a regular file, or cannot be read or decoded.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise ValueError("no file, but a folder, a pipe or a device")
        content = path.read_bytes()
        decode_shrunk(content, shorter_side=1)  # the size does not matter: the whole file is decoded
    except UNDECODABLE as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise DataError(f"{path}: is a link to '{os.readlink(path)}', which is missing") from None
        raise DataError(f"{path}: {describe_undecodable(error)}") from None
    return path.suffix[1:].lower(), content


def key_of_path(path: str) -> str:
    """A sample's key from the path of its image. It has no dots, at which WebDataset would cut it, and a hash makes it unique."""
    readable = re.sub("[^A-Za-z0-9]", "-", os.path.splitext(path)[0][-60:])
    return f"{readable}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def classes_of_paths(ids: Iterable[str]) -> list[TaxonomyClass]:
    """The classes with these ids: either all of the form CLASS, in one vertical "all", or of the form VERTICAL/CLASS or deeper.

    In the second form, the path above a class (if it is not the vertical) is its parent, and a class, too.

    Raises:
        ValueError: an id names no vertical, but others do; the text is that id.
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
    """The classes with verticals of at least two classes each, and notes on what was changed.

    The only class of a vertical is moved to the vertical "other"; if it is alone there, too, it is left out.
    """
    sizes = collections.Counter(c.vertical for c in classes)
    small = {vertical: None for vertical, size in sizes.items() if size < 2 and vertical != OTHER}
    more = f" and {len(small) - 10} more" if len(small) > 10 else ""
    notes = [f"verticals of one class are merged into '{OTHER}': {', '.join([*small][:10])}{more}"] if small else []
    merged = [replace(c, vertical=OTHER) if c.vertical in small else c for c in classes]
    others = [c for c in merged if c.vertical == OTHER]
    if len(others) == 1:
        merged.remove(others[0])
        notes = [f"the class '{others[0].name}' is alone in its vertical, and left out"]
    kept = {c.id for c in merged}
    return [replace(c, parents=tuple(parent for parent in c.parents if parent in kept)) for c in merged], notes
