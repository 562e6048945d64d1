"""A cache of remote shards on the local disk, shared by all processes of a machine, with a bound on its size.

Shards are fetched whole and checked against their index. An entry is named by the digest of the index, so a shard that was
replaced at its source is never mistaken for the one that was indexed. The process that fetches a shard holds a lock, which the
operating system releases if the process dies; all others wait for the entry.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from concentration.data.index import ShardIndex
from concentration.data.remote import Remote, WrongContentError
from concentration.data.split import Split
from concentration.errors import ConfigError, DataError
from concentration.files import write_atomically
from concentration.schema import Config, flatten, parse_config

#: The file beside the indices that says how the shards they describe are reached.
ACCESS_FILE = "access.json"

#: The environment variable that names the cache's folder, if `data.cache.directory` does not.
DIRECTORY_VARIABLE = "CONCENTRATION_CACHE"

_POLL_SECONDS = 0.02
_ENTRY = re.compile(r"[0-9a-f]{32}\.shard")
_TEMPORARY = re.compile(r"\.([0-9a-f]{32})\.(\d+)\.tmp")
_ROOM = "room"


class CacheConfig(Config):
    """The cache of remote shards on this machine.

    directory: its folder, which runs may share; None takes $CONCENTRATION_CACHE, or else `cache` in the working directory.
    gib: the most that all copies together may take, in GiB.
    connections: how many shards a process fetches at the same time.
    retries: how often a request is tried again, after growing waits, if it failed for a reason that may pass.
    timeout_seconds: how long a server may be silent.
    """

    directory: Path | None = None
    gib: pydantic.PositiveFloat = 64
    connections: pydantic.PositiveInt = 4
    retries: pydantic.NonNegativeInt = 5
    timeout_seconds: pydantic.PositiveFloat = 60


class Access(Config):
    """How remote shards are reached. It may change without changing what the data is.

    storage_options: arguments of fsspec's file system. They are written to disk and must hold no secrets; those come from the
    environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a role, ~/.netrc with `client_kwargs: {trust_env: true}`).
    """

    secret_words: ClassVar[frozenset[str]] = frozenset(
        {"authorization", "cookies", "credential", "credentials", "key", "login", "password", "sas", "secret", "token"}
    )

    cache: CacheConfig = CacheConfig()
    storage_options: dict[str, Any] | None = None

    @pydantic.field_validator("storage_options", mode="after")
    @classmethod
    def _check_secrets(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in flatten(options or {}):
            if cls.secret_words & set(re.split(r"[^a-z]+", name.lower())):
                # The message leaves the value out, since it goes into logs.
                raise ValueError(
                    f"storage_options.{name} would be written to disk; use the environment's credentials instead"
                )
        return options

    def build_remote(self) -> Remote:
        return Remote(self.cache.retries, self.cache.timeout_seconds, self.storage_options or {})

    def build_cache(self, workdir: Path) -> "ShardCache":
        directory = self.cache.directory or Path(os.environ.get(DIRECTORY_VARIABLE, workdir / "cache"))
        bound_bytes = int(self.cache.gib * 2**30)
        return ShardCache(directory.absolute(), bound_bytes, self.cache.connections, self.build_remote())


def save_access(access: Access, directory: Path) -> None:
    """Records in the folder of the indices how their shards are reached."""
    write_atomically(directory / ACCESS_FILE, access.model_dump(mode="json"))


def load_cache(split: Split) -> "ShardCache | None":
    """The cache through which the shards of a split are read; None if they lie on this machine.

    Raises:
        DataError: the record of how they are reached (`save_access`) is missing or damaged.
    """
    if not split.is_remote:
        return None
    path = split.directory / ACCESS_FILE
    try:
        access = parse_config(Access, json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, ConfigError) as error:
        raise DataError(
            f"{path}: missing or damaged ({error}); run the same `concentrate prepare` again, which writes it"
        ) from None
    return access.build_cache(split.directory.parent)


@dataclass(frozen=True)
class ShardCache:
    """Copies of remote shards that together take at most `bound_bytes`; the least recently used are removed first.

    Attributes:
        directory: the folder of the copies.
        bound_bytes: the most that all copies, and downloads that are under way, may take.
        connections: how many shards a process should fetch at the same time.
        remote: how shards are reached.

    Raises:
        ConfigError: the directory cannot be used, or a shard is larger than the bound.
        DataError: a shard cannot be fetched, or is not the one that was indexed.
    """

    directory: Path
    bound_bytes: int
    connections: int
    remote: Remote

    def open(self, shard: ShardIndex) -> int:
        """A file descriptor of the shard's copy, which is fetched if it is not there.

        The descriptor stays readable when the copy is removed from the cache.
        """
        name = shard.digest[:32]

        def find_or_fetch() -> int:
            # Another process may have fetched it while this one waited for the lock.
            with contextlib.suppress(FileNotFoundError):
                return self._open_entry(name)
            return self._fetch(name, shard.path, shard.size_bytes, lambda path: _verify(path, shard))[0]

        with contextlib.suppress(FileNotFoundError):
            return self._open_entry(name)
        return self._alone(name, find_or_fetch)

    def fetch(self, shard: ShardIndex) -> None:
        """Makes sure that the shard's copy is there, and marks it as just used."""
        os.close(self.open(shard))

    def admit(self, url: str, index: Callable[[Path], ShardIndex]) -> ShardIndex:
        """Fetches a shard that has no index yet, builds its index by `index`, and keeps the copy under the index's digest."""
        name = hashlib.sha256(url.encode()).hexdigest()[:32]
        file, shard = self._alone(name, lambda: self._fetch(name, url, self.remote.size(url), index))
        os.close(file)
        return shard

    def discard(self, shard: ShardIndex) -> None:
        """Removes a copy that was damaged on the disk."""
        (self.directory / f"{shard.digest[:32]}.shard").unlink(missing_ok=True)

    def _open_entry(self, name: str) -> int:
        """A file descriptor of an entry. Raises: FileNotFoundError if there is no such entry."""
        try:
            file = os.open(self.directory / f"{name}.shard", os.O_RDONLY)
            os.utime(file)  # entries are removed in the order of this time, the oldest first
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _describe_unusable(self.directory, error) from None
        return file

    def _fetch(
        self, name: str, url: str, size_bytes: int, check: Callable[[Path], ShardIndex]
    ) -> tuple[int, ShardIndex]:
        """Called by the holder of the lock `name`. The copy appears whole or not at all."""
        if size_bytes > self.bound_bytes:
            raise ConfigError(
                f"{url}: {size_bytes} bytes, more than the cache may hold, {self.bound_bytes} (data.cache.gib="
                f"{self.bound_bytes / 2**30:g}); run `concentrate prepare` again with a larger data.cache.gib"
            )
        temporary = self.directory / f".{name}.{size_bytes}.tmp"
        try:
            temporary.unlink(missing_ok=True)  # left by a killed process
            self._alone(_ROOM, lambda: self._reserve(temporary, size_bytes))
            try:
                shard = self.remote.copy(url, temporary, check)
                file = os.open(temporary, os.O_RDONLY)  # before another process can make room of it
                os.replace(temporary, self.directory / f"{shard.digest[:32]}.shard")
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise _describe_unusable(self.directory, error) from None
        return file, shard

    def _reserve(self, temporary: Path, size_bytes: int) -> bool:
        """Reserves room for a download by creating a temporary file whose name has its size; evicts entries if need be.

        Returns False if downloads of other processes take so much now that there is no room.
        """
        taken_bytes, entries = size_bytes, []
        for found in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                if match := _TEMPORARY.fullmatch(found.name):
                    taken_bytes += int(match[2]) if self._is_in_flight(match[1], Path(found.path)) else 0
                elif _ENTRY.fullmatch(found.name):
                    state = found.stat()
                    entries.append((state.st_mtime_ns, state.st_size, Path(found.path)))
        if taken_bytes > self.bound_bytes:
            return False
        taken_bytes += sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if taken_bytes <= self.bound_bytes:
                break
            path.unlink(missing_ok=True)
            taken_bytes -= size
        temporary.touch()
        return True

    def _is_in_flight(self, name: str, temporary: Path) -> bool:
        """Whether a process is writing this temporary file. If none is, a killed process left it, and it is removed."""
        with self._try_lock(name) as is_ours:
            if is_ours:
                temporary.unlink(missing_ok=True)
            return not is_ours

    def _alone(self, name: str, action: Callable[[], Any]) -> Any:
        """Calls `action` while holding the lock `name`, which no other thread or process holds then, and returns its result.

        If `action` returns False, the lock is released for a moment and `action` is called again.
        """
        while True:
            with self._try_lock(name) as is_ours:
                if is_ours and (result := action()) is not False:
                    return result
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        """Tries to take a lock without waiting; gives whether it is held now, and releases it at the end.

        NOTE: the locks are POSIX record locks (`lockf`). `flock` would not do: children inherit its locks and go on holding them.
        Nobody waits inside the kernel, since it reports a deadlock when threads of two processes wait for each other's locks.
        Record locks belong to a process, so a lock of this process's own keeps its threads apart.
        """
        among_threads = _THREAD_LOCKS.setdefault((os.getpid(), self.directory, name), threading.Lock())
        if not among_threads.acquire(blocking=False):
            yield False
            return
        try:
            place = 0 if name == _ROOM else 1 + int(name[:15], 16)
            file = _open_lock_file(self.directory)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise ConfigError(
                    f"{self.directory}: cannot be locked ({error.strerror}); give a data.cache.directory with file locks"
                ) from None
            try:
                yield True
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
        finally:
            among_threads.release()


# The key has the process id, since a fork copies a lock in its held state, but not the thread that would release it.
_THREAD_LOCKS: dict[tuple[int, Path, str], threading.Lock] = {}

# NOTE: one descriptor per directory, which is never closed: closing any descriptor of a file releases all of the process's record
# locks on that file.
_LOCK_FILES: dict[Path, int] = {}


def _open_lock_file(directory: Path) -> int:
    # A file without links was removed, with the whole directory perhaps.
    if directory not in _LOCK_FILES or os.fstat(_LOCK_FILES[directory]).st_nlink == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _LOCK_FILES[directory] = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _describe_unusable(directory, error) from None
    return _LOCK_FILES[directory]


def _describe_unusable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{directory}: cannot be used ({error.strerror}); free space, or give another data.cache.directory or "
        f"${DIRECTORY_VARIABLE}"
    )


def _verify(path: Path, shard: ShardIndex) -> ShardIndex:
    """Returns `shard` if the file is the one that was indexed. Raises: WrongContentError if it is not."""
    found_bytes = path.stat().st_size
    if found_bytes != shard.size_bytes:
        raise WrongContentError(f"{found_bytes} bytes, but {shard.size_bytes} when it was indexed")
    with open(path, "rb") as file:
        for row in range(shard.num_samples):
            file.seek(int(shard.image_offset[row]))
            if zlib.crc32(file.read(int(shard.image_size[row]))) != int(shard.image_crc32[row]):
                raise WrongContentError(f"the image of '{shard.keys[row]}' is not the one that was indexed")
    return shard
