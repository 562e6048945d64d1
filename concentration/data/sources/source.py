"""What a source of images must offer so that `prepare` can write shards from it in parallel."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from concentration.taxonomy import Taxonomy

SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be written: its key, unique in its split, the ids of its classes, and what `read` needs to find it."""

    key: str
    labels: tuple[str, ...]
    locator: Any


class Source(Protocol):
    """Lists samples cheaply in one process, and reads each of them in any process (a source is pickled to the workers)."""

    def build_taxonomy(self) -> Taxonomy:
        """The classes of this source."""

    def list_items(self, split: Split) -> list[Item]:
        """All samples of a split, in an order that does not change from one call to the next."""

    def read(self, item: Item) -> tuple[str, bytes]:
        """The file extension ("png", "jpg", "webp") and the encoded image of one sample.

        Raises: DataError where the image cannot be had.
        """
