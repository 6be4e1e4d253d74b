"""One unit's photos: members of a tar put together with their json, numbered, and told apart.

A photo's json may stand before or after it, so photos wait until the members that share their stem are through.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from geoloc_batch.errors import DamageError
from geoloc_batch.records import RowError, Sample, Unit, UnitError
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.left_out import LeftOut
from geoloc_batch.stream.names import META_EXTENSION, key_digest, member_name
from geoloc_batch.stream.opening import is_lasting, open_unit
from geoloc_batch.stream.packing.meta import IMAGE_EXTENSIONS
from geoloc_batch.stream.source import Source
from geoloc_batch.stream.tar import Member, TarReader

MAX_PHOTO_BYTES = 1 << 30
"""A larger photo becomes an error row, unread."""
MAX_META_BYTES = 1 << 20
"""A photo with a larger json becomes an error row, the json unread."""
MAX_GROUP_BYTES = 1 << 28
"""Photos that wait for a json of their group; beyond this they go on without it."""

Item = tuple[Sample, bytes] | RowError


@dataclass(slots=True)
class _Waiting:
    row: int
    stem: str
    data: bytes
    problem: str


@dataclass(slots=True)
class _Group:
    """Members that stand together and share the stem before the first dot."""

    name: str
    photos: list[_Waiting] = field(default_factory=list)
    metas: dict[str, bytes | None] = field(default_factory=dict)
    """json by stem; None where it is too large."""
    num_bytes: int = 0
    is_overfull: bool = False
    """Some photos went on before the group's end."""
    has_photos: bool = False


class UnitReader:
    """Reads one unit, once.

    Args:
        unit: a shard, or a range of one.
        interrupt: when set by another thread, the reading ends in a unit error, whatever it waits for.
    """

    def __init__(self, unit: Unit, interrupt: Interrupt | None = None) -> None:
        self.num_photos = 0
        """Photos met so far, refused ones included."""
        self.unit_error: UnitError | None = None
        """Set when the unit could not be read to its end."""
        self._unit = unit
        self._shard = unit.shard
        self._max_photos = math.inf if unit.max_rows is None else unit.max_rows
        self._source: Source | None = None
        self._told_at_opening: tuple[str, ...] = ()
        self._tar: TarReader | None = None
        self._interrupt = interrupt or Interrupt()
        self._seen: set[bytes] = set()
        self._num_lone_metas = 0
        self._num_late_metas = 0
        self._is_through = False
        # Of the group that is being read, for as long as it has no photo; then of the whole unit.
        self._others = LeftOut()
        self._other_stem = ""
        self._left_out = LeftOut()

    @property
    def bytes_read(self) -> int:
        """Bytes passed so far."""
        return self._source.offset - self._unit.start if self._source else 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd."""
        told = [*self._told_at_opening, *(self._tar.warnings if self._tar else ())]
        if self._is_through and not self.num_photos:
            told.append("it holds no photo")
        if self._left_out:
            told.append(f"left out, no photos: {self._left_out}")
        if self._num_lone_metas:
            told.append(f"{self._num_lone_metas} json stand apart from any photo of their name")
        if self._num_late_metas:
            told.append(
                f"{self._num_late_metas} json came more than {MAX_GROUP_BYTES >> 20} MB after photos of their name, "
                "which went on without them"
            )
        return tuple(told)

    def __iter__(self) -> Generator[Item, None, None]:
        """Give (sample, bytes) or a row error for each photo, in order; damage ends it and sets unit_error."""
        shard = self._unit.shard
        try:
            self._source, self._told_at_opening = open_unit(self._unit, self._interrupt)
        except OSError as error:
            message = f"cannot be opened: {error.strerror or error}"
            self.unit_error = UnitError(shard, message, -1, self._unit.num_bytes or None, not is_lasting(error))
            return
        try:
            self._tar = TarReader(self._source, stop=self._unit.stop)
            yield from self._grouped(self._tar)
            self._is_through = True
        except DamageError as damage:
            self.unit_error = UnitError(shard, str(damage), damage.offset, damage.bytes_unread, damage.retryable)
        except MemoryError:
            message, at = "too little memory to read on", self._source.offset
            self.unit_error = UnitError(shard, message, at, None, retryable=True)
        except OSError as interruption:
            self.unit_error = UnitError(shard, str(interruption.strerror), self._source.offset, None, retryable=True)
        finally:
            self._source.close()

    def _grouped(self, tar: TarReader) -> Iterator[Item]:
        group = _Group("")
        try:
            for member in tar:
                # A file's reading waits for nothing, yet may take long where it holds no photos.
                self._interrupt.check()
                stem, extension, group_name = member_name(member.name)
                if not stem:
                    continue
                if group_name != group.name:
                    yield from self._settled(group, is_whole=True)
                    group = _Group(group_name)
                    if self.num_photos >= self._max_photos:
                        return
                if extension in IMAGE_EXTENSIONS:
                    self._add_photo(tar, member, stem, group)
                elif extension == META_EXTENSION:
                    self._add_meta(tar, member, stem, group)
                elif not group.has_photos:
                    self._others.add(extension)
                    self._other_stem = stem
                if group.num_bytes > MAX_GROUP_BYTES:
                    yield from self._settled(group, is_whole=False)
        except DamageError:
            # What was whole before the damage is kept.
            yield from self._settled(group, is_whole=True)
            raise
        yield from self._settled(group, is_whole=True)

    def _add_photo(self, tar: TarReader, member: Member, stem: str, group: _Group) -> None:
        group.has_photos = True
        if self.num_photos >= self._max_photos:
            return
        digest = key_digest(stem)
        problem = self._refusal(member, digest)
        data = b"" if problem else tar.read()
        group.photos.append(_Waiting(self._unit.first_row + self.num_photos, stem, data, problem))
        group.num_bytes += len(data)
        self._seen.add(digest)
        self.num_photos += 1

    def _add_meta(self, tar: TarReader, member: Member, stem: str, group: _Group) -> None:
        is_readable = not member.problem and member.size <= MAX_META_BYTES
        group.metas[stem] = tar.read() if is_readable else None
        group.num_bytes += member.size if is_readable else 0
        if group.is_overfull and all(photo.stem != stem for photo in group.photos):
            self._num_late_metas += stem == group.name or key_digest(stem) in self._seen

    def _refusal(self, member: Member, digest: bytes) -> str:
        if digest in self._seen:
            return "the key stands twice in its shard; the first photo is kept"
        if member.size > MAX_PHOTO_BYTES:
            return f"the photo has {member.size} bytes, more than {MAX_PHOTO_BYTES}"
        return member.problem

    def _settled(self, group: _Group, *, is_whole: bool) -> list[Item]:
        """The photos that waited, with their json. What is no longer needed of the group is dropped."""
        items: list[Item] = []
        photos, metas, shard = group.photos, group.metas, self._shard
        # The last photo waits on, for its own json is likely to come next.
        group.photos = [] if is_whole else photos[-1:]
        del photos[len(photos) - len(group.photos) :]
        for photo in photos:
            meta = metas.get(photo.stem, metas.get(group.name, b""))
            problem = photo.problem
            if meta is None and not problem:
                problem = f"its json cannot be used: it is sparse or has more than {MAX_META_BYTES} bytes"
            if problem:
                items.append(RowError(photo.stem, shard, photo.row, "read", problem, retryable=False))
            else:
                items.append((Sample(self._unit, shard, photo.row, photo.stem, meta or b""), photo.data))
        if is_whole:
            self._num_lone_metas += bool(metas) and not group.has_photos
            if self._others:
                self._settle_others(group)
        else:
            group.is_overfull = True
            group.metas = {stem: meta for stem, meta in group.metas.items() if stem == group.name}
            group.num_bytes = sum(len(photo.data) for photo in group.photos)
        return items

    def _settle_others(self, group: _Group) -> None:
        """Count what stood in a group that has no photo, unless it belongs to a photo that stood elsewhere."""
        if not group.has_photos and key_digest(self._other_stem) not in self._seen:
            for extension, count in self._others.items():
                self._left_out.add(extension, count)
        self._others.clear()
