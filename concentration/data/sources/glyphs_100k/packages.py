"""Fetches and unpacks Debian's font packages, which `packages.tsv` lists with version, checksum, size and licence.

A package is an `ar` archive with a tar in it. Both are read here, so that nothing has to be installed, and a machine that has the
.deb files need not run Debian.
"""

import functools
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from concentration.errors import DataError, Preempted
from concentration.progress import Progress
from concentration.temporaries import clear_temporaries, name_temporary

PACKAGES_PATH = Path(__file__).with_name("packages.tsv")

#: The files of a package that are kept: fonts, the tables of `unicode-data`, and the copyright file with the licence.
_KEPT_SUFFIXES = (".ttf", ".otf", ".ttc", ".txt", ".bz2")
_COPYRIGHT = "copyright"

#: How many packages one call of apt-get fetches, since each call takes a second to begin.
_FETCHED_TOGETHER = 10

_AR_MAGIC, _AR_HEADER_BYTES = b"!<arch>\n", 60


@dataclass(frozen=True, slots=True)
class Package:
    """A line of `packages.tsv`.

    Attributes:
        name, version: of the package in Debian.
        sha256: the checksum of the .deb file.
        size_bytes: the size of the .deb file.
        licence: the licence of its fonts, as its copyright file names it.
    """

    name: str
    version: str
    sha256: str
    size_bytes: int
    licence: str

    def folder(self, path: Path) -> Path:
        """The folder of its files below `path`, which exists only if it is complete."""
        return path / f"{self.name}_{self.version.replace(':', '%3a')}"


@functools.cache
def load_packages() -> dict[str, Package]:
    """All packages by name."""
    lines = PACKAGES_PATH.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {name: Package(name, version, sha256, int(size), licence) for name, version, sha256, size, licence in rows}


def fetch_packages(packages: Sequence[Package], path: Path) -> None:
    """Fetches and unpacks the packages that are missing. If it is stopped, the next call goes on.

    A .deb file in `path` is used instead of fetching that package, and is kept.

    Args:
        packages: the packages that are needed.
        path: the folder of all packages; it is created if need be.

    Raises:
        DataError: a package cannot be fetched, or has another checksum than `packages.tsv` says.
        Preempted: a signal asked to stop.
    """
    clear_temporaries(path)
    missing = [package for package in packages if not package.folder(path).is_dir()]
    if not missing:
        return
    temporary = name_temporary(path / "packages")
    try:
        with Progress("fetch fonts", sum(p.size_bytes for p in missing) // 1000, "kB") as progress:
            for batch in (missing[n : n + _FETCHED_TOGETHER] for n in range(0, len(missing), _FETCHED_TOGETHER)):
                temporary.mkdir(parents=True)
                _download([package for package in batch if not _find_deb(package, path)], temporary, path)
                for package in batch:
                    deb = _find_deb(package, path) or _find_deb(package, temporary)
                    _unpack(package, deb, temporary / "kept", path)
                    progress.advance(package.size_bytes // 1000)
                shutil.rmtree(temporary)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free space or correct the permissions, or give data.path"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_deb(package: Package, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None)


def _download(packages: Sequence[Package], temporary: Path, path: Path) -> None:
    """Fetches .deb files into `temporary` with apt-get. `path` is only for the advice in errors."""
    if not packages:
        return
    advice = (
        "prepare once on a machine with Debian's packages and a network (`apt-get update` first), or lay the .deb files that "
        f"are missing into {path}: names and versions are in {PACKAGES_PATH}; what is there is not fetched"
    )
    wanted = [f"{package.name}={package.version}" for package in packages]
    try:
        done = subprocess.run(
            ["apt-get", "download", *wanted], cwd=temporary, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise DataError(f"{wanted[0]}: cannot be fetched, for there is no apt-get here; {advice}") from None
    lost = [name for name, package in zip(wanted, packages, strict=True) if not _find_deb(package, temporary)]
    if done.returncode < 0:
        raise Preempted("fetching fonts was stopped; run the same command again: it continues")
    if done.returncode or lost:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise DataError(
            f"{(lost or wanted)[0]}: apt-get cannot fetch it ({' '.join(lines[:1]) or 'no file came'}); {advice}"
        )


def _unpack(package: Package, deb: Path, temporary: Path, path: Path) -> None:
    """Unpacks a .deb file into the folder of its package, which becomes complete or does not appear at all."""
    content = deb.read_bytes()
    _check(package, deb.name, content)
    temporary.mkdir()
    unpack_deb(content, temporary, package.name)
    os.replace(temporary, package.folder(path))


def _check(package: Package, name: str, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{name}: {len(content)} bytes with SHA-256 {found}, expected {package.size_bytes} with {package.sha256}: it is "
            f"damaged or another version than {package.version}; remove it and run the same command again"
        )


def unpack_deb(deb: bytes, folder: Path, name: str) -> None:
    """Writes the fonts, tables and the copyright file of a .deb file into `folder`, without the folders that they are in.

    Raises:
        DataError: it is no .deb file, or is compressed in a way that `tarfile` does not read.
    """
    try:
        with tarfile.open(fileobj=_decompress(deb)) as tar:
            for member in tar:
                file = PurePosixPath(member.name)
                if member.isfile() and (file.suffix.lower() in _KEPT_SUFFIXES or file.name == _COPYRIGHT):
                    (folder / file.name).write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise DataError(f"{name}: its .deb file cannot be read ({error}); fetch it again") from None


def _decompress(deb: bytes) -> io.BytesIO:
    """The content of the member `data.tar.*`, which `tarfile` will decompress. Raises: ValueError if there is none."""
    if not deb.startswith(_AR_MAGIC):
        raise ValueError("no ar archive")
    place = len(_AR_MAGIC)
    while place < len(deb):
        name = deb[place : place + 16].rstrip(b" /")
        size = int(deb[place + 48 : place + 58])
        place += _AR_HEADER_BYTES
        if name.startswith(b"data.tar"):
            return io.BytesIO(deb[place : place + size])
        place += size + size % 2
    raise ValueError("it has no data.tar")
