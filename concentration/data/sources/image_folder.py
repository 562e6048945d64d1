"""`data=image_folder`: a folder per class, or a folder per vertical with folders of classes in it, as deep as the tree is."""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from concentration.data.shard_members import IMAGE_EXTENSIONS
from concentration.data.sources.source import SPLITS, Item, Split
from concentration.data.views import UNDECODABLE, Share, ViewConfig, open_image
from concentration.errors import DataError
from concentration.schema import Config
from concentration.taxonomy import Taxonomy, TaxonomyClass


class ImageFolderConfig(Config):
    """Where the images lie and how they are split.

    path: holds CLASS/IMAGE, or VERTICAL/CLASS/IMAGE; deeper folders are subclasses of the ones above them. Or it holds
        `train`, and perhaps `val` and `test`, with such folders inside. Links are followed.
    taxonomy: a taxonomy.json whose class ids are the folders' paths (CLASS or VERTICAL/CLASS); None takes the tree itself.
    val_share, test_share: the shares of images that a hash of their path sends to splits that have no folder.
    image_size: of the networks' input; shards keep images as they are.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"path"})

    kind: Literal["image_folder"] = "image_folder"
    path: Path
    taxonomy: Path | None = None
    val_share: Share = 0.1
    test_share: Share = 0.1
    image_size: pydantic.PositiveInt = 224
    view: ViewConfig = ViewConfig()


class ImageFolderSource:
    """Implements `Source` over a tree of folders.

    Raises:
        DataError: there is no image, images lie beside folders of classes, a folder cannot be read, or a name is hidden or
            not UTF-8.
    """

    def __init__(self, config: ImageFolderConfig):
        self._config = config

    def build_taxonomy(self) -> Taxonomy:
        ids = sorted({item.labels[0] for split in SPLITS for item in self.list_items(split)})
        if self._config.taxonomy is not None:
            taxonomy = Taxonomy.load(self._config.taxonomy)
            for class_id in ids:
                if class_id not in taxonomy.position:
                    raise DataError(
                        f"{self._config.path}/{class_id}: no class '{class_id}' in {self._config.taxonomy}; "
                        "rename the folder or add the class"
                    )
            return taxonomy
        if all("/" not in class_id for class_id in ids):
            classes = [TaxonomyClass(class_id, class_id, (), "all") for class_id in ids]
        else:
            classes = self._classes_from_tree(ids)
        return Taxonomy(classes, str(self._config.path))

    def list_items(self, split: Split) -> list[Item]:
        return [item for owner, item in self._all_items if owner == split]

    def read(self, item: Item) -> tuple[str, bytes]:
        """The file as it is, after a look whether it can be decoded."""
        path = Path(item.locator)
        try:
            content = path.read_bytes()
            open_image(content).load()
        except UNDECODABLE as error:
            raise DataError(f"{path}: cannot be decoded ({error})") from None
        return path.suffix[1:].lower(), content

    @functools.cached_property
    def _all_items(self) -> list[tuple[str, Item]]:
        root = self._config.path
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; give data.path=FOLDER with a folder per class or per vertical")
        given = [split for split in SPLITS if (root / split).is_dir()] if (root / "train").is_dir() else []
        found = []
        for top in given or [""]:
            for path in sorted(_list_images(root / top)):
                relative = path.relative_to(root / top)
                split = self._choose_split(relative, given, top)
                found.append((split, Item(_key(path.relative_to(root)), (relative.parent.as_posix(),), str(path))))
        if not found:
            raise DataError(f"{root}: no images; expected CLASS/IMAGE.jpg or VERTICAL/CLASS/IMAGE.jpg (.png, .webp)")
        for _, item in found:
            if item.labels[0] == ".":
                raise DataError(f"{item.locator}: lies in no class's folder; move it into one")
        return found

    def _choose_split(self, relative: Path, given: list[str], top: str) -> str:
        if top in ("val", "test"):
            return top
        bits = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8], "big") / 2**64
        test_share = 0 if "test" in given else self._config.test_share
        val_share = 0 if "val" in given else self._config.val_share
        return "test" if bits < test_share else "val" if bits < test_share + val_share else "train"

    def _classes_from_tree(self, ids: list[str]) -> list[TaxonomyClass]:
        """The folders below each vertical: a folder is the parent of the folders in it."""
        classes: dict[str, TaxonomyClass] = {}
        for class_id in ids:
            parts = class_id.split("/")
            if len(parts) == 1:
                raise DataError(
                    f"{self._config.path}/{class_id}: images lie beside the folders of other verticals' classes; "
                    "move them into a class's folder, VERTICAL/CLASS/IMAGE"
                )
            for depth in range(2, len(parts) + 1):
                inner, parent = "/".join(parts[:depth]), "/".join(parts[: depth - 1])
                parents = (parent,) if depth > 2 else ()
                classes.setdefault(inner, TaxonomyClass(inner, parts[depth - 1], parents, parts[0]))
        return list(classes.values())


def _list_images(top: Path) -> Iterator[Path]:
    """All images below a folder, also behind links; hidden files, which macOS and editors leave, are none."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); correct its permissions")

    for folder, inner, files in os.walk(top, onerror=refuse, followlinks=True):
        # A link to a folder above would be followed for ever.
        real = os.path.realpath(folder)
        inner[:] = [name for name in inner if not f"{real}/".startswith(f"{os.path.realpath(f'{folder}/{name}')}/")]
        for name in files:
            path = Path(folder, name)
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                _check_names(path, top)
                yield path


def _check_names(path: Path, top: Path) -> None:
    relative = path.relative_to(top)
    if any(part.startswith(".") for part in relative.parts):
        raise DataError(f"{path}: lies in a hidden folder; rename the folder, or remove it if it is no class")
    try:
        relative.as_posix().encode()
    except UnicodeEncodeError:
        raise DataError(f"{top}: the name {relative.as_posix()!r} is not UTF-8; rename it") from None


def _key(relative: Path) -> str:
    """A key that WebDataset reads back whole: no dots, and unique through a hash of the path."""
    readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in relative.with_suffix("").as_posix())
    return f"{readable[-60:]}-{hashlib.sha256(relative.as_posix().encode()).hexdigest()[:12]}"
