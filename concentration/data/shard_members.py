"""Walks the members of a tar by their headers, groups them into samples as `webdataset` does, and reads the labels.

Unlike `webdataset`, it leaves out hidden members: macOS's tar puts a file `birds/._1.jpg` before each `birds/1.jpg`.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from webdataset.tariterators import base_plus_ext

from concentration.data.image_names import IMAGE_EXTENSIONS, is_hidden
from concentration.errors import DataError
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy

_BLOCK_BYTES = 512
_READ_BYTES = 2**20

#: Which member holds a sample's labels; `auto` takes whichever a sample has, and it may have only one.
LabelMember = Literal["auto", "json", "cls"]

# Members that `webdataset` treats as notes about the shard, and skips.
_NOTE = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One sample of a shard: its key, where its encoded image lies, and its labels as positions in taxonomy.json."""

    key: str
    image_offset: int
    image_size: int
    labels: list[int]


def walk_samples(
    path: Path, file: BinaryIO, where: str, taxonomy: Taxonomy, label_member: LabelMember
) -> Iterator[Member]:
    """Yields all samples of a tar, in its order.

    Args:
        path: the tar.
        file: the same tar, opened; between two samples the caller may seek in it.
        where: what errors call the tar.
        taxonomy: the taxonomy that the labels belong to.
        label_member: which member of a sample holds its labels.

    Raises:
        DataError: the tar is truncated; a sample has no image or no labels, or two of either; or a label is not in the taxonomy.
            The message names the member.
    """
    extensions = ("json", "cls") if label_member == "auto" else (label_member,)
    for key, members in _group_members(path, file, where):
        image = _only_member(where, key, members, IMAGE_EXTENSIONS, "image", "")
        advice = "; say which one counts with data.labels=json or data.labels=cls, and overwrite=true"
        label = _only_member(where, key, members, extensions, "label", advice)
        file.seek(label.offset_data)
        parse = _parse_position if label.name.lower().endswith(".cls") else _parse_labels
        labels = parse(file.read(label.size), f"{where}: {label.name}", taxonomy)
        yield Member(key, image.offset_data, image.size, labels)


def _group_members(path: Path, file: BinaryIO, where: str) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yields (key, members) for each run of consecutive members with the same key, as `webdataset` groups them."""
    key, members = None, []
    for member in _walk_headers(path, file, where):
        member_key, extension = base_plus_ext(member.name)
        if not member_key or not extension or not member.isfile():
            continue
        if _NOTE.match(member.name) or is_hidden(member.name):
            continue
        _check_member(where, member)
        if member_key != key and members:
            yield key, members
            members = []
        key = member_key
        members.append(member)
    if members:
        yield key, members


def _walk_headers(path: Path, file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Yields all members of a tar, and then checks that the tar is whole. Between two members the caller may seek in `file`."""
    end, num_bytes = 0, file.seek(0, os.SEEK_END)
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                # tarfile itself would notice only at the next member, after the caller has tried to read this one.
                if member.size < 0 or tar.offset > num_bytes:
                    raise tarfile.ReadError(f"a member of {member.size} bytes, but the file has {num_bytes}")
                yield member
            end = tar.offset
    # A header may announce a name that is longer than memory, which raises the last two.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{where}: empty, truncated, compressed or no tar ({error}); write or fetch it again, uncompressed"
        ) from None
    file.seek(end)
    # NOTE: a tar that was cut between two members reads as a shorter tar; only the missing end mark shows it.
    if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise DataError(f"{where}: truncated: no end-of-archive mark after byte {end}; write or fetch it again")
    # The output of `cat a.tar b.tar` reads as a.tar alone; what follows the end mark shows it.
    while padding := file.read(_READ_BYTES):
        if padding.count(0) != len(padding):
            raise DataError(
                f"{where}: goes on after its end-of-archive mark at byte {end}, like tars that were joined by `cat`; join them "
                "by `tar --concatenate`, or leave them apart"
            )


def _check_member(where: str, member: tarfile.TarInfo) -> None:
    """Raises: DataError if the member is sparse, or its name is not UTF-8 or has a line break, which an index cannot store."""
    if member.issparse():
        raise DataError(f"{where}: {member.name} is stored as a sparse file; write the tar again without --sparse")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the name {member.name!r} is not UTF-8; rename it and write the tar again") from None
    if "\n" in member.name:
        raise DataError(f"{where}: the name {member.name!r} has a line break; rename it and write the tar again")


def _only_member(
    where: str, key: str, members: list[tarfile.TarInfo], extensions: tuple[str, ...], what: str, advice: str
) -> tarfile.TarInfo:
    """The only member with one of these extensions.

    Args:
        what: what errors call such a member.
        advice: what to do if there are several.

    Raises:
        DataError: there is none, or there are several.
    """
    found = [m for m in members if base_plus_ext(m.name)[1].lower() in extensions]
    if len(found) == 1:
        return found[0]
    have = ", ".join(m.name for m in members)
    raise DataError(
        f"{where}: sample '{key}' has {len(found)} {what}s, expected one (.{', .'.join(extensions)}); its members: {have}"
        f"{advice if found else ''}"
    )


def _parse_labels(content: bytes, where: str, taxonomy: Taxonomy) -> list[int]:
    """The class ids of a .json member as positions in taxonomy.json, sorted, each once."""
    record = parse_json(content, where)
    if not isinstance(record, dict) or "labels" not in record:
        raise DataError(f'{where}: expected {{"labels": ["class id", ...]}}, found {content[:80]!r}')
    labels = record["labels"]
    if not isinstance(labels, list) or not labels:
        raise DataError(f"{where}: 'labels' is {labels!r}, expected a list of at least one class id")
    for label in labels:
        if not isinstance(label, str) or label not in taxonomy.position:
            raise DataError(f"{where}: label {label!r} is not in the taxonomy; add the class or correct the label")
    return sorted({taxonomy.position[label] for label in labels})


def _parse_position(content: bytes, where: str, taxonomy: Taxonomy) -> list[int]:
    """The content of a .cls member: one position in taxonomy.json."""
    text = content.decode("ascii", errors="replace").strip()
    if not text.isdigit() or len(text) > 12 or int(text) >= taxonomy.num_classes:
        raise DataError(
            f"{where}: {text[:40]!r} is no position in a taxonomy of {taxonomy.num_classes} classes; correct it"
        )
    return [int(text)]
