"""Folders, CSV and Parquet of photos -> WebDataset tar shards.

    from geoloc_batch.stream.pack import pack
    pack(["photos/"], "shards/")

Photos are stored byte for byte, each followed by its json. The same photos give the same bytes. The sources are walked
twice: first for what is there, so that a missing photo or a key that stands twice is told before anything is written.
"""

from __future__ import annotations

import csv
import errno
import os
import tarfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from geoloc_batch.errors import InputError
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.stream.packing.folder import StagedFolder
from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS, exif_meta, json_bytes, merged_meta
from geoloc_batch.stream.packing.sources import PackSource, Photo, open_sources
from geoloc_batch.stream.packing.survey import Survey, add_to_fingerprint, survey_photos
from geoloc_batch.stream.samples import MAX_META_BYTES

_READERS, _READ_AHEAD = 8, 16

_Loaded = tuple[bytes, bytes] | OSError
"""A photo and its json, or why they cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary:
    """What was packed, and what was not."""

    shards: int
    photos: int
    bytes: int
    """Size of the shards together."""
    skipped: int
    """Photos that could not be read, listed in OUT/skipped.csv."""
    ignored: dict[str, int] = field(default_factory=dict)
    """What is no photo: files of folders by extension, hidden ones, columns that the json cannot hold."""
    out: str


def pack(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> PackSummary:
    """Pack photos into tar shards.

    Args:
        sources: a folder, a photo, a CSV, TSV or Parquet, or several of them.
        out: folder of the shards 000000.tar, 000001.tar, ...
        progress: called after each photo with (photos done, photos in all).
        settings: the other fields of PackConfig.
    Raises:
        InputError: a source or a photo is missing, or two photos have one key.
        OutputError: ``out`` holds shards already, or cannot be written.
    """
    given = [sources] if isinstance(sources, str | Path) else sources
    config = PackConfig(sources=tuple(str(source) for source in given), out=str(out), **settings)
    return pack_with(config, progress=progress)


def pack_with(config: PackConfig, *, progress: Callable[[int, int], None] | None = None) -> PackSummary:
    """`pack`, with its settings as one object."""
    sources = open_sources(config)
    # PIL warns of odd EXIF and of large photos; neither is the packer's business.
    with StagedFolder(Path(config.out), overwrite=config.overwrite) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survey = survey_photos(lambda: _numbered(sources, content=False), config)
        if not survey.num_photos:
            raise InputError(f"no photos in {', '.join(config.sources)}{_passed_over(_ignored(sources))}")
        with _ShardWriter(folder, config) as writer:
            skipped = _write_photos(writer, sources, survey, config, progress)
        _write_skipped(folder, skipped)
        folder.publish()
    return PackSummary(
        shards=writer.num_shards,
        photos=writer.num_photos,
        bytes=writer.num_bytes,
        skipped=len(skipped),
        ignored=_ignored(sources),
        out=config.out,
    )


def _write_photos(
    writer: _ShardWriter,
    sources: Sequence[PackSource],
    survey: Survey,
    config: PackConfig,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[str, str, str]]:
    """The second walk. Returns (where, path, reason) of each photo that was passed over."""
    skipped: list[tuple[str, str, str]] = []
    fingerprint = 0

    def load(photo: Photo) -> _Loaded:
        return _load(photo, with_exif=config.exif)

    for photo, loaded in _read_ahead(_numbered(sources, content=True), load):
        fingerprint = add_to_fingerprint(fingerprint, photo.key)
        if isinstance(loaded, OSError):
            reason = loaded.strerror or str(loaded)
            if not config.skip_missing:
                raise InputError(
                    f"{photo.where}: {photo.path!r} cannot be read ({reason}); mend it, or pass --skip-missing"
                )
            skipped.append((photo.where, photo.path, reason))
        else:
            writer.add(survey.final_key(photo.key), photo.extension(loaded[0]), *loaded)
        if progress is not None:
            progress(writer.num_photos + len(skipped), survey.num_photos)
    if fingerprint != survey.fingerprint:
        raise InputError(f"{', '.join(config.sources)} changed while it was packed; run again when it rests")
    if not writer.num_photos:
        raise InputError(f"none of the {len(skipped)} photos can be read, such as {skipped[0][0]} ({skipped[0][2]})")
    return skipped


def _numbered(sources: Iterable[PackSource], *, content: bool) -> Iterator[Photo]:
    """All photos; one without a name is named by its number."""
    number = 0
    for source in sources:
        for photo in source.photos(content=content):
            yield photo if photo.key else replace(photo, key=f"{number:09d}")
            number += 1


def _load(photo: Photo, *, with_exif: bool) -> _Loaded:
    try:
        data = photo.read()
        told = photo.told_meta()
    except OSError as error:
        return error
    meta = json_bytes(merged_meta(exif_meta(data) if with_exif else {}, told))
    if len(meta) > MAX_META_BYTES:
        return OSError(errno.EFBIG, f"its json has {len(meta)} bytes, readers of shards take {MAX_META_BYTES}")
    return data, meta


def _read_ahead(photos: Iterable[Photo], load: Callable[[Photo], _Loaded]) -> Iterator[tuple[Photo, _Loaded]]:
    """Load a few photos at a time, in order: on a file server each waits for the network."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="pack") as pool:
        window: deque[tuple[Photo, Future[_Loaded]]] = deque()
        for photo in photos:
            window.append((photo, pool.submit(load, photo)))
            if len(window) == _READ_AHEAD:
                first, loaded = window.popleft()
                yield first, loaded.result()
        for photo, loaded in window:
            yield photo, loaded.result()


class _ShardWriter:
    """Cuts members into shards, whose bytes depend on nothing but the photos and their json."""

    def __init__(self, folder: StagedFolder, config: PackConfig) -> None:
        self.num_shards = 0
        self.num_photos = 0
        self.num_bytes = 0
        self._folder = folder
        self._max_photos = config.shard_photos
        self._max_bytes = config.shard_mb * 1_000_000
        self._file: BinaryIO | None = None
        self._photos_here = 0

    def add(self, key: str, extension: str, data: bytes, meta: bytes) -> None:
        """Write a photo and its json into the open shard, or into a new one where that is full."""
        parts = [*_member(f"{key}.{extension}", data), *_member(f"{key}.json", meta)]
        size = sum(map(len, parts)) + tarfile.RECORDSIZE
        if self._file and (self._photos_here == self._max_photos or self._file.tell() + size > self._max_bytes):
            self._close()
        if self._file is None:
            self._file = self._folder.stage(f"{self.num_shards:06d}.tar").open("wb", buffering=1 << 20)
            self._photos_here = 0
            self.num_shards += 1
        self._file.writelines(parts)
        self._photos_here += 1
        self.num_photos += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        elif self._file is not None:
            self._file.close()

    def _close(self) -> None:
        """End the open shard as tar does: two blocks of zeros, filled up to a record."""
        if self._file is None:
            return
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.num_bytes += self._file.tell()
        self._file.close()
        self._file = None


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, data and padding. PAX: the one format that says how names beyond ASCII are spelled."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"), data, b"\0" * (-len(data) % tarfile.BLOCKSIZE)


def _write_skipped(folder: StagedFolder, skipped: Sequence[tuple[str, str, str]]) -> None:
    if skipped:
        with folder.stage("skipped.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("where", "path", "reason"), *skipped])


def _ignored(sources: Iterable[PackSource]) -> dict[str, int]:
    return dict(sorted(sum((source.ignored for source in sources), Counter[str]()).items()))


def _passed_over(ignored: dict[str, int]) -> str:
    if not ignored:
        return ": it is empty"
    found = ", ".join(f"{count} {name}" for name, count in ignored.items())
    return f": found only {found}. Photos end in {', '.join(sorted(IMAGE_EXTENSIONS))}; a table is named itself"
