"""The images that are asked about: files, folders of them, and WebDataset shards."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from concentration.data.folders import walk_folders
from concentration.data.views import IMAGE_EXTENSIONS, is_hidden
from concentration.errors import ConfigError, DataError

#: What no encoded photograph exceeds; a larger file is not read.
MOST_BYTES = 2**28


class InputImage(Protocol):
    """One encoded image; `name` is what answers call it."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """Raises: OSError, ValueError where it cannot be read."""


class ImageInMemory(NamedTuple):
    """An image that was read already."""

    name: str
    content: bytes

    def read(self) -> bytes:
        return self.content


class ImageOnDisk(NamedTuple):
    """A file, or a part of a shard."""

    name: str
    path: str
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """Raises: OSError, ValueError where the file is too large."""
        if self.num_bytes > MOST_BYTES:
            raise ValueError(f"{self.num_bytes:,} bytes, expected at most {MOST_BYTES:,}")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


def list_inputs(paths: Sequence[str]) -> list[ImageOnDisk]:
    """All images of files, folders (also those inside them, sorted) and tars, in the order that was given.

    Links between folders are followed. Of folders and tars those count that have the extension of an image and are not hidden,
    nor in a hidden folder there; a file that is named is taken for one.

    Raises:
        ConfigError: nothing is given, a path is not there or is a pipe, or no image is found.
        DataError: a folder cannot be read, or a tar is damaged.
    """
    if not paths:
        raise ConfigError("no images: give files, folders or shards, as in `concentrate predict photo.jpg holiday/`")
    found: list[ImageOnDisk] = []
    for given in paths:
        if os.path.isdir(given):
            found += _list_folder(given)
        elif os.path.isfile(given):
            found += _list_shard(given) if given.lower().endswith(".tar") else [_describe_file(given)]
        elif os.path.exists(given):
            raise ConfigError(f"{given}: is a pipe or a device; write the image to a file, and give that")
        else:
            raise ConfigError(f"{given}: no such file or folder")
    if not found:
        raise ConfigError(f"{', '.join(paths)}: no images inside (.{', .'.join(IMAGE_EXTENSIONS)})")
    return found


def _list_folder(folder: str) -> Iterator[ImageOnDisk]:
    for inside, files in walk_folders(folder, hidden=[]):
        for name in files:
            path = os.path.join(inside, name)
            # Of a link to nowhere it is said that it is one.
            is_answered = os.path.isfile(path) or not os.path.exists(path)
            if _has_image_extension(name) and not name.startswith(".") and is_answered:
                yield _describe_file(path)


def _list_shard(path: str) -> Iterator[ImageOnDisk]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                is_file = member.isreg() and not member.issparse()
                if is_file and _has_image_extension(member.name) and not is_hidden(member.name):
                    yield ImageOnDisk(f"{path}/{member.name}", path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: truncated, compressed or no tar ({error}); fetch it again, uncompressed") from None


def _describe_file(path: str) -> ImageOnDisk:
    """One that is gone is told as that when it is read."""
    return ImageOnDisk(path, path, 0, os.path.getsize(path) if os.path.exists(path) else 0)


def _has_image_extension(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS
