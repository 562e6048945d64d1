"""Listing and deleting on file systems that keep a deleted file, under another name, while somebody has it open."""

import shutil
from pathlib import Path

#: NFS gives names that begin so to files that are deleted and that somebody has open; it deletes them when they are closed.
_KEPT_BY_NFS = ".nfs"


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder; nothing where all of it, however deep, is kept by NFS."""
    if all(path.is_dir() or path.name.startswith(_KEPT_BY_NFS) for path in folder.rglob("*")):
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(_KEPT_BY_NFS)]


def discard(path: Path) -> None:
    """Deletes a file, or a folder with all in it but what is kept by NFS."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and (left := list_folder(path)):
        shutil.rmtree(left[0]) if left[0].is_dir() else left[0].unlink()  # which raises why
