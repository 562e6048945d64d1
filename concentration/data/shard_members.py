"""What lies in a tar: its members walked by their headers, grouped into samples as `webdataset` does, and their labels.

Hidden members, which `webdataset` would read, are left out: macOS's tar puts `birds/._1.jpg` before `birds/1.jpg`.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from webdataset.tariterators import base_plus_ext

from concentration.data.views import IMAGE_EXTENSIONS, is_hidden
from concentration.errors import DataError
from concentration.schema import parse_json
from concentration.taxonomy import Taxonomy

_BLOCK_BYTES = 512
_READ_BYTES = 2**20

#: Which member holds a sample's labels; `auto` takes the only one.
LabelMember = Literal["auto", "json", "cls"]

# Members that `webdataset` takes for notes about the shard and leaves out.
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
    """All samples of a tar, in its order.

    Args:
        path: of the tar.
        file: the same, open; the caller may move it in between.
        where: what errors call it.
        taxonomy: of the labels.
        label_member: where the labels are.

    Raises:
        DataError: naming the member, where the tar is truncated, a sample lacks its image or labels or has two, or a label is
            not in the taxonomy.
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
    """(key, members) of each run of members with one key, as `webdataset` groups them."""
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
    """All members of a tar that is whole. `file` may be moved by the caller in between."""
    end, num_bytes = 0, file.seek(0, os.SEEK_END)
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                # Before its bytes are asked for: tarfile would notice only at the next member.
                if member.size < 0 or tar.offset > num_bytes:
                    raise tarfile.ReadError(f"a member of {member.size} bytes, but the file has {num_bytes}")
                yield member
            end = tar.offset
    # The last two where a long name says that it is longer than memory.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{where}: empty, truncated, compressed or no tar ({error}); write or fetch it again, uncompressed"
        ) from None
    file.seek(end)
    # NOTE: a tar cut between two members reads as a shorter tar; only the missing end mark tells.
    if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
        raise DataError(f"{where}: truncated: no end-of-archive mark after byte {end}; write or fetch it again")
    # What `cat a.tar b.tar` writes reads as a.tar alone.
    while padding := file.read(_READ_BYTES):
        if padding.count(0) != len(padding):
            raise DataError(
                f"{where}: goes on after its end-of-archive mark at byte {end}, like tars that were joined by `cat`; join them "
                "by `tar --concatenate`, or leave them apart"
            )


def _check_member(where: str, member: tarfile.TarInfo) -> None:
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
    """`advice` is for a sample that has several."""
    found = [m for m in members if base_plus_ext(m.name)[1].lower() in extensions]
    if len(found) == 1:
        return found[0]
    have = ", ".join(m.name for m in members)
    raise DataError(
        f"{where}: sample '{key}' has {len(found)} {what}s, expected one (.{', .'.join(extensions)}); its members: {have}"
        f"{advice if found else ''}"
    )


def _parse_labels(content: bytes, where: str, taxonomy: Taxonomy) -> list[int]:
    """The positions of the class ids of a .json member, sorted, each once."""
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
    """The position in a .cls member."""
    text = content.decode("ascii", errors="replace").strip()
    if not text.isdigit() or len(text) > 12 or int(text) >= taxonomy.num_classes:
        raise DataError(
            f"{where}: {text[:40]!r} is no position in a taxonomy of {taxonomy.num_classes} classes; correct it"
        )
    return [int(text)]
