"""`data=open_images`: Open Images V4 to V7 as downloaded: CSVs of the images' labels and the classes' names, and their tree.

Source: https://storage.googleapis.com/openimages/web/download_v7.html; Gao et al., section 4.2, train on 5 verticals of it.
"""

import functools
import os
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from concentration.data.sources.image_files import OTHER, ImageFilesConfig, merge_small_verticals, read_image_file
from concentration.data.sources.open_images_hierarchy import Hierarchy, load_hierarchy
from concentration.data.sources.source import Item, LocalSource
from concentration.data.sources.tables import find_column, read_table
from concentration.data.split_assignment import SPLIT_OF_NAME
from concentration.data.views import Share
from concentration.errors import ConfigError, DataError
from concentration.taxonomy import Taxonomy, TaxonomyClass

_FOLDERS = ("train", "validation", "test")


class OpenImagesConfig(ImageFilesConfig):
    """Which files of Open Images are used, and what the verticals are.

    path: the folder of the folders `train`, `validation` and `test` with IMAGEID.jpg; each may be missing, or have only some
        images.
    annotations: the folder of the CSVs and of the tree; None is `path`.
    labels: patterns of the names of the CSVs with the columns ImageID, LabelName and Confidence.
    min_confidence: the smallest confidence of a label that is used. Verdicts of people have 1 or 0, labels of machines values in
        between. A 0 is no label, and takes away the same label of a machine.
    descriptions: a pattern of the name of the CSV with the names of classes.
    hierarchy: the name of the file with the tree of classes.
    verticals: names or MIDs of the nodes whose subtrees are the verticals. A class below several of them belongs to the first, so
        give `Bird` before `Animal`. None takes the children of the root.
    outside: what becomes of labels that are below none of these: "other" makes them a vertical of that name, "drop" leaves them
        out.
    images: the name of the CSV on the images, which `split.group` needs.
    split: `split.group` is a column of `images`; AuthorProfileURL keeps the images of a photographer in one split.
    """

    runtime_fields: ClassVar[frozenset[str]] = ImageFilesConfig.runtime_fields | {"path", "annotations"}

    kind: Literal["open_images"] = "open_images"
    path: Path
    annotations: Path | None = None
    labels: tuple[str, ...] = ("*-annotations-human-imagelabels-boxable.csv",)
    min_confidence: Share = 0.5
    descriptions: str = "*class-descriptions-boxable.csv"
    hierarchy: str = "bbox_labels_600_hierarchy.json"
    verticals: tuple[str, ...] | None = None
    outside: Literal["other", "drop"] = "other"
    images: str = "image_ids_and_rotation.csv"


class OpenImagesSource(LocalSource):
    """The `Source` of the images that exist in `path` and have a label.

    If an image has a label and a descendant of it, the label is left out, since smearing restores it. The parents of a class,
    which may be several, are those of which the tree lists it as a subcategory. A part (an eye) belongs to the vertical of its
    whole, but is not its child. The classes are the whole tree below each vertical in which an image has a label, and the
    classes outside the verticals that an image has.

    Listing all 9 million images takes some GB of memory, in one process only.

    Raises:
        ConfigError: a vertical is no class, or the name of several.
        DataError: a file or column is missing, a row is not as it should be, or no image has a label.
    """

    def __init__(self, config: OpenImagesConfig):
        self._config = config
        self._annotations = config.path if config.annotations is None else config.annotations
        self.split = config.split

    def __getstate__(self) -> dict[str, object]:
        return {"_config": self._config, "split": self.split}  # without the listing, which workers do not need

    def build_taxonomy(self) -> Taxonomy:
        return self._taxonomy_and_notes[0]

    def list_items(self) -> list[Item]:
        return self._items_and_notes[0]

    def list_notes(self) -> list[str]:
        return self._taxonomy_and_notes[1] + self._items_and_notes[1]

    def read(self, item: Item) -> tuple[str, bytes]:
        return read_image_file(self._config.path / item.locator)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        path = _find_only(self._annotations, self._config.descriptions, "data.descriptions")
        # V4 and V5 have no header; V6 and V7 have LabelName,DisplayName or id,name.
        return {row[0]: row[1] for _, row in read_table(path) if len(row) == 2 and row[0].startswith("/")}

    @functools.cached_property
    def _hierarchy(self) -> Hierarchy:
        return load_hierarchy(_find_only(self._annotations, self._config.hierarchy, "data.hierarchy"))

    @functools.cached_property
    def _vertical_of(self) -> dict[str, str]:
        """The vertical of every class that is below one, in the order of the tree."""
        nodes = self._hierarchy.roots if self._config.verticals is None else self._find_nodes(self._config.verticals)
        name_of = {node: self._names.get(node, node.strip("/")).replace("/", "-") for node in nodes}
        times = Counter(name_of.values())  # two classes with the same name are two verticals
        name_of = {
            node: name if times[name] == 1 else f"{name} {node.strip('/').replace('/', '-')}"
            for node, name in name_of.items()
        }
        return {c: name_of[node] for c, node in self._hierarchy.choose_subtree(nodes).items()}

    def _find_nodes(self, wanted: tuple[str, ...]) -> list[str]:
        known = self._hierarchy.parents
        mids_of: dict[str, list[str]] = {}
        for mid in known:
            mids_of.setdefault(self._names.get(mid, mid), []).append(mid)
        found = []
        for name in wanted:
            mids = [name] if name in known else mids_of.get(name, [])
            if len(mids) != 1:
                tops = ", ".join(self._names.get(top, top) for top in self._hierarchy.roots[:10])
                raise ConfigError(
                    f"data.verticals: '{name}' is the name of {len(mids)} classes in {self._config.hierarchy}, expected one; "
                    f"give a name or MID; those at the top are {tops}..."
                )
            found += mids
        return found

    @functools.cached_property
    def _labels_of_image(self) -> dict[str, list[str]]:
        """The labels with at least `min_confidence`, for each image that exists."""
        wanted = self._folder_of_image
        labels: dict[str, list[str]] = {}
        guessed: dict[str, set[str]] = {}  # by a machine alone
        paths, described, is_refuted = list(_find_all(self._annotations, self._config.labels)), set(), False
        for image, label, confidence, is_guess in _read_labels(paths, wanted):
            described.add(wanted[image])
            is_refuted |= confidence == 0 and not is_guess
            if confidence >= self._config.min_confidence and confidence > 0:
                known = labels.setdefault(image, [])
                if label not in known:
                    known.append(label)
                    if is_guess:
                        guessed.setdefault(image, set()).add(label)
                elif not is_guess and image in guessed:
                    guessed[image].discard(label)
        # People were shown what machines had guessed: what they said no to is no label. Their 0s are most of the rows, so they
        # are not kept, but read again.
        for image, label, confidence, is_guess in _read_labels(paths, guessed) if guessed and is_refuted else ():
            if confidence == 0 and not is_guess and label in guessed[image]:
                guessed[image].remove(label)
                labels[image].remove(label)
        # Each folder has a file of labels of its own. Without that file, the folder's split would silently be empty.
        for folder in sorted(set(wanted.values()) - described):
            raise DataError(
                f"{self._config.path}/{folder}: none of its images is in {', '.join(path.name for path in paths)}; "
                f"fetch and unpack the labels of {folder}, correct data.labels, or take the folder away"
            )
        return labels

    @functools.cached_property
    def _folder_of_image(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for folder in _FOLDERS:
            path = self._config.path / folder
            names = sorted(os.listdir(path)) if path.is_dir() else []
            for name in names:
                image, extension = os.path.splitext(name)
                if extension == ".jpg" and found.setdefault(image, folder) != folder:
                    raise DataError(f"{path}/{name}: lies in {found[image]}, too; remove one of them")
            if names and folder not in found.values():
                raise DataError(
                    f"{path}: no image; expected IMAGEID.jpg right in it, found {', '.join(names[:3])}; unpack or move them"
                )
        if not found:
            raise DataError(f"{self._config.path}: no images; expected {', '.join(_FOLDERS)} with IMAGEID.jpg in them")
        return found

    @functools.cached_property
    def _taxonomy_and_notes(self) -> tuple[Taxonomy, list[str]]:
        seen = dict.fromkeys(sorted({label for labels in self._labels_of_image.values() for label in labels}))
        used = {self._vertical_of[label] for label in seen if label in self._vertical_of}
        vertical_of = {c: vertical for c, vertical in self._vertical_of.items() if vertical in used}
        outside = [label for label in seen if label not in vertical_of]
        if self._config.outside == "other":
            vertical_of |= dict.fromkeys(outside, OTHER)
        parents = {c: tuple(p for p in self._hierarchy.parents.get(c, ()) if p in vertical_of) for c in vertical_of}
        classes, notes = merge_small_verticals(
            [TaxonomyClass(c, self._names.get(c, c), parents[c], vertical) for c, vertical in vertical_of.items()]
        )
        if outside:
            fate = f"are the vertical '{OTHER}'" if self._config.outside == "other" else "are left out"
            notes.append(f"{len(outside)} classes below no vertical {fate}")
        if not classes:
            raise DataError(
                f"{self._config.path}: no image has a label of Confidence >= {self._config.min_confidence} below a vertical; "
                "check data.labels, data.min_confidence and data.verticals"
            )
        return Taxonomy(classes, str(self._config.path)), notes

    @functools.cached_property
    def _items_and_notes(self) -> tuple[list[Item], list[str]]:
        taxonomy, folder_of = self.build_taxonomy(), self._folder_of_image
        groups = {} if self._config.split.group is None else self._load_groups(self._config.split.group)
        items = []
        for image, folder in folder_of.items():
            labels = _most_specific(
                [label for label in self._labels_of_image.get(image, ()) if label in taxonomy.position], taxonomy
            )
            if labels:
                items.append(Item(image, labels, f"{folder}/{image}.jpg", SPLIT_OF_NAME[folder], groups.get(image)))
        num_bare = len(folder_of) - len(items)
        return items, [
            f"{num_bare} of {len(folder_of)} images have no label that is taken, and are left out"
        ] if num_bare else []

    def _load_groups(self, column: str) -> dict[str, str]:
        path = _find_only(self._annotations, self._config.images, "data.images")
        rows = read_table(path)
        _, header = next(rows, (1, []))
        image_at, group_at = (
            find_column(path, header, "ImageID", "data.images"),
            find_column(path, header, column, "data.split.group"),
        )
        wanted = self._folder_of_image
        return {
            row[image_at]: sys.intern(row[group_at])
            for _, row in rows
            if len(row) == len(header) and row[image_at] in wanted and row[group_at]
        }


def _most_specific(labels: list[str], taxonomy: Taxonomy) -> tuple[str, ...]:
    """The labels that are not ancestors of other labels inside their vertical; label smearing restores the others."""
    outputs = {taxonomy.output(label) for label in labels}
    restored = {ancestor for output in outputs for ancestor in taxonomy.ancestors[output]}
    return tuple(label for label in labels if taxonomy.output(label) not in restored)


def _read_labels(paths: Sequence[Path], wanted: Container[str]) -> Iterator[tuple[str, str, float, bool]]:
    """Yields (image, label, confidence, whether a machine says so) of each row on a wanted image."""
    for path in paths:
        rows = read_table(path)
        _, header = next(rows, (1, []))
        image_at, label_at, confidence_at = (
            find_column(path, header, name, "data.labels") for name in ("ImageID", "LabelName", "Confidence")
        )
        source_at = header.index("Source") if "Source" in header else None
        for line, row in rows:
            if len(row) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(row)} columns, expected {len(header)}; fetch the file again"
                )
            if row[image_at] in wanted:
                confidence = _parse_confidence(row[confidence_at], path, line)
                is_guess = 0 < confidence < 1 if source_at is None else row[source_at] == "machine"
                yield row[image_at], sys.intern(row[label_at]), confidence, is_guess


def _parse_confidence(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(
            f"{path}, line {line}: Confidence is '{text}', expected a number; fetch the file again"
        ) from None


def _find_all(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if not found:
            raise DataError(
                f"{folder}: no file matches data.labels={pattern}; give data.annotations=FOLDER, or other names"
            )
        yield from found


def _find_only(folder: Path, pattern: str, key: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = f" ({', '.join(path.name for path in found[:3])})" if found else ""
        raise DataError(
            f"{folder}: {len(found)} files match {key}={pattern}{names}, expected one; give its name or data.annotations"
        )
    return found[0]
