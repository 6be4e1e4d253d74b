"""A file that is there whole, and on the disk, or not at all. What a ledger publishes goes its own way."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

# What some network filesystems answer to fsync of a folder: there it is not needed, or not to be had.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR})


def in_one_move(path: Path, write: Callable[[Path], object], *, part: Path | None = None) -> None:
    """Write a file beside its place, then move it there: a reader sees the old one or the new one.

    Args:
        path: where it goes; its folder must exist.
        write: writes it to the path that it is given.
        part: where it is written first, on the same filesystem; None: a hidden name beside `path`, its own each time.

    Raises:
        OSError: the disk will not take it. What stood there before still does.
    """
    part = part or path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(part)
        sync_file(part)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk, where the filesystem can."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
