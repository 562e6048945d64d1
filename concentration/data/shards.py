"""Writes shards: plain WebDataset tars that any reader of the format can read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import webdataset

from concentration.data.sources.source import Item, Source
from concentration.errors import DataError
from concentration.targets import write_atomically


def write_shard(path: Path, items: Sequence[Item], source: Source) -> list[str]:
    """Writes one tar whole or not at all, and returns a line for every image that could not be had.

    Args:
        path: of the tar; a temporary file beside it is renamed at the end.
        items: in the order of the tar.
        source: reads each item's image.
    """
    skipped = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # mtime: the same samples give the same bytes, whenever they are written.
    with webdataset.TarWriter(str(temporary), mtime=0) as writer:
        for item in items:
            try:
                extension, content = source.read(item)
            except DataError as error:
                skipped.append(str(error))
                continue
            writer.write(
                {"__key__": item.key, extension: content, "json": json.dumps({"labels": item.labels}).encode()}
            )
    if len(skipped) == len(items):
        temporary.unlink()
    else:
        os.replace(temporary, path)
    write_atomically(path.with_suffix(".skipped"), "".join(f"{line}\n" for line in skipped))
    return skipped
