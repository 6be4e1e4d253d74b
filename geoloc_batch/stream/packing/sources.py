"""Where packed photos come from: folders, single photos, CSV and Parquet tables. One `Photo` after the other."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from geoloc_batch.errors import InputError
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.stream.packing.meta import (
    IMAGE_EXTENSIONS,
    plain_path,
    portable_key,
    sidecar_meta,
    sniffed_extension,
    split_extension,
)

TABLE_EXTENSIONS = ("csv", "tsv", "parquet", "pq")
_NOTHING = "Neither a path nor bytes"
_NOT_REGULAR = "Not a regular file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """A photo before it is read."""

    where: str
    """For messages: a path, or a table and its line or row."""
    path: str = ""
    """As the source has it, "" where it names none."""
    key: str = ""
    """"" takes the photo's number."""
    file: Path | None = None
    data: bytes | None = None
    """The photo itself, from a table that holds photos."""
    meta: dict[str, Any] = field(default_factory=dict)
    sidecar: Path | None = None

    def obstacle(self) -> str:
        """Why the photo cannot be read, told without reading it; "" where nothing is known against it."""
        if self.data is None and self.file is None:
            return _NOTHING
        return "" if self.file is None else file_obstacle(self.file)

    def read(self) -> bytes:
        """The photo's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.file is None:
            raise FileNotFoundError(errno.ENOENT, _NOTHING, self.where)
        return file_bytes(self.file)

    def told_meta(self) -> dict[str, Any]:
        """What the source says about the photo: its path, the table's columns, the sidecar, which wins.

        Raises:
            OSError: the sidecar cannot be read.
        """
        path = {"path": self.path} if self.path else {}
        return {**path, **self.meta, **(sidecar_meta(file_bytes(self.sidecar)) if self.sidecar else {})}

    def extension(self, data: bytes) -> str:
        """The member's extension: the file's own where readers know it, else what the bytes are.

        Bytes of no known kind are named jpg: so they are counted, as a photo that cannot be decoded.
        """
        own = split_extension(self.path)[1]
        return own if own in IMAGE_EXTENSIONS else sniffed_extension(data) or "jpg"


class PackSource(Protocol):
    """What `pack` walks twice: to see what is there, and to read it."""

    ignored: Counter[str]
    """What the last walk passed over: files by extension, columns by name."""

    def photos(self, *, content: bool) -> Iterator[Photo]:
        """Every photo in a fixed order; without `content`, key and file only."""


def file_obstacle(file: Path) -> str:
    """Why a file cannot be read: absent, no regular file, or not permitted; "" where it can."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    if not stat.S_ISREG(mode):
        return _NOT_REGULAR
    return "" if os.access(file, os.R_OK) else "Permission denied"


def file_bytes(file: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is none: a named pipe, say, whose reader would wait for ever.
    """
    try:
        with open(file, "rb", opener=_open_at_once) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise OSError(errno.EINVAL, _NOT_REGULAR, str(file))
            return opened.read()
    except ValueError as error:
        # No file has such a name, one with a NUL for instance.
        raise OSError(errno.EINVAL, str(error), str(file)) from error


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a named pipe's writer: what a file is can be told for sure only once it is open."""
    return os.open(path, flags | os.O_NONBLOCK)


def open_sources(config: PackConfig) -> list[PackSource]:
    """One source for each that was given.

    Raises:
        InputError: a source is absent or of no known kind.
    """
    from geoloc_batch.stream.packing.tables import CsvTable, ParquetTable

    opened: list[PackSource] = []
    for given in config.sources:
        path = Path(given)
        extension = split_extension(path.name)[1]
        if "://" in given:
            raise InputError(f"{given} is an address, not a file: download the photos first (img2dataset makes shards)")
        if path.is_dir():
            # Alone, a folder's own name says nothing; among others, it keeps their keys apart.
            opened.append(PhotoFolder(path, prefix="" if len(config.sources) == 1 else path.resolve().name))
        elif not path.exists():
            raise InputError(f"no such photo, folder or table: {given}")
        elif extension in IMAGE_EXTENSIONS:
            opened.append(SinglePhoto(path))
        elif extension in ("csv", "tsv"):
            opened.append(CsvTable(path, config))
        elif extension in ("parquet", "pq"):
            opened.append(ParquetTable(path, config))
        else:
            known = ", ".join((*sorted(IMAGE_EXTENSIONS), *TABLE_EXTENSIONS))
            raise InputError(f"{given} is of no known kind: give a folder or a file that ends in {known}")
    return opened


class SinglePhoto:
    """One photo, named by its file name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored: Counter[str] = Counter()

    def photos(self, *, content: bool) -> Iterator[Photo]:
        """The photo."""
        names = {self.path.with_suffix(".json").name, _group_sidecar(self.path.name)}
        beside = {name for name in names if (self.path.parent / name).is_file()}
        yield _file_photo(self.path.parent, self.path.name, beside, path=plain_path(self.path), key_path=self.path.name)


class PhotoFolder:
    """Every photo below a folder: its own files by name, then its folders by name, links followed."""

    def __init__(self, root: Path, *, prefix: str = "") -> None:
        self.root = root
        self.prefix = prefix
        self.ignored: Counter[str] = Counter()

    def photos(self, *, content: bool) -> Iterator[Photo]:
        """The photos; `ignored` counts the other files by extension, hidden ones as "hidden"."""
        self.ignored.clear()
        # Linked folders are followed; one that leads back up would never end.
        walked: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(self.root, onerror=_raise, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in walked:
                self.ignored["folder linked twice"] += 1
                folders.clear()
                continue
            walked.add((status.st_dev, status.st_ino))
            self.ignored["hidden"] += sum(name.startswith(".") for name in folders)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from self._files(Path(folder), sorted(files))

    def _files(self, folder: Path, names: list[str]) -> Iterator[Photo]:
        inner = folder.relative_to(self.root)
        beside = {name for name in names if name.endswith(".json")}
        used: set[str] = set()
        for name in names:
            extension = split_extension(name)[1]
            if name.startswith("."):
                self.ignored["hidden"] += 1
            elif extension in IMAGE_EXTENSIONS:
                path = PurePosixPath(self.prefix, inner, name).as_posix()
                photo = _file_photo(folder, name, beside, path=plain_path(path), key_path=path)
                used.update({photo.sidecar.name} if photo.sidecar else ())
                yield photo
            elif name not in beside:
                self.ignored[f".{extension}" if extension else "no extension"] += 1
        if len(beside) > len(used):
            self.ignored[".json"] += len(beside) - len(used)


def _file_photo(folder: Path, name: str, beside: set[str], *, path: str, key_path: str) -> Photo:
    """A photo in a folder whose json files are `beside`: its own stem's, else the stem's before the first dot."""
    own = f"{name.rpartition('.')[0]}.json"
    sidecar = own if own in beside else _group_sidecar(name) if _group_sidecar(name) in beside else None
    return Photo(
        where=plain_path(folder / name),
        path=path,
        key=portable_key(plain_path(split_extension(key_path)[0])),
        file=folder / name,
        sidecar=folder / sidecar if sidecar else None,
    )


def _group_sidecar(name: str) -> str:
    return f"{name.partition('.')[0]}.json"


def _raise(error: OSError) -> None:
    """A folder that cannot be listed would lose its photos in silence."""
    raise InputError(
        f"{error.filename} cannot be listed: {error.strerror}; allow it or pack the others alone"
    ) from error
