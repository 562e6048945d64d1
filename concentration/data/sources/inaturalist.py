"""`data=inaturalist`: the data sets of the iNaturalist competitions of 2017 to 2021, JSON files in the form of COCO.

Known flaw: an observation may have several photographs, and the files do not say which belong together.
`split.group=rights_holder` at least keeps all photographs of one person in one split.

Source: https://github.com/visipedia/inat_comp.
"""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from concentration.data.image_names import IMAGE_EXTENSIONS, has_image_extension
from concentration.data.sources.image_files import (
    ImageFilesConfig,
    key_of_path,
    merge_small_verticals,
    read_image_file,
)
from concentration.data.sources.source import Item, LocalSource
from concentration.data.split_assignment import SplitName
from concentration.errors import ConfigError, DataError
from concentration.taxonomy import Taxonomy, TaxonomyClass

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
Rank = Literal["kingdom", "phylum", "class", "order", "family", "genus"]

#: The ranks that lie below every supercategory: the supercategory "Birds" is a class, but "Plants" a kingdom.
_BELOW_SUPERCATEGORY = ("order", "family", "genus")


class INaturalistConfig(ImageFilesConfig):
    """Which files belong to which split, and which ranks become verticals and inner classes.

    path: the folder that the images' `file_name` is relative to.
    annotations: the folder of the JSON files; None is `path`.
    train, val: patterns that match one JSON file each; without a file for `val`, that split is taken from training, as test is.
    vertical_rank: the rank whose taxa are the verticals.
    ranks: the ranks between vertical and species whose taxa become inner classes (`family:Rosaceae`); None takes all that the
        files have below `vertical_rank`, or below a supercategory order, family and genus.
    split: `split.group` is a field of the images, such as rights_holder; images without a value are no group.
    """

    runtime_fields: ClassVar[frozenset[str]] = ImageFilesConfig.runtime_fields | {"path", "annotations"}

    kind: Literal["inaturalist"] = "inaturalist"
    path: Path
    annotations: Path | None = None
    train: str = "train*.json"
    val: str = "val*.json"
    vertical_rank: Literal["supercategory", "kingdom", "phylum", "class", "order", "family", "genus"] = "supercategory"
    ranks: tuple[Rank, ...] | None = None

    @pydantic.model_validator(mode="after")
    def _check_ranks(self):
        for rank in self.ranks or ():
            if self.vertical_rank in RANKS and RANKS.index(rank) <= RANKS.index(self.vertical_rank):
                raise ValueError(f"ranks: '{rank}' is not below vertical_rank={self.vertical_rank}")
        return self


class INaturalistSource(LocalSource):
    """The `Source` of the annotated images.

    The classes are the species, called by their names, and the taxa of `ranks`; they do not depend on the images.

    Listing holds a whole file in memory: a synthetic one of 540,000 images (0.2 GB) took 0.6 GB and 14 s, so the 2.7 million
    images of 2021 (1.2 GB) should take 3 GB, in one process only.

    Raises:
        ConfigError: the files lack a rank.
        DataError: a file is missing, or has another form.
    """

    def __init__(self, config: INaturalistConfig):
        self._config = config
        self._annotations = config.path if config.annotations is None else config.annotations
        self.split = config.split

    def __getstate__(self) -> dict[str, object]:
        return {"_config": self._config, "split": self.split}  # without the listing, which workers do not need

    def build_taxonomy(self) -> Taxonomy:
        return self._listing[0]

    def list_items(self) -> list[Item]:
        return self._listing[1]

    def list_notes(self) -> list[str]:
        return self._listing[2]

    def read(self, item: Item) -> tuple[str, bytes]:
        return read_image_file(self._config.path / item.locator)

    @functools.cached_property
    def _listing(self) -> tuple[Taxonomy, list[Item], list[str]]:
        config = self._config
        train, val = (self._find(split) for split in ("train", "val"))
        categories: dict[int | str, dict[str, Any]] = {}
        class_of: dict[int | str, str] = {}
        items, num_bare = [], 0
        for split, path in (("train", train), ("val", val)):
            if path is None:
                continue
            content = load_coco(path, config.split.group)
            _add_categories(content["categories"], categories, class_of, path)
            found = _list_images(content, split, class_of, config.split.group, path)
            items += found
            num_bare += len(content["images"]) - len(found)
        classes, notes = merge_small_verticals(self._build_classes(categories, class_of))
        taxonomy = Taxonomy(classes, str(train))
        if num_bare:
            notes.append(f"{num_bare} images have no annotation, and are left out")
        # NOTE: the labels of an image are in several classes where it has several; it is lost with its only one alone.
        kept = [replace(item, labels=tuple(c for c in item.labels if c in taxonomy.position)) for item in items]
        if num_lost := sum(not item.labels for item in kept):
            notes.append(f"{num_lost} images have no other label than that class, and are left out")
        return taxonomy, [item for item in kept if item.labels], notes

    def _find(self, split: SplitName) -> Path | None:
        pattern = getattr(self._config, split)
        found = sorted(self._annotations.glob(pattern))
        if len(found) > 1 or (not found and split == "train"):
            names = f" ({', '.join(path.name for path in found[:3])})" if found else ""
            raise DataError(
                f"{self._annotations}: {len(found)} files match data.{split}={pattern}{names}, expected one; "
                f"give data.{split}=NAME or data.annotations=FOLDER"
            )
        return found[0] if found else None

    def _build_classes(
        self, categories: dict[int | str, dict[str, Any]], class_of: dict[int | str, str]
    ) -> list[TaxonomyClass]:
        """All classes; a species comes after the inner classes above it."""
        id_of_node: dict[tuple[str, ...], str] = {}
        classes: dict[str, TaxonomyClass] = {}
        ranks = self._choose_ranks(categories)
        for number, category in categories.items():
            vertical = _text(category, self._config.vertical_rank, f"{self._annotations}: category {number}")
            node, parent = (vertical,), ()
            for rank in ranks:
                if not category.get(rank):
                    continue
                called = _text(category, rank, f"{self._annotations}: category {number}")
                node = (*node, f"{rank}:{called}")
                if node not in id_of_node:
                    # NOTE: two taxa may have the same name: Ficus is a genus of figs, and one of snails.
                    is_taken = node[-1] in classes
                    id_of_node[node] = f"{node[-1]} ({', '.join(node[:-1])})" if is_taken else node[-1]
                class_id = id_of_node[node]
                classes.setdefault(class_id, TaxonomyClass(class_id, called, parent, vertical))
                parent = (class_id,)
            name = category["name"]
            if category.get("common_name"):
                name = f"{name} ({_text(category, 'common_name', f'{self._annotations}: category {number}')})"
            if class_of[number] in classes:
                raise DataError(
                    f"{self._annotations}: category {number} ('{category['name']}') is called as another class, a species or one "
                    "of the inner classes RANK:NAME; rename it"
                )
            classes[class_of[number]] = TaxonomyClass(class_of[number], name, parent, vertical)
        return list(classes.values())

    def _choose_ranks(self, categories: dict[int | str, dict[str, Any]]) -> tuple[str, ...]:
        config = self._config
        there = {rank for category in categories.values() for rank in RANKS if category.get(rank)}
        if config.ranks is not None:
            for rank in config.ranks:
                if rank not in there:
                    raise ConfigError(
                        f"data.ranks: no category has a '{rank}'; there are: {', '.join(sorted(there)) or 'none'}"
                    )
            return tuple(rank for rank in RANKS if rank in config.ranks)
        if config.vertical_rank == "supercategory":
            return tuple(rank for rank in _BELOW_SUPERCATEGORY if rank in there)
        return tuple(rank for rank in RANKS[RANKS.index(config.vertical_rank) + 1 :] if rank in there)


def load_coco(path: Path, group_field: str | None) -> dict[str, list[dict[str, Any]]]:
    """The `images`, `annotations` and `categories` of a file, with only those fields that are needed here.

    Raises:
        DataError: the file has another form.
    """
    kept = {"images", "annotations", "categories", "id", "file_name", "image_id", "category_id", group_field}
    kept |= {"name", "common_name", "supercategory", *RANKS}

    def keep(values: dict[str, Any]) -> dict[str, Any]:
        entry = {key: value for key, value in values.items() if key in kept}
        for value in entry.values():
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair, such as "\ud83d", could not be written to a file later
        return entry

    try:
        with open(path, encoding="utf-8-sig") as file:
            # NOTE: pandas, and the data sets themselves, write NaN for a missing value.
            content = json.load(file, object_hook=keep, parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); fetch it again, or write it anew") from None
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(
                f"{path}: no list of objects '{name}'; expected COCO's form with images, annotations, categories"
            )
    return content


def _add_categories(
    entries: list[dict[str, Any]],
    categories: dict[int | str, dict[str, Any]],
    class_of: dict[int | str, str],
    path: Path,
) -> None:
    """Adds the categories of a file to `categories`, and the ids of their classes to `class_of`.

    The id of a class is the category's name, followed by its number if another category has the same name.
    """
    taken = set(class_of.values())
    for place, category in enumerate(entries):
        number = _id(category, "id", f"{path}: categories[{place}]")
        name = _text(category, "name", f"{path}: categories[{place}]")
        if number in categories:
            known = categories[number]
            if other := sorted(key for key in {*category, *known} if category.get(key) != known.get(key)):
                raise DataError(
                    f"{path}: categories[{place}]: category {number} ('{name}') has another {', '.join(other)} than where it "
                    "comes first, here or in the other split's file; use files of one year, and an id for each category"
                )
            continue
        categories[number] = category
        class_of[number] = f"{name} #{number}" if name in taken else name
        taken.add(class_of[number])


def _list_images(
    content: dict[str, list[dict[str, Any]]],
    split: SplitName,
    class_of: dict[int | str, str],
    group_field: str | None,
    path: Path,
) -> list[Item]:
    """The images with an annotation, in the order of the file."""
    labels_of = _read_labels(content["annotations"], class_of, path)
    if group_field is not None and not any(group_field in image for image in content["images"]):
        raise ConfigError(f"data.split.group={group_field}: no such field in the images of {path}")
    items = []
    numbers: set[int | str] = set()
    for place, image in enumerate(content["images"]):
        number = _id(image, "id", f"{path}: images[{place}]")
        if number in numbers:  # which of the two images the annotations mean could not be told
            raise DataError(
                f"{path}: images[{place}] has the id {number}, as one before it; give each image its own, in the annotations, too"
            )
        numbers.add(number)
        name = _text(image, "file_name", f"{path}: images[{place}]")
        if not has_image_extension(name):
            raise DataError(f"{path}: images[{place}] is '{name}', expected .{', .'.join(IMAGE_EXTENSIONS)}")
        labels = labels_of.pop(number, None)
        if labels is not None:
            group = image.get(group_field)
            key = key_of_path(os.path.normpath(name))  # a file is one image, however its path is written
            items.append(Item(key, labels, name, split, None if group in (None, "") else str(group)))  # 0 is a group
    if labels_of:
        raise DataError(
            f"{path}: an annotation has the image_id {next(iter(labels_of))}, which is no image; fetch the file again"
        )
    return items


def _read_labels(
    annotations: list[dict[str, Any]], class_of: dict[int | str, str], path: Path
) -> dict[int | str, tuple[str, ...]]:
    """The class ids of each image, by the image's number."""
    labels_of: dict[int | str, tuple[str, ...]] = {}
    for place, annotation in enumerate(annotations):
        image, category = (
            _id(annotation, name, f"{path}: annotations[{place}]") for name in ("image_id", "category_id")
        )
        if category not in class_of:
            raise DataError(
                f"{path}: annotations[{place}] has the category {category}, which is none; fetch the file again"
            )
        labels_of[image] = tuple(dict.fromkeys((*labels_of.get(image, ()), class_of[category])))
    return labels_of


def _text(entry: dict[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: '{name}' is {value!r}, expected a text that is not empty")
    return value


def _id(entry: dict[str, Any], name: str, where: str) -> int | str:
    value = entry.get(name)
    if not isinstance(value, int | str):
        raise DataError(f"{where}: '{name}' is {value!r}, expected a number; fetch the file again")
    return value
