"""Fetches remote shards before they are read. Since the order is known, the next shards are fetched while these are in use."""

import queue
import threading

from concentration.data.order import Order, Stretch
from concentration.data.shard_cache import ShardCache
from concentration.data.split import Split
from concentration.errors import ConfigError, DataError


class Prefetch:
    """Fetches the shards of the stretch that is being read, and of the stretch after it, in daemon threads.

    The threads run in the process that owns the loader. The loader's workers find the files in the cache, or wait for them.

    Args:
        split, order: the samples, and the order in which they are read.
        cache: the cache that the shards are fetched into.
        end: (epoch, place) at which reading ends.
    """

    def __init__(self, split: Split, order: Order, cache: ShardCache, end: tuple[int, int]):
        self._split = split
        self._order = order
        self._cache = cache
        self._end = end
        self._known_until = (-1, 0)
        self._turn = 0  # the number of the stretch that is being read
        self._queue: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._is_over = False
        for _ in range(cache.connections):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def advance(self, epoch: int, place: int) -> None:
        """Tells the threads that everything before this place has been read."""
        if (epoch, place) < self._known_until:
            return
        self._turn += 1
        here = self._ask_for(epoch, place, self._turn)
        after = (epoch, here.stop) if here.stop < len(self._order) else (epoch + 1, 0)
        self._known_until = after
        if after < self._end:
            self._ask_for(*after, self._turn + 1)

    def stop(self) -> None:
        """Starts no further fetch. Fetches that are under way go on, but do not keep the process from ending."""
        self._is_over = True
        for _ in range(self._cache.connections):
            self._queue.put(None)

    def _ask_for(self, epoch: int, place: int, turn: int) -> Stretch:
        stretch = self._order.stretch_at(epoch, place, self._split.shard_start)
        for shard in stretch.shards:
            self._queue.put((turn, shard))
        return stretch

    def _work(self) -> None:
        while (asked := self._queue.get()) is not None and not self._is_over:
            turn, number = asked
            if turn < self._turn:  # its stretch has been read; fetching it now would only evict shards that are needed
                continue
            try:
                self._cache.fetch(self._split.shards[number])
            except (ConfigError, DataError):
                # The reader that needs the shard tries again, and reports why it cannot be fetched.
                continue


def check_room(split: Split, order: Order, cache: ShardCache) -> None:
    """Raises: ConfigError if the cache cannot hold the shards that are read together and those that are fetched meanwhile."""
    num_shards = len(order.stretch_at(0, 0, split.shard_start).shards)
    largest_bytes = int(split.shard_bytes.max())
    needed_bytes = min(2 * num_shards * largest_bytes, int(split.shard_bytes.sum()))
    if needed_bytes > cache.bound_bytes:
        raise ConfigError(
            f"{cache.directory}: may hold {cache.bound_bytes / 2**30:.3g} GiB (data.cache.gib), but {num_shards} shards are "
            f"read at a time and as many fetched meanwhile, the largest of {largest_bytes / 2**20:.4g} MiB: that is "
            f"{needed_bytes / 2**30:.3g} GiB; run `concentrate prepare` again with a larger data.cache.gib, or lower "
            "trainer.window_shards"
        )
