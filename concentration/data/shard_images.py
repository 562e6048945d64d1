"""Reads the encoded images of indexed shards, each compared with its checksum in the index."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from concentration.data.index import ShardIndex
from concentration.data.shard_cache import ShardCache
from concentration.errors import DataError

#: So many shards stay open.
_MAX_OPEN = 256


class ShardImages:
    """Reads encoded images of these shards.

    It keeps shards open. Pickled for a worker process, it opens them there again.

    Args:
        shards: the shards' indices.
        cache: the cache through which remote shards are read; None if the shards lie on this machine.
    """

    def __init__(self, shards: Sequence[ShardIndex], cache: ShardCache | None):
        self._shards = shards
        self._cache = cache
        self._files: dict[int, int] = {}

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __del__(self):
        for file in self._files.values():
            os.close(file)

    def read(self, number: int, row: int, offset: int, size: int, crc32: int) -> bytes:
        """The bytes of an image.

        Args:
            number: the place of the shard among the shards.
            row: the image's place in the shard.
            offset, size, crc32: what the index says of the image. A caller that reads many looks them up at once.

        Raises:
            DataError: the shard cannot be read or fetched, or its content has changed since it was indexed.
        """
        content, error = self._read_unchecked(number, offset, size)
        if self._cache is not None and zlib.crc32(content) != crc32:
            # The copy was checked when it was fetched, so it was damaged on this disk since: it is fetched again.
            self._discard_copy(number)
            content, error = self._read_unchecked(number, offset, size)
        if error is None and zlib.crc32(content) == crc32:
            return content
        shard = self._shards[number]
        if self._cache is not None:
            raise DataError(
                f"{self._cache.directory}: its copy of {shard.path} is damaged again, just after it was fetched anew; look after "
                "that disk, or run `concentrate prepare` again with another data.cache.directory"
            )
        if error is not None:
            raise DataError(f"{shard.path}: cannot be read ({error.strerror}); bring it back")
        if len(content) != size:
            raise DataError(
                f"{shard.path}: ends inside the sample '{shard.keys[row]}'; the shard changed while it was read: "
                "bring it back and run the same command again"
            )
        raise DataError(
            f"{shard.path}: the image of '{shard.keys[row]}' is not the one that was indexed; the shard was replaced or damaged: "
            "bring it back and run the same command again, or prepare again"
        )

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
                self._cache.discard(self._shards[number])
            os.close(file)

    def _open(self, number: int) -> int:
        """A file descriptor of the shard."""
        if number not in self._files:
            if self._cache is not None:
                self._close_evicted()
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            shard = self._shards[number]
            self._files[number] = (
                os.open(shard.path, os.O_RDONLY) if isinstance(shard.path, Path) else self._cache.open(shard)
            )
        return self._files[number]

    def _close_evicted(self) -> None:
        """Closes copies that the cache has removed, since an open file still takes disk space."""
        for number, file in list(self._files.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(number))
