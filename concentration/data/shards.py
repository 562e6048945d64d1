"""Writes shards: plain WebDataset tars that any reader of the format can read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import webdataset

from concentration.data.sources.source import Item, Source
from concentration.errors import DataError
from concentration.temporaries import name_temporary


def write_shard(path: Path, items: Sequence[Item], source: Source) -> list[str]:
    """Writes one tar, whole or not at all.

    Args:
        path: the tar; it is written to a temporary file beside it, which is renamed at the end.
        items: the samples, in the order of the tar.
        source: reads the image of each item.

    Returns:
        A line for each image that could not be read. If none could, no tar is written.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    temporary = name_temporary(path)
    try:
        with open(temporary, "wb") as file:
            skipped = _write_items(file, items, source)
            file.flush()
            os.fsync(file.fileno())
        if len(skipped) < len(items):
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free space or correct the permissions"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return skipped


def _write_items(file: BinaryIO, items: Sequence[Item], source: Source) -> list[str]:
    skipped = []
    # Without a fixed mtime, the same samples would give other bytes each time they are written.
    with webdataset.TarWriter(file, mtime=0) as writer:
        for item in items:
            try:
                extension, content = source.read(item)
            except DataError as error:
                skipped.append(str(error))
                continue
            writer.write(
                {"__key__": item.key, extension: content, "json": json.dumps({"labels": item.labels}).encode()}
            )
    return skipped
