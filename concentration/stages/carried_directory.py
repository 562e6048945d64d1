"""Shards, teachers and stored targets for another working directory, in which they hold as they are but for what names rows.

Each is made beside its place and then moved there, so that it is there whole or not at all.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from concentration.array_files import compute_checksum, map_arrays, save_arrays
from concentration.data.index import ShardIndex
from concentration.data.regrouped_index import find_kept_rows, map_positions, regroup_index
from concentration.data.sample_targets import load_manifest
from concentration.data.shard_cache import ACCESS_FILE
from concentration.data.split import Split, load_split
from concentration.data.split_assignment import SPLITS
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.schema import hash_values
from concentration.stages.carried_targets import link_file
from concentration.stages.folders import SHARDS
from concentration.stages.prepared import describe_splits, has_split, load_prepared_split
from concentration.stages.run_directory import RunDirectory
from concentration.stages.verbs import write_command
from concentration.taxonomy import Taxonomy
from concentration.temporaries import clear_temporaries, name_temporary


def carry_shards(workdir: Path, destination: Path, before: Taxonomy, after: Taxonomy) -> Split:
    """The training samples that have a label left, after all splits were indexed anew in `destination`.

    Indices name the tars where they lie. A shard without such a sample is left out, and the others are numbered through.

    Raises:
        ConfigError: other shards are there.
        DataError: an index is damaged.
    """
    source, path = workdir / SHARDS, destination / SHARDS
    splits = {name: load_prepared_split(workdir, name, before) for name in SPLITS if has_split(workdir, name)}
    origin = hash_values({"taxonomy": after.fingerprint, **{name: split.fingerprint for name, split in splits.items()}})
    with _make_once(path, "carried", origin) as temporary:
        if temporary is not None:
            for split in splits.values():
                for name, index in _regroup_indices(split, after).items():
                    index.save(temporary / f"{name}.index")
            if (source / ACCESS_FILE).exists():
                shutil.copyfile(source / ACCESS_FILE, temporary / ACCESS_FILE)
            write_atomically(temporary / "taxonomy.json", after.to_json())
            made = {
                name: load_split(temporary, name, after) for name in splits if any(temporary.glob(f"{name}-*.index"))
            }
            facts = {**describe_splits(made), "near_duplicates": None, "carried": origin}
            RunDirectory(temporary).copy_record(RunDirectory(source), {}, facts)
    return load_split(path, "train", after)


def carry_teacher(source: Path, destination: Path, new_split: Split) -> None:
    """A finished teacher; nothing where it is not there: it may be removed once its targets are made.

    Raises: ConfigError where another one is there.
    """
    if not RunDirectory(source).is_finished:
        return
    done = RunDirectory(source).load_done(write_command("teacher", source.name), checkpoint=str)
    with _make_once(destination, "checkpoint", done["checkpoint"]) as temporary:
        if temporary is not None:
            for file in source.iterdir():
                if file.is_file() and not file.name.startswith(".") and file.name not in ("config.json", "DONE.json"):
                    link_file(file, temporary / file.name)
            RunDirectory(temporary).copy_record(RunDirectory(source), {"data": new_split.fingerprint}, {})


def carry_stored_targets(source: Path, destination: Path, split: Split, new_split: Split) -> None:
    """The stored targets of one vertical; where samples of a shard are gone, with the others' new rows.

    Raises:
        ConfigError: they are not finished, or others are there.
        DataError: a file is missing or damaged, or they were made from other data.
    """
    done = RunDirectory(source).load_done(write_command("targets", source.name), targets=str)
    manifest = load_manifest(source, split)
    new_taxonomy, new_data = new_split.taxonomy.fingerprint, new_split.fingerprint
    origin = hash_values({"targets": done["targets"], "data": new_data})
    with _make_once(destination, "carried", origin) as temporary:
        if temporary is None:
            return
        digest, names = hashlib.sha256(), iter(new_split.index_names)
        position_C = map_positions(split.taxonomy, new_split.taxonomy)
        for number, name in enumerate(split.index_names):
            earlier_row, _ = find_kept_rows(split.shards[number], position_C)
            if not len(earlier_row):
                continue
            file, new_file = source / f"{name}.safetensors", temporary / f"{next(names)}.safetensors"
            if file.exists():
                _carry_file(file, new_file, earlier_row, split.shards[number].num_samples)
                digest.update(new_file.read_bytes())
        write_atomically(temporary / "manifest.json", {**manifest, "taxonomy": new_taxonomy, "data": new_data})
        facts = {"targets": digest.hexdigest()[:16], "carried": origin}
        RunDirectory(temporary).copy_record(RunDirectory(source), {"data": new_data}, facts)


def _regroup_indices(split: Split, after: Taxonomy) -> Mapping[str, ShardIndex]:
    """By name, such as train-000000."""
    position_C = map_positions(split.taxonomy, after)
    found = [regroup_index(index, position_C) for index in split.shards]
    left = [index for index in found if index is not None]
    return {f"{split.name}-{number:06d}": index for number, index in enumerate(left)}


def _carry_file(source: Path, destination: Path, earlier_row: np.ndarray, num_samples: int) -> None:
    if len(earlier_row) == num_samples:
        link_file(source, destination)
        return
    metadata, arrays = map_arrays(source)
    if compute_checksum(arrays) != metadata.get("crc32"):
        raise DataError(f"{source}: damaged (its checksum is another than when it was written); make the targets again")
    row = np.searchsorted(earlier_row, arrays["row"]).astype(arrays["row"].dtype)
    arrays = {**arrays, "row": row}
    save_arrays(destination, arrays, {**metadata, "crc32": compute_checksum(arrays)})


@contextlib.contextmanager
def _make_once(path: Path, fact: str, expected: str) -> Iterator[Path | None]:
    """Gives a directory that takes the place of `path` when all is written to it, or None where it was made before.

    To be called by one who holds the new working directory.

    Raises: ConfigError where something else is there.
    """
    clear_temporaries(path.parent, path.name, least_age_seconds=0)
    if path.exists():
        directory = RunDirectory(path)
        if not directory.is_finished or directory.load_done("").get(fact) != expected:
            raise ConfigError(f"{path}: is there already and something else; give another destination, or remove it")
        yield None
        return
    temporary = name_temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
