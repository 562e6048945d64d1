"""Reads samples by ordinal: reads and checks an image's bytes in its shard, decodes a view of it, and looks up its targets.

Shapes: B samples that are read together.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from concentration.data.decoding import UNDECODABLE, decode_shrunk, describe_undecodable
from concentration.data.index import ShardIndex
from concentration.data.sample_targets import LabelTargets, SampleTargets
from concentration.data.shard_cache import ShardCache, load_cache
from concentration.data.split import Split
from concentration.data.views import CentreView, View, ViewConfig, Views, decode_view, draw_views
from concentration.errors import DataError
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

    It keeps shards open. Pickled for a worker process, it opens them there again.

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
        self._files: dict[int, int] = {}

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __del__(self):
        for file in self._files.values():
            os.close(file)

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
            contents.append(self._read_at(*place))
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

    def _read_at(self, number: int, row: int, offset: int, size: int, crc32: int) -> bytes:
        """The bytes of an image, whose size and checksum must be those that `_locate` gave.

        Raises:
            DataError: the shard cannot be read, or its content has changed.
        """
        content, error = self._read_unchecked(number, offset, size)
        if self.cache is not None and zlib.crc32(content) != crc32:
            # The copy was checked when it was fetched, so it was damaged on this disk since: it is fetched again.
            self._discard_copy(number)
            content, error = self._read_unchecked(number, offset, size)
        if error is None and zlib.crc32(content) == crc32:
            return content
        shard = self.split.shards[number]
        if self.cache is not None:
            raise DataError(
                f"{self.cache.directory}: its copy of {shard.path} is damaged again, just after it was fetched anew; look after "
                "that disk, or run `concentrate prepare` again with another data.cache.directory"
            )
        if error is not None:
            raise DataError(f"{shard.path}: cannot be read ({error.strerror}); bring it back")
        if len(content) != size:
            raise DataError(
                f"{shard.path}: ends inside the sample '{shard.keys[row]}'; the shard changed while it was read: "
                "bring it back and run the same command again"
            )
        raise other_than_indexed(shard, row)

    def _read_unchecked(self, number: int, offset: int, size: int) -> tuple[bytes, OSError | None]:
        """The bytes at this place and None, or no bytes and the error that prevented reading them."""
        try:
            return os.pread(self._open(number), size, offset), None
        except OSError as error:
            return b"", error

    def _discard_copy(self, number: int) -> None:
        """Removes a damaged copy from the cache, unless another process has done so, and may have fetched it again."""
        if number in self._files:
            file = self._files.pop(number)
            if os.fstat(file).st_nlink > 0:
                self.cache.discard(self.split.shards[number])
            os.close(file)

    def _open(self, number: int) -> int:
        """A file descriptor of the shard. At most 256 stay open."""
        if number not in self._files:
            if self.cache is not None:
                self._close_evicted()
            if len(self._files) >= 256:
                os.close(self._files.pop(next(iter(self._files))))
            shard = self.split.shards[number]
            self._files[number] = (
                os.open(shard.path, os.O_RDONLY) if isinstance(shard.path, Path) else self.cache.open(shard)
            )
        return self._files[number]

    def _close_evicted(self) -> None:
        """Closes copies that the cache has removed, since an open file still takes disk space."""
        for number, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(number))


def other_than_indexed(shard: ShardIndex, row: int) -> DataError:
    """The error for an image that its checksum in the index is not of."""
    return DataError(
        f"{shard.path}: the image of '{shard.keys[row]}' is not the one that was indexed; the shard was replaced or damaged: "
        "bring it back and run the same command again, or prepare again"
    )


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
