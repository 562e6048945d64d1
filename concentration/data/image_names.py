"""Which files are images, told by their names."""

import os

#: The suffixes of files that count as images, in lower case.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def has_image_extension(path: str) -> bool:
    """Whether the name of a file ends with one of `IMAGE_EXTENSIONS`, in upper or lower case."""
    return os.path.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS


def is_hidden(path: str) -> bool:
    """Whether a part of a path begins with a dot, as the files do that macOS leaves beside every other."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))
