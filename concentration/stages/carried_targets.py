"""Stored targets that go on holding after data came: old shards and the places of classes inside verticals never change."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from concentration.data.sample_targets import read_manifest
from concentration.data.split import Split
from concentration.errors import ConfigError, DataError
from concentration.stages.folders import TEACHERS
from concentration.stages.run_directory import RunDirectory
from concentration.stages.verbs import write_command
from concentration.taxonomy import Taxonomy
from concentration.temporaries import name_temporary


def find_earlier_taxonomy(taxonomy: Taxonomy, num_classes: int, fingerprint: str, where: str) -> Taxonomy:
    """The first classes of a taxonomy, which something was made for.

    Raises:
        DataError: these are others.
    """
    with contextlib.suppress(DataError):  # what is no taxonomy is none that something was made for
        earlier = Taxonomy(taxonomy.classes[:num_classes])
        if earlier.fingerprint == fingerprint:
            return earlier
    raise DataError(
        f"{where}: made for {num_classes} classes that are not the first of taxonomy.json; classes may only be appended: restore "
        "them, or train it again"
    )


def count_earlier_shards(split: Split, taxonomy: str, data: str, where: str) -> int:
    """How many of the first shards had these fingerprints, of their taxonomy and of the whole split.

    Raises:
        DataError: none had.
    """
    hasher = hashlib.sha256(taxonomy.encode())
    for number, digest in enumerate(split.digests, start=1):
        hasher.update(f"\n{digest}".encode())
        if hasher.copy().hexdigest()[:16] == data:
            return number
    raise DataError(
        f"{where}: made from other shards than the first of these; shards may only be appended: make it again"
    )


def carry_targets(source: Path, workdir: Path, split: Split, earlier: Taxonomy, destination: Path) -> None:
    """Puts a vertical's stored targets where those of more data are being made, so that only what is missing is made.

    Args:
        source: the directory of the vertical in the set that is there.
        workdir: where its teacher is.
        split: all samples that there are now.
        earlier: the taxonomy when the targets were made.
        destination: the same of the set that is being made. Whoever calls holds it, and has noted what it is made from.

    Raises:
        ConfigError: the targets are not finished, or their teacher is another now.
        DataError: they were made from other data than the first shards.
    """
    vertical = source.name
    done = RunDirectory(source).load_done(write_command("targets", vertical), teacher=str)
    teacher = RunDirectory(workdir / TEACHERS / vertical).load_done(write_command("teacher", vertical))
    if teacher["checkpoint"] != done["teacher"]:
        raise ConfigError(
            f"{workdir / TEACHERS / vertical}: another teacher than made {source}; add this vertical, too: "
            f"vertical=[...,{vertical}]"
        )
    manifest = read_manifest(source)
    if manifest.get("taxonomy") != earlier.fingerprint:
        raise DataError(f"{source}: made for another taxonomy than the student was; make them again")
    num_shards = count_earlier_shards(split, earlier.fingerprint, manifest.get("data", ""), str(source))
    for name in split.index_names[:num_shards]:
        file = f"{name}.safetensors"
        if (source / file).exists() and not (destination / file).exists():
            link_file(source / file, destination / file)


def link_file(source: Path, destination: Path) -> None:
    """A second name for a file that is never changed in place, or a copy where the file system has none."""
    try:
        os.link(source, destination)
    except OSError:
        temporary = name_temporary(destination)
        shutil.copyfile(source, temporary)
        os.replace(temporary, destination)
