"""Lists the images that `concentrate predict` is given: files, folders, and WebDataset shards."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from concentration.data.folders import walk_folders
from concentration.data.image_names import IMAGE_EXTENSIONS, has_image_extension, is_hidden
from concentration.errors import ConfigError, DataError

#: The largest file that is read, in bytes. No encoded photograph exceeds it.
MOST_BYTES = 2**28


class InputImage(Protocol):
    """One encoded image; `name` is what answers call it."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """The encoded image. Raises: OSError, ValueError if it cannot be read."""


class ImageInMemory(NamedTuple):
    """An encoded image that is in memory already."""

    name: str
    content: bytes

    def read(self) -> bytes:
        return self.content


class ImageOnDisk(NamedTuple):
    """A file on disk, or a member of a tar: `num_bytes` bytes of the file `path` from `offset` on."""

    name: str
    path: str
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """The encoded image. Raises: OSError if it cannot be read, ValueError if it is too large."""
        if self.num_bytes > MOST_BYTES:
            raise ValueError(f"{self.num_bytes:,} bytes, expected at most {MOST_BYTES:,}")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


def list_inputs(paths: Sequence[str]) -> list[ImageOnDisk]:
    """All images of the given files, folders and tars, in the given order.

    A folder is walked with all folders below it, in sorted order, also through links. In folders and tars, an image is a file
    that has the extension of one and is neither hidden nor in a hidden folder. A file that is given by name always counts as an
    image.

    Raises:
        ConfigError: no path is given, a path does not exist or is a pipe or device, or there are no images.
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
            # A broken link is listed, so that its answer is an error instead of nothing.
            is_answered = os.path.isfile(path) or not os.path.exists(path)
            if has_image_extension(name) and not name.startswith(".") and is_answered:
                yield _describe_file(path)


def _list_shard(path: str) -> Iterator[ImageOnDisk]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                is_file = member.isreg() and not member.issparse()
                if is_file and has_image_extension(member.name) and not is_hidden(member.name):
                    yield ImageOnDisk(f"{path}/{member.name}", path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: truncated, compressed or no tar ({error}); fetch it again, uncompressed") from None


def _describe_file(path: str) -> ImageOnDisk:
    """The file as an image. If it does not exist (a broken link, say), reading it will say so."""
    return ImageOnDisk(path, path, 0, os.path.getsize(path) if os.path.exists(path) else 0)
