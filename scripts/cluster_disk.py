"""A file server's disk in memory, made for millions of names: what stands where, and nothing of time or cost.

Folders are found by their whole path in one dictionary. A table that a rank would write is a token with a size. Every
method is atomic and raises the OSError that a system would. (tests/simulated_disk.py is the other one: slower, and it
can lose power.)
"""

from __future__ import annotations

import errno
import os

from geoloc_batch.store.files import FileStat


class File:
    """Bytes, or a token that stands for `size` of them; several names may lead to it."""

    __slots__ = ("data", "mtime_ns", "size")

    def __init__(self, data: bytes, size: int, mtime_ns: int) -> None:
        self.data = data
        self.size = size
        self.mtime_ns = mtime_ns


class Folder:
    """Names of files; those of folders are keys of the disk, and stand here with None."""

    __slots__ = ("mtime_ns", "names")

    def __init__(self, mtime_ns: int) -> None:
        self.names: dict[str, File | None] = {}
        self.mtime_ns = mtime_ns


def refusal(number: int, path: str) -> OSError:
    """The OSError of a number, as the system would raise it."""
    return OSError(number, os.strerror(number), path)


class Disk:
    """Folders and files by their absolute paths."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.folders: dict[str, Folder] = {"": Folder(0)}

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self.folders.get(parent)
        if folder is None:
            raise refusal(errno.ENOENT, path)
        return folder, name

    def _file(self, path: str) -> File:
        folder, name = self._place(path)
        file = folder.names.get(name)
        if file is None:
            raise refusal(errno.EISDIR if name in folder.names else errno.ENOENT, path)
        return file

    def create(self, path: str) -> int:
        """An empty file where nothing is. Returns its time."""
        folder, name = self._place(path)
        if name in folder.names:
            raise refusal(errno.EEXIST, path)
        folder.names[name] = File(b"", 0, self.now_ns)
        folder.mtime_ns = self.now_ns
        return self.now_ns

    def put(self, path: str, data: bytes, size: int) -> None:
        """Write a file that is there."""
        file = self._file(path)
        file.data, file.size, file.mtime_ns = data, size, self.now_ns

    def write(self, path: str, data: bytes, size: int) -> None:
        """Write a file, made where there is none."""
        folder, name = self._place(path)
        if name not in folder.names:
            self.create(path)
        self.put(path, data, size)

    def read(self, path: str) -> File:
        """What a file holds."""
        return self._file(path)

    def link(self, source: str, target: str) -> None:
        """A second name where nothing is."""
        file = self._file(source)
        folder, name = self._place(target)
        if name in folder.names:
            raise refusal(errno.EEXIST, target)
        folder.names[name] = file
        folder.mtime_ns = self.now_ns

    def rename(self, source: str, target: str) -> None:
        """Move a file over a file or nothing, or a folder to where nothing is."""
        old, old_name = self._place(source)
        new, new_name = self._place(target)
        if old_name not in old.names:
            raise refusal(errno.ENOENT, source)
        file = old.names[old_name]
        if new_name in new.names and (file is None or new.names[new_name] is None):
            raise refusal(errno.ENOTEMPTY if file is None else errno.EISDIR, target)
        del old.names[old_name]
        new.names[new_name] = file
        old.mtime_ns = new.mtime_ns = self.now_ns
        if file is None:
            self._move(source, target)

    def _move(self, source: str, target: str) -> None:
        folder = self.folders.pop(source)
        self.folders[target] = folder
        for name, file in folder.names.items():
            if file is None:
                self._move(f"{source}/{name}", f"{target}/{name}")

    def remove(self, path: str) -> None:
        """Take a file's name away."""
        self._file(path)
        folder, name = self._place(path)
        del folder.names[name]
        folder.mtime_ns = self.now_ns

    def remove_folder(self, path: str) -> None:
        """Take an empty folder away."""
        folder = self.folders.get(path)
        if folder is None:
            raise refusal(errno.ENOENT, path)
        if folder.names:
            raise refusal(errno.ENOTEMPTY, path)
        del self.folders[path]
        parent, name = self._place(path)
        del parent.names[name]
        parent.mtime_ns = self.now_ns

    def make_folder(self, path: str) -> int:
        """Make a folder and what is above it; how many were made."""
        if path in self.folders:
            return 0
        made = self.make_folder(path.rpartition("/")[0])
        folder, name = self._place(path)
        if name in folder.names:
            raise refusal(errno.EEXIST, path)
        folder.names[name] = None
        folder.mtime_ns = self.now_ns
        self.folders[path] = Folder(self.now_ns)
        return made + 1

    def names(self, path: str) -> list[str]:
        """Sorted; none where there is no folder."""
        folder = self.folders.get(path)
        return sorted(folder.names) if folder is not None else []

    def stat(self, path: str) -> FileStat | None:
        """None where nothing is."""
        folder = self.folders.get(path)
        if folder is not None:
            return FileStat(0, folder.mtime_ns, True)
        parent, _, name = path.rpartition("/")
        above = self.folders.get(parent)
        file = above.names.get(name) if above is not None else None
        return FileStat(file.size, file.mtime_ns, False) if file is not None else None

    def touch(self, path: str) -> None:
        """Set a file's time to now."""
        self._file(path).mtime_ns = self.now_ns
