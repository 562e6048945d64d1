"""The interface of a source of images, from which `prepare` writes shards in parallel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from concentration.data.split_assignment import SplitConfig, SplitName
from concentration.taxonomy import Taxonomy, TaxonomyClass


@dataclass(frozen=True, slots=True)
class Item:
    """One sample of a source.

    Attributes:
        key: its key, which is unique in the source and the same each time the source is listed.
        labels: the ids of its classes.
        locator: what `Source.read` needs to find its image.
        split: the split that the source puts it into; "train" if the source has no splits. From these samples `prepare` takes the
            splits that the source lacks.
        group: the name of the group of samples that must stay in one split; None if it is not known.
    """

    key: str
    labels: tuple[str, ...]
    locator: Any
    split: SplitName = "train"
    group: str | None = None


class Source(Protocol):
    """Lists all samples in one process, and reads the image of any sample in any process: a source is pickled for workers.

    Attributes:
        split: how the splits that the source lacks are taken from its training samples.
        is_compact: whether images have only some hundred bytes, so that they should be written to packs instead of tars.
    """

    split: SplitConfig
    is_compact: bool

    def build_taxonomy(self) -> Taxonomy:
        """The classes of this source."""

    def list_classes(self) -> Sequence[TaxonomyClass]:
        """The same, for a taxonomy that has other classes besides: one may be the only class of a vertical here."""

    def list_items(self) -> list[Item]:
        """All samples, in an order that is the same for each call."""

    def list_notes(self) -> list[str]:
        """A sentence for the user on everything that listing left out or had to decide."""

    def fetch(self) -> None:
        """Fetches what `read` needs and this machine lacks. It is called once, before any image is read.

        Raises:
            DataError: something cannot be fetched.
        """

    def read(self, item: Item) -> tuple[str, bytes]:
        """The file extension ("png", "jpg", "webp") and the encoded image of one sample.

        Raises:
            DataError: the image cannot be read.
        """


class LocalSource:
    """What sources have in common whose images are on this machine, or are drawn with installed software."""

    is_compact = False

    def list_classes(self) -> Sequence[TaxonomyClass]:
        return self.build_taxonomy().classes

    def fetch(self) -> None:
        """There is nothing to fetch."""
