"""A filesystem that exists in memory alone, as POSIX has it, with the times of a file server.

What was not synced can be lost with the power. Every method is atomic and raises the OSError that a system would.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

from geoloc_batch.store.files import FileStat


class File:
    """Bytes, and how much of them is safe; several names may lead to it."""

    __slots__ = ("data", "mtime_ns", "safe")

    def __init__(self, mtime_ns: int) -> None:
        self.data = self.safe = b""
        self.mtime_ns = mtime_ns


class Folder:
    """Names."""

    __slots__ = ("mtime_ns", "names")

    def __init__(self, mtime_ns: int) -> None:
        self.names: dict[str, File | Folder] = {}
        self.mtime_ns = mtime_ns


Node = File | Folder
Change = tuple[Folder, str, Node | None]


def refusal(number: int, path: object) -> OSError:
    """The OSError of a number, as the system would raise it."""
    return OSError(number, os.strerror(number), str(path))


class Disk:
    """A file server. Each method is atomic; times are the server's own.

    Args:
        has_links: False refuses hard links.
        can_lose_power: True remembers what is not synced; False saves that cost.
    """

    def __init__(self, *, has_links: bool = True, can_lose_power: bool = False) -> None:
        self.now_ns = 0
        self.has_links = has_links
        self._can_lose_power = can_lose_power
        self._root = Folder(0)
        self._unsynced: list[list[Change]] = []

    def node(self, path: Path) -> Node | None:
        """What stands at a path."""
        found: Node | None = self._root
        for part in path.parts[1:]:
            if not isinstance(found, Folder):
                return None
            found = found.names.get(part)
        return found

    def _folder_of(self, path: Path) -> Folder:
        parent = self.node(path.parent)
        if isinstance(parent, Folder):
            return parent
        raise refusal(errno.ENOENT if parent is None else errno.ENOTDIR, path)

    def _there(self, path: Path) -> Node:
        found = self.node(path)
        if found is None:
            raise refusal(errno.ENOENT, path)
        return found

    def _file(self, path: Path) -> File:
        found = self._there(path)
        if isinstance(found, Folder):
            raise refusal(errno.EISDIR, path)
        return found

    def _change(self, *changes: Change) -> None:
        if self._can_lose_power:
            self._unsynced.append([(folder, name, folder.names.get(name)) for folder, name, _ in changes])
        _put(changes)
        for folder, _, _ in changes:
            folder.mtime_ns = self.now_ns

    def create(self, path: Path) -> int:
        folder = self._folder_of(path)
        if path.name in folder.names:
            raise refusal(errno.EEXIST, path)
        self._change((folder, path.name, File(self.now_ns)))
        return self.now_ns

    def open_empty(self, path: Path) -> File:
        """What open(path, "wb") does: the file is there, and empty."""
        if self.node(path) is None:
            self.create(path)
        file = self._file(path)
        self.put(path, file, b"")
        return file

    def open(self, path: Path) -> File:
        return self._file(path)

    def put(self, path: Path, file: File, data: bytes) -> None:
        """Write an open file; its name may be gone by now, as on any POSIX system."""
        file.data, file.mtime_ns = data, self.now_ns

    def read(self, path: Path) -> bytes:
        return self._file(path).data

    def sync(self, path: Path) -> None:
        file = self._file(path)
        file.safe = file.data

    def sync_folder(self, path: Path) -> None:
        """Keep the names in one folder, and what they depend on, as the strictest reading of POSIX has it."""
        folder = self._there(path)
        kept: set[tuple[int, str]] = set()
        left = []
        for undo in reversed(self._unsynced):
            slots = {(id(changed), name) for changed, name, _ in undo}
            if slots & kept or any(changed is folder for changed, _, _ in undo):
                kept |= slots
            else:
                left.append(undo)
        self._unsynced = left[::-1]

    def lose_power(self, random: Random) -> None:
        """Lose any part of what was not synced: changes of names, each whole or not at all, and bytes."""
        chance = random.choice([0.0, 0.5, 0.9])
        kept: set[tuple[int, str]] = set()
        for undo in reversed(self._unsynced):
            slots = {(id(folder), name) for folder, name, _ in undo}
            if slots & kept or random.random() < chance:
                kept |= slots
            else:
                _put(undo)
        self._unsynced.clear()
        todo: list[Node] = [self._root]
        while todo:
            node = todo.pop()
            if isinstance(node, Folder):
                todo += node.names.values()
            elif node.data != node.safe:
                node.safe = node.data = random.choice([node.data, node.data[: len(node.data) // 2], b""])

    def link(self, source: Path, target: Path) -> None:
        if not self.has_links:
            raise refusal(errno.EPERM, target)
        file, folder = self._file(source), self._folder_of(target)
        if target.name in folder.names:
            raise refusal(errno.EEXIST, target)
        self._change((folder, target.name, file))

    def rename(self, source: Path, target: Path) -> None:
        moved, folder = self._there(source), self._folder_of(target)
        standing = folder.names.get(target.name)
        if standing is moved:
            return
        if isinstance(standing, Folder) and isinstance(moved, File):
            raise refusal(errno.EISDIR, target)
        if isinstance(standing, File) and isinstance(moved, Folder):
            raise refusal(errno.ENOTDIR, target)
        if isinstance(standing, Folder) and standing.names:
            raise refusal(errno.ENOTEMPTY, target)
        self._change((self._folder_of(source), source.name, None), (folder, target.name, moved))

    def remove(self, path: Path) -> None:
        self._file(path)
        self._change((self._folder_of(path), path.name, None))

    def remove_folder(self, path: Path) -> None:
        found = self._there(path)
        if isinstance(found, File):
            raise refusal(errno.ENOTDIR, path)
        if found.names:
            raise refusal(errno.ENOTEMPTY, path)
        self._change((self._folder_of(path), path.name, None))

    def make_folder(self, path: Path) -> None:
        """One folder, as mkdir makes it."""
        parent = self._folder_of(path)
        if path.name in parent.names:
            raise refusal(errno.EEXIST, path)
        self._change((parent, path.name, Folder(self.now_ns)))

    def names(self, path: Path) -> list[str]:
        found = self.node(path)
        if isinstance(found, File):
            raise refusal(errno.ENOTDIR, path)
        return sorted(found.names) if found is not None else []

    def stat(self, path: Path) -> FileStat | None:
        found = self.node(path)
        if isinstance(found, File):
            return FileStat(len(found.data), found.mtime_ns, False)
        return FileStat(0, found.mtime_ns, True) if found is not None else None

    def touch(self, path: Path) -> None:
        self._there(path).mtime_ns = self.now_ns

    def files_below(self, path: Path) -> dict[Path, bytes]:
        """Every file below a folder: for a model that looks on."""
        found = self.node(path)
        if isinstance(found, File):
            return {path: found.data}
        below: dict[Path, bytes] = {}
        for name in found.names if found is not None else ():
            below.update(self.files_below(path / name))
        return below


def _put(changes: list[Change] | tuple[Change, ...]) -> None:
    for folder, name, node in changes:
        if node is None:
            folder.names.pop(name, None)
        else:
            folder.names[name] = node
