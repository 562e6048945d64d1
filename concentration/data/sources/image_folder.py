"""`data=image_folder`: a folder for each class, or a folder for each vertical with folders of classes in it, to any depth."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from concentration.data.folders import walk_folders
from concentration.data.image_names import IMAGE_EXTENSIONS
from concentration.data.sources.image_files import ImageFilesConfig, classes_of_paths, key_of_path, read_image_file
from concentration.data.sources.source import Item, LocalSource
from concentration.data.split_assignment import SPLITS, SplitName, find_split
from concentration.errors import ConfigError, DataError
from concentration.taxonomy import Taxonomy, TaxonomyClass


class ImageFolderConfig(ImageFilesConfig):
    """Where the images lie and how they are split.

    path: a folder with CLASS/IMAGE or VERTICAL/CLASS/IMAGE; a deeper folder is a subclass of the one above it. Or a folder of
        splits with such folders inside: `train` (or `training`), and perhaps `val` (`valid`, `validation`, `dev`) and `test`
        (`testing`), in upper or lower case. A folder `train` is a split if it is the only folder or stands beside another split;
        otherwise it is a class or vertical. Links are followed. Files and folders whose names begin with a dot are left out.
    taxonomy: a taxonomy.json whose class ids are the folders' paths (CLASS or VERTICAL/CLASS); None takes the folders themselves.
    split: `split.group` is a regular expression that is searched in each path below `path`; its first group (in parentheses)
        names the group of the image.
    """

    runtime_fields: ClassVar[frozenset[str]] = ImageFilesConfig.runtime_fields | {"path"}

    kind: Literal["image_folder"] = "image_folder"
    path: Path
    taxonomy: Path | None = None

    @pydantic.model_validator(mode="after")
    def _check_group(self):
        if self.split.group is not None:
            try:
                groups = re.compile(self.split.group).groups
            except re.error as error:
                raise ValueError(f"data.split.group={self.split.group}: no regular expression ({error})") from None
            if groups == 0:
                raise ValueError(f"data.split.group={self.split.group}: has no parenthesis; put one around the group")
        return self


class ImageFolderSource(LocalSource):
    """The `Source` of a tree of folders.

    Raises:
        ConfigError: `split.group` does not match an image's path.
        DataError: there is no image, images lie beside folders of classes, a folder cannot be read, or a name is not UTF-8.
    """

    def __init__(self, config: ImageFolderConfig):
        self._config = config
        self.split = config.split

    def __getstate__(self) -> dict[str, object]:
        return {"_config": self._config, "split": self.split}  # without the listing, which workers do not need

    def build_taxonomy(self) -> Taxonomy:
        if self._config.taxonomy is None:
            return Taxonomy(self.list_classes(), str(self._config.path))
        taxonomy = Taxonomy.load(self._config.taxonomy)
        for class_id in sorted(self._list_ids()):
            if class_id not in taxonomy.position:
                raise DataError(
                    f"{self._config.path}/{class_id}: no class '{class_id}' in {self._config.taxonomy}; "
                    "rename the folder or add the class"
                )
        return taxonomy

    def list_classes(self) -> Sequence[TaxonomyClass]:
        if self._config.taxonomy is not None:
            return super().list_classes()
        try:
            return classes_of_paths(self._list_ids())
        except ValueError as error:
            raise DataError(
                f"{self._config.path}/{error}: images lie beside the folders of other verticals' classes; "
                "move them into a class's folder, VERTICAL/CLASS/IMAGE"
            ) from None

    def _list_ids(self) -> set[str]:
        return {item.labels[0] for item in self.list_items()}

    def list_items(self) -> list[Item]:
        return self._listing[0]

    def list_notes(self) -> list[str]:
        return self._listing[1]

    def read(self, item: Item) -> tuple[str, bytes]:
        return read_image_file(Path(item.locator))

    @functools.cached_property
    def _listing(self) -> tuple[list[Item], list[str]]:
        root = self._config.path
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; give data.path=FOLDER with a folder per class or per vertical")
        tops = _find_splits(root)
        ignored: dict[str, int] = {}
        hidden: list[str] = []
        items = []
        for top, split in tops.items():
            for path in sorted(_list_images(root / top, ignored, hidden)):
                label = path.relative_to(root / top).parent.as_posix()
                relative = path.relative_to(root).as_posix()
                items.append(Item(key_of_path(relative), (label,), str(path), split, self._find_group(relative)))
        if not items:
            raise DataError(f"{root}: no images; expected CLASS/IMAGE.jpg or VERTICAL/CLASS/IMAGE.jpg (.png, .webp)")
        for item in items:
            if item.labels[0] == ".":
                raise DataError(f"{item.locator}: lies in no class's folder; move it into one")
        return items, [*_note_other_folders(root, tops), *_note_ignored(root, ignored), *_note_hidden(root, hidden)]

    def _find_group(self, relative: str) -> str | None:
        pattern = self._config.split.group
        if pattern is None:
            return None
        found = re.search(pattern, relative)
        if found is None or found[1] is None:
            raise ConfigError(
                f"data.split.group={pattern}: finds no group in '{relative}'; correct it, so that it finds one in every path"
            )
        return found[1]


def _find_splits(root: Path) -> dict[str, SplitName]:
    """The split of each folder of a split; if there are none, the root itself ("") is for training.

    A folder `train` may be a class. It is a split if it is the only folder, or stands beside another split.
    """
    folders = _list_folders(root)
    found = {name: split for name in folders if (split := find_split(name)) is not None}
    if "train" not in found.values() or len(found) == 1 < len(folders):
        return {"": "train"}
    for split in dict.fromkeys(found.values()):
        twice = [name for name, other in found.items() if other == split]
        if len(twice) > 1:
            raise DataError(f"{root}: holds {' and '.join(twice)}, which all mean {split}; keep one of these folders")
    return dict(sorted(found.items(), key=lambda folder: SPLITS.index(folder[1])))


def _note_other_folders(root: Path, tops: dict[str, SplitName]) -> list[str]:
    """Notes on folders that are called like a split but taken for a class, or that are not read since others are splits."""
    folders = _list_folders(root)
    if "" in tops:
        classes = [f"{name}/" for name in folders if find_split(name) == "train"]
        return [
            f"{root}: {name} is taken for a class or vertical, not for a split; for that, put a val/ or test/ beside it"
            for name in classes
        ]
    training = next(name for name, split in tops.items() if split == "train")
    others = [name for name in folders if name not in tops]
    return [f"{root}: folders beside {training}/ are not read: {', '.join(others)}"] if others else []


def _list_folders(root: Path) -> list[str]:
    """The sorted names of the folders in the root and of links to folders, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")


def _note_ignored(root: Path, ignored: dict[str, int]) -> list[str]:
    if not ignored:
        return []
    counts = ", ".join(f"{count} {extension or 'without any'}" for extension, count in sorted(ignored.items()))
    return [f"{root}: ignored files that are not .{', .'.join(IMAGE_EXTENSIONS)}: {counts}"]


def _note_hidden(root: Path, hidden: list[str]) -> list[str]:
    if not hidden:
        return []
    names = sorted(os.path.relpath(folder, root) for folder in hidden)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{root}: ignored hidden folders: {', '.join(names[:5])}{more}"]


def _list_images(top: Path, ignored: dict[str, int], hidden: list[str]) -> Iterator[Path]:
    """Yields all images below a folder, also behind links, but not hidden ones, which macOS and editors leave.

    Other files are counted in `ignored` by extension, and hidden folders are appended to `hidden`.
    """
    for folder, files in walk_folders(str(top), hidden):
        for name in files:
            path = Path(folder, name)
            extension = path.suffix.lower()
            if name.startswith("."):
                continue
            if extension[1:] in IMAGE_EXTENSIONS:
                _check_names(path, top)
                yield path
            else:
                ignored[extension] = ignored.get(extension, 0) + 1


def _check_names(path: Path, top: Path) -> None:
    """Raises: DataError if a name below `top` is not UTF-8, in which keys and classes are stored."""
    relative = path.relative_to(top)
    try:
        relative.as_posix().encode()
    except UnicodeEncodeError:
        raise DataError(f"{top}: the name {relative.as_posix()!r} is not UTF-8; rename it") from None
