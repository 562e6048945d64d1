"""Lists, measures, reads and copies files behind URLs through fsspec, and tries again if that may help."""

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec

from concentration.errors import FULL_DISK, ConfigError, DataError

#: A path on this machine, or a URL as a str, since a Path would turn `//` into `/`.
Location = Path | str

#: How long to wait before the second try, and the longest wait before any. Each wait is twice the one before, times a random
#: factor from 0.5 to 1.5.
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0

#: HTTP statuses below 500 after which another try may help: request timeout, too early, too many requests.
_PASSING_STATUS = (408, 425, 429)


T = TypeVar("T")


class WrongContentError(OSError):
    """A fetched file is not the one that was indexed: it was cut short on the way, or replaced at its source."""


def is_url(text: str) -> bool:
    return "://" in text


def parse_location(value: Any) -> Any:
    """A URL as it is, without a final slash, and any other text as a Path. What is not text is left to pydantic to refuse.

    Raises:
        ConfigError: the URL holds a name or password. Pydantic would show the URL in the message of a ValueError.
        ValueError: the URL is not that of a folder, to which file names can be added.
    """
    if not isinstance(value, str):
        return value
    if not is_url(value):
        return Path(value)
    if "::" in value:
        raise ValueError("a URL of several file systems; give one that can be opened directly")
    if "@" in urlsplit(value).netloc:
        raise ConfigError(
            "a URL of the data holds a name or password, which would be written to disk; use the environment's credentials"
        )
    if urlsplit(value).query and value.startswith("http"):
        raise ValueError("a URL with a query; give the address of a folder, to which file names are added")
    return value.rstrip("/")


def join(folder: Location, name: str) -> Location:
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


def name_of(location: Location) -> str:
    """The file name at the end of a location."""
    return location.name if isinstance(location, Path) else location.rpartition("/")[2]


@dataclass(frozen=True)
class Remote:
    """Access to remote files.

    Attributes:
        retries: how often a failed request is tried again.
        timeout_seconds: how long the server of an http or s3 URL may be silent before a try counts as failed.
        storage_options: the arguments of fsspec's file system.

    Raises:
        ConfigError: no file system for the URL is installed, or it does not take these options.
        DataError: a file cannot be fetched; the message has the URL, the last reason and the number of tries.
    """

    retries: int
    timeout_seconds: float
    storage_options: Mapping[str, Any]

    def glob(self, pattern: str) -> list[str]:
        """The URLs of all files that match the pattern."""
        names = self._try(pattern, lambda: self._call(pattern, "glob"))
        return [self._connect(pattern).unstrip_protocol(name) for name in names]

    def read(self, url: str) -> bytes:
        """The content of a small file."""
        return self._try(url, lambda: self._call(url, "cat_file"))

    def size(self, url: str) -> int:
        """The size of a file in bytes, as the server reports it."""
        size = self._try(url, lambda: self._call(url, "size"))
        if size is None:
            raise DataError(f"{url}: the server does not tell its size; serve it as a plain file")
        return size

    def copy(self, url: str, path: Path, check: Callable[[Path], T]) -> T:
        """Copies the file to `path`, and returns `check(path)`. A WrongContentError of `check` counts as a failed try.

        Raises:
            OSError: the disk is full; trying again would not help.
        """

        def fetch_and_check() -> T:
            self._call(url, "get_file", str(path))
            return check(path)

        return self._try(url, fetch_and_check)

    def _try(self, url: str, action: Callable[[], T]) -> T:
        """Calls `action` until it succeeds, fails for a reason that will not pass, or has failed 1 + `retries` times."""
        own, own_passing = _list_own_errors(url)
        for number in range(self.retries + 1):
            try:
                return action()
            except (OSError, aiohttp.ClientError, *own) as error:
                if getattr(error, "errno", None) in FULL_DISK:
                    raise
                reason = error.__cause__ if isinstance(error.__cause__, aiohttp.ClientError) else error
                if number == self.retries or not _may_pass(reason, own_passing):
                    raise DataError(
                        f"{url}: cannot be fetched: {self._describe(reason)} ({number + 1} "
                        f"{'try' if number == 0 else 'tries'}); bring it back, or correct the address or the credentials"
                    ) from None
            wait_seconds = min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS)
            # The random factor spreads the next tries of many processes that failed at the same time.
            time.sleep(wait_seconds * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")

    def _call(self, url: str, method: str, *arguments: str) -> Any:
        """Calls a method of the URL's file system."""
        try:
            return getattr(self._connect(url), method)(url, *arguments)
        except TypeError as error:  # fsspec uses some options at the first call only, and fails then if they are wrong
            raise _describe_options(url, error) from None

    def _describe(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
            return "no such file"
        if isinstance(error, aiohttp.TooManyRedirects):
            return f"the server redirects it {len(error.history)} times, and to no file"
        if isinstance(error, aiohttp.ClientResponseError):
            return f"the server answers {error.status} {error.message}".strip()
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout_seconds:g} s"
        return " ".join(str(error).split()) or type(error).__name__

    def _connect(self, url: str) -> fsspec.AbstractFileSystem:
        """The file system of a URL. Each process has its own, since a forked child cannot use its parent's connections."""
        scheme, host = urlsplit(url)[:2]
        key = (os.getpid(), scheme, host, self.timeout_seconds, json.dumps(dict(self.storage_options), sort_keys=True))
        if key not in _FILE_SYSTEMS:
            try:
                options = _add_timeout(scheme, self.storage_options, self.timeout_seconds)
                # NOTE: fsspec's own cache is not used. A forked child clears it, which closes the child's copies of its
                # parent's connections, and that disturbs the parent's downloads.
                _FILE_SYSTEMS[key] = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]
            except ImportError as error:
                raise ConfigError(f"{url}: {error}; for s3, `pip install 'concentration[s3]'`") from None
            except (TypeError, ValueError) as error:
                raise _describe_options(url, error) from None
        return _FILE_SYSTEMS[key]


# After a fork, a child keeps its parent's file systems in here, so that it never closes their connections.
_FILE_SYSTEMS: dict[tuple, fsspec.AbstractFileSystem] = {}


def _add_timeout(scheme: str, options: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The options with a timeout in the form that the file system of this scheme expects. The user's own options win."""
    added: dict[str, dict[str, Any]] = {}
    if scheme in ("http", "https"):
        # A download may take any time, as long as the server is never silent for longer than this.
        added = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=seconds, sock_read=seconds)}}
    elif scheme in ("s3", "s3a"):
        # botocore does not retry by itself, so that `Remote.retries` is the only count of tries.
        tries = {"total_max_attempts": 1}
        added = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds, "retries": tries}}
    return {**options, **{name: {**values, **options.get(name, {})} for name, values in added.items()}}


def _describe_options(url: str, error: Exception) -> ConfigError:
    return ConfigError(f"{url}: {' '.join(str(error).split())}; correct the URL or data.storage_options")


def _list_own_errors(url: str) -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """The exceptions that the URL's file system raises beside OSError, and those of them after which another try may help.

    Only S3 has some: botocore's exceptions are no OSErrors.
    """
    if urlsplit(url).scheme not in ("s3", "s3a"):
        return (), ()
    try:
        from botocore import exceptions
    except ImportError:
        return (), ()
    return (exceptions.BotoCoreError, exceptions.ClientError), (exceptions.ConnectionError, exceptions.HTTPClientError)


def _may_pass(error: Exception, own_passing: tuple[type[Exception], ...]) -> bool:
    """Whether another try may help."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _PASSING_STATUS
    if isinstance(error, aiohttp.InvalidURL | FileNotFoundError | PermissionError):
        return False
    return isinstance(error, (OSError, aiohttp.ClientError, *own_passing))
