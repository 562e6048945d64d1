"""What a source of images must offer so that `prepare` can write shards from it in parallel."""

from dataclasses import dataclass
from typing import Any, Protocol

from concentration.data.split_assignment import SplitConfig, SplitName
from concentration.taxonomy import Taxonomy


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be written.

    Attributes:
        key: unique in the source, and the same whenever the source is listed.
        labels: ids of its classes.
        locator: what `read` needs to find it.
        split: the source's own; "train" where it has none, or none of this name: those are cut off the training samples.
        group: what it has in common with samples that must not lie in another split; None where nothing is known.
    """

    key: str
    labels: tuple[str, ...]
    locator: Any
    split: SplitName = "train"
    group: str | None = None


class Source(Protocol):
    """Lists samples cheaply in one process, and reads each of them in any process (a source is pickled to the workers).

    Attributes:
        split: how the splits that the source has not are cut off its training samples.
        is_compact: whether its images are so small, some hundred bytes, that they are written in packs instead of tars.
    """

    split: SplitConfig
    is_compact: bool

    def build_taxonomy(self) -> Taxonomy:
        """The classes of this source."""

    def list_items(self) -> list[Item]:
        """All samples, in an order that does not change from one call to the next."""

    def list_notes(self) -> list[str]:
        """A sentence on each thing that the listing left out or decided for the user."""

    def fetch(self) -> None:
        """Brings what `read` needs and is not on this machine; called once, before anything is read.

        Raises: DataError where it cannot be had.
        """

    def read(self, item: Item) -> tuple[str, bytes]:
        """The file extension ("png", "jpg", "webp") and the encoded image of one sample.

        Raises: DataError where the image cannot be had.
        """


class LocalSource:
    """The two answers of sources whose images lie on this machine, or are drawn from what is installed."""

    is_compact = False

    def fetch(self) -> None:
        """There is nothing to fetch."""
