"""Reads samples by ordinal: reads an image's bytes in its shard, decodes a view of it, and looks up its targets.

Shapes: B samples that are read together.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from concentration.data.decoding import UNDECODABLE, decode_shrunk, describe_undecodable
from concentration.data.sample_targets import LabelTargets, SampleTargets
from concentration.data.shard_cache import ShardCache, load_cache
from concentration.data.shard_images import ShardImages
from concentration.data.split import Split
from concentration.data.views import CentreView, View, ViewConfig, Views, decode_view, draw_views
from concentration.packed_targets import VIEW_BYTES
from concentration.targets import SoftTargets

#: Encoded images are read in a row until they have so many bytes, and then decoded: see `SampleReader.read`.
_READ_TOGETHER_BYTES = 2**18


class ReadSamples(NamedTuple):
    """What a reader gives for B samples; `loader.Batch` describes the fields."""

    images: Tensor
    targets: SoftTargets
    skipped_B: Tensor
    view_BV: Tensor
    random_BR: Tensor
    is_grey_B: Tensor


class Reader(Protocol):
    """Reads samples by ordinal, also inside worker processes.

    Attributes:
        split: the split of the samples.
        cache: the cache of remote shards; None if no remote shard is read.
    """

    split: Split
    cache: ShardCache | None

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """The samples' images and targets in this epoch."""


class SampleReader:
    """Reads and decodes samples by ordinal.

    Args:
        split: the split of the samples.
        targets: gives the targets of the samples.
        image_size: the side of the images in pixels.
        views: how views are drawn, if the targets do not belong to stored views; None takes the centre view.
        seed: the seed of drawn views.

    Raises:
        DataError: a shard cannot be read or fetched, or has changed since it was indexed.
    """

    def __init__(self, split: Split, targets: SampleTargets, image_size: int, views: ViewConfig | None, seed: int):
        self.split = split
        self._targets = targets
        self._image_size = image_size
        self._views = views
        self._seed = seed
        #: None if the shards lie on this machine.
        self.cache = load_cache(split)
        self._images = ShardImages(split.shards, self.cache)

    def read(self, ordinals: np.ndarray, epoch: int) -> ReadSamples:
        """The samples' images and targets in this epoch."""
        size = self._image_size
        # Channels last in memory, as decoders give them: of small images, only decoding takes longer than a transposing copy.
        images = np.empty((len(ordinals), size, size, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
        views = self.choose_views(ordinals, epoch)
        seen: list[View | None] = []
        is_grey_B = np.ones(len(ordinals), dtype=bool)
        # NOTE: decoding evicts everything else from the processor's caches, so that code between two decodings takes several
        # times as long as alone. Hence this loop does as little as possible, and several images are read in a row.
        for row, content in enumerate(self._read_stretches(ordinals)):
            try:
                images[row], view, is_grey_B[row] = decode_view(content, views, row, size)
            except UNDECODABLE:
                images[row], view = 0, None
            seen.append(view)
        skipped_B = np.array([view is None for view in seen], dtype=bool)
        records = b"".join(bytes(VIEW_BYTES) if view is None else view.encode() for view in seen)
        view_BV = np.frombuffer(bytearray(records), dtype=np.uint8).reshape(len(ordinals), VIEW_BYTES)
        images, skipped_B, view_BV, is_grey_B = map(torch.from_numpy, (images, skipped_B, view_BV, is_grey_B))
        return ReadSamples(images, self.lookup(ordinals, epoch), skipped_B, view_BV, view_BV[:, :0], is_grey_B)

    def lookup(self, ordinals: np.ndarray, epoch: int) -> SoftTargets:
        """The targets of these samples, without their images."""
        return self._targets.lookup(ordinals, epoch)

    def choose_views(self, ordinals: np.ndarray, epoch: int) -> Views:
        """The stored views that the targets belong to; views drawn for this epoch if the targets hold for any view."""
        if stored := self._targets.views(ordinals, epoch):
            return stored
        return CentreView() if self._views is None else draw_views(self._views, self._seed, epoch, ordinals)

    def read_encoded(self, ordinal: int) -> bytes:
        """The image's bytes as they lie in the shard."""
        return next(self._read_stretches(np.array([ordinal])))

    def _read_stretches(self, ordinals: np.ndarray) -> Iterator[bytes]:
        """Yields the encoded images in turn. Several are read in a row, up to about `_READ_TOGETHER_BYTES`."""
        contents, num_bytes = [], 0
        for place in self._locate(ordinals):
            contents.append(self._images.read(*place))
            num_bytes += len(contents[-1])
            if num_bytes >= _READ_TOGETHER_BYTES:
                yield from contents
                contents, num_bytes = [], 0
        yield from contents

    def _locate(self, ordinals: np.ndarray) -> list[list[int]]:
        """For each sample: the number of its shard, its row there, and its image's offset, size and checksum."""
        numbers = np.searchsorted(self.split.shard_start, ordinals, side="right") - 1
        rows = ordinals - self.split.shard_start[numbers]
        places = np.empty((len(ordinals), 5), dtype=np.int64)
        places[:, 0], places[:, 1] = numbers, rows
        for number in set(numbers.tolist()):
            shard, of_shard = self.split.shards[number], numbers == number
            for column, values in enumerate((shard.image_offset, shard.image_size, shard.image_crc32), start=2):
                places[of_shard, column] = values[rows[of_shard]]
        return places.tolist()


def explain_skipped(split: Split, ordinal: int) -> str:
    """Says why the image of a sample was skipped. To find out it is decoded again: a reader only reports that it was skipped.

    Raises:
        DataError: as `SampleReader`.
    """
    reader = SampleReader(split, LabelTargets(split, smear=False), image_size=1, views=None, seed=0)
    try:
        decode_shrunk(reader.read_encoded(ordinal), shorter_side=1)
    except UNDECODABLE as error:
        return describe_undecodable(error)
    return "cannot be seen in its stored views (it could not be decoded when they were drawn)"
