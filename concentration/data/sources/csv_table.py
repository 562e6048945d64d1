"""`data=csv`: a table with a row for every image: its path and its labels, and if known its split and its group."""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from concentration.data.image_names import IMAGE_EXTENSIONS, has_image_extension
from concentration.data.remote import is_url
from concentration.data.sources.image_files import (
    ImageFilesConfig,
    classes_of_paths,
    key_of_path,
    read_image_file,
)
from concentration.data.sources.source import Item, LocalSource
from concentration.data.sources.tables import find_column, read_table
from concentration.data.split_assignment import SPLIT_OF_NAME, SplitName, find_split
from concentration.errors import DataError
from concentration.schema import suggest
from concentration.taxonomy import Taxonomy, TaxonomyClass


class CsvConfig(ImageFilesConfig):
    """The table, and what its columns mean.

    path: the table, with a header; columns are separated by tabs in a .tsv, and by commas otherwise.
    root: the folder that the images' paths are relative to; None is the folder of the table. An image is known by its path below
        it, whether the table has it relative or absolute.
    taxonomy: a taxonomy.json; without it every label is a class: CLASS, or VERTICAL/CLASS and deeper, as with image_folder.
    path_column, labels_column: the names of the columns with the image's path and labels.
    label_separator: the text between two labels of an image.
    split_column: the name of the column with the split: train, val, test, another of their names as with image_folder, or
        nothing, which is train; None takes the column `split`, if there is one.
    split: `split.group` is the name of a column; images with the same text in it stay in one split. An empty text is no group.
    """

    runtime_fields: ClassVar[frozenset[str]] = ImageFilesConfig.runtime_fields | {"path", "root"}

    kind: Literal["csv"] = "csv"
    path: Path
    root: Path | None = None
    taxonomy: Path | None = None
    path_column: str = "path"
    labels_column: str = "labels"
    label_separator: str = pydantic.Field(default="|", min_length=1)
    split_column: str | None = None


class CsvSource(LocalSource):
    """The `Source` of the rows of a table. Listing does not look at the images.

    Raises:
        DataError: the table or a column is missing, a row has another form, two rows are of the same image, or a label is not in
            the taxonomy.
    """

    def __init__(self, config: CsvConfig):
        self._config = config
        self._root = config.path.parent if config.root is None else config.root
        self.split = config.split

    def __getstate__(self) -> dict[str, object]:
        # Without the listing, which workers do not need.
        return {"_config": self._config, "_root": self._root, "split": self.split}

    def build_taxonomy(self) -> Taxonomy:
        if self._config.taxonomy is not None:
            return Taxonomy.load(self._config.taxonomy)
        return Taxonomy(self.list_classes(), str(self._config.path))

    def list_classes(self) -> Sequence[TaxonomyClass]:
        if self._config.taxonomy is not None:
            return super().list_classes()
        try:
            return classes_of_paths(label for item in self.list_items() for label in item.labels)
        except ValueError as error:
            raise DataError(
                f"{self._config.path}: the label '{error}' has no vertical, but others do; "
                "write VERTICAL/CLASS in every row, or CLASS in every row, or give data.taxonomy=FILE"
            ) from None

    def list_items(self) -> list[Item]:
        return self._items_and_notes[0]

    def list_notes(self) -> list[str]:
        return self._items_and_notes[1]

    def read(self, item: Item) -> tuple[str, bytes]:
        return read_image_file(self._root / item.locator)

    @functools.cached_property
    def _items_and_notes(self) -> tuple[list[Item], list[str]]:
        config = self._config
        classes = None if config.taxonomy is None else self.build_taxonomy().position
        rows = read_table(config.path)
        _, header = next(rows, (1, []))
        header = [name.strip() for name in header]
        columns = _find_columns(config, header)
        root = os.path.abspath(self._root)
        seen: dict[str, tuple[int, str]] = {}  # by absolute path: one file may be written in several ways
        items = []
        for line, row in rows:
            where = f"{config.path}, line {line}"
            if len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} columns, but {len(header)} in the header; correct it, or quote texts"
                )
            values = {name: row[place].strip() for name, place in columns.items()}
            path = _check_path(values["path"], where)
            file = os.path.normpath(os.path.join(root, path))
            if file in seen:
                earlier_line, earlier = seen[file]
                spelling = "" if earlier == path else f", as '{earlier}'"
                raise DataError(
                    f"{where}: '{path}' is on line {earlier_line} already{spelling}; write all its labels in one row"
                )
            seen[file] = line, path
            if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", values["labels"]):
                raise DataError(
                    f"{where}: the labels are {values['labels']}, a list; expected LABEL or {_several(config)}"
                )
            labels = tuple(dict.fromkeys(label.strip() for label in values["labels"].split(config.label_separator)))
            for label in labels:
                _check_label(label, classes, where, config)
            split, group = _parse_split(values.get("split", ""), where), values.get("group") or None
            # NOTE: the key does not depend on how the path is written, or other spellings would append all images again.
            inside = os.path.relpath(file, root) if file.startswith(f"{root}{os.sep}") else os.path.normpath(path)
            items.append(Item(key_of_path(inside), labels, path, split, group))
        if not items:
            raise DataError(f"{config.path}: no rows below the header; expected one for every image")
        labels = {label for item in items for label in item.labels}
        return items, [*_note_unread(config.path, header, columns), *_note_combined(config, labels)]


def _find_columns(config: CsvConfig, header: Sequence[str]) -> dict[str, int]:
    names = {
        "path": (config.path_column, "data.path_column"),
        "labels": (config.labels_column, "data.labels_column"),
    }
    if config.split_column is not None or "split" in header:
        names["split"] = (config.split_column or "split", "data.split_column")
    elif alike := [name for name in header if name.lower() == "split"]:
        raise DataError(
            f"{config.path}: the column '{alike[0]}' is not called 'split', and would not be read; give "
            f"data.split_column={alike[0]}, or rename it"
        )
    if config.split.group is not None:
        names["group"] = (config.split.group, "data.split.group")
    return {what: find_column(config.path, header, name, key) for what, (name, key) in names.items()}


def _note_unread(path: Path, header: Sequence[str], columns: Mapping[str, int]) -> list[str]:
    """A note on the columns that mean nothing here: one of them may be the split or the group under a name of its own."""
    unread = [name for place, name in enumerate(header) if place not in columns.values() and name]
    if not unread:
        return []
    more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
    return [f"{path}: columns that are not read: {', '.join(unread[:10])}{more}"]


def _note_combined(config: CsvConfig, labels: Set[str]) -> Iterator[str]:
    """Yields a note on labels that are others side by side: their separator may be another than the one that is read."""
    for separator in (",", ";", "|"):
        parts_of = {label: label.split(separator) for label in labels if separator in label}
        found = [label for label, parts in parts_of.items() if labels >= {part.strip() for part in parts}]
        if found:
            yield (
                f"{config.path}: {len(found)} of {len(labels)} classes are named as several others, {min(found)!r} say; if these "
                f"are several labels of an image, prepare with data.label_separator='{separator}'"
            )


def _check_path(text: str, where: str) -> str:
    if is_url(text):
        raise DataError(
            f"{where}: the path is '{text}', an address; fetch the images, and write where they lie on this machine"
        )
    if not has_image_extension(text):
        raise DataError(f"{where}: the path is '{text}', expected one that ends with .{', .'.join(IMAGE_EXTENSIONS)}")
    return text


def _check_label(label: str, classes: Mapping[str, int] | None, where: str, config: CsvConfig) -> None:
    """Raises: DataError if the label is not in the taxonomy (`classes`), or if without one it has an empty part."""
    if not label or (classes is None and not all(label.split("/"))):
        raise DataError(f"{where}: a label is '{label}'; expected LABEL or {_several(config)}")
    if classes is not None and label not in classes:
        raise DataError(f"{where}: no class '{label}' in {config.taxonomy}; add the class or correct the label")


def _several(config: CsvConfig) -> str:
    return f"LABEL{config.label_separator}LABEL"


def _parse_split(text: str, where: str) -> SplitName:
    split = find_split(text) if text else "train"
    if split is None:
        raise DataError(f"{where}: the split is '{text}'{suggest(text, SPLIT_OF_NAME)}")
    return split
