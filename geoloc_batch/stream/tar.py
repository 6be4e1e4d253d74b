"""A validating tar reader: every whole member is given, and nothing is lost in silence.

    reader = TarReader(source)
    for member in reader:
        data = reader.read()          # or not: a member that is not read is skipped

A damaged archive gives all whole members before the damage, then a DamageError; reading never starts again behind it.
Concatenated archives are read through. What follows the end of the archive is a warning, unless headers are found in
it, for then the end is a zeroed stretch in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from geoloc_batch.errors import DamageError
from geoloc_batch.stream.source import Source, SourceError
from geoloc_batch.stream.tar_header import (
    BLOCK,
    EXTENSIONS,
    GNU_SPARSE,
    LINKS,
    LONG_NAME,
    PAX,
    PAX_GLOBAL,
    REGULAR,
    WITHOUT_DATA,
    Header,
    HeaderError,
    PlainHeaders,
    looks_like,
    parse_header,
    parse_pax,
    pax_size,
    text,
)

MAX_EXTENSION_BYTES = 1 << 24
"""A long name or a PAX header beyond this is damage, not memory to fill."""

_ZEROS = bytes(BLOCK)
_SPARSE = "a sparse member cannot be read; pack the photo as a plain file"


class Member(NamedTuple):
    """A regular member. Folders are passed over, so are links, which a warning counts."""

    name: str
    size: int
    """Bytes of the file."""
    offset: int
    """Position of its first header, extensions included."""
    problem: str
    """Why it cannot be read although the archive is whole, "" where it can."""


_member: Callable[[tuple[str, int, int, str]], Member] = partial(tuple.__new__, Member)
"""Member(...) in half the time."""


class TarReader:
    """The members of one archive, in order.

    Args:
        source: the archive's bytes; the caller closes it.
        stop: end of the range to read, at a member's border; None for the end of the archive.
    """

    def __init__(self, source: Source, *, stop: int | None = None) -> None:
        self.has_global_header = False
        """Whether a PAX header for all later members was met: such an archive cannot be read from the middle."""
        self._source = source
        self._plain_headers = PlainHeaders()
        self._stop = stop
        # First byte that belongs to no member given so far: where a damage is said to begin.
        self._start = source.offset
        self._name = ""
        self._data_left = 0
        self._padding_left = 0
        self._global: dict[str, str] = {}
        self._first_link = ""
        self._num_links = 0
        self._oddities: list[str] = []

    @property
    def warnings(self) -> list[str]:
        """What was odd."""
        links = [f"{self._num_links} links were skipped, the first is {self._first_link}"] if self._num_links else []
        return [*self._oddities, *links, *self._source.warnings]

    def __iter__(self) -> Iterator[Member]:
        """Give the members.

        Raises:
            DamageError: the archive cannot be read on; its offset is where the first lost member begins.
        """
        while True:
            try:
                member = self._next_member()
            except SourceError as failure:
                raise self._damage(str(failure), is_retryable=failure.retryable) from failure
            except HeaderError as error:
                raise self._damage(f"damaged header before byte {self._source.offset}: {error}") from error
            if member is None:
                return
            yield member

    def read(self) -> bytes:
        """The data of the member that was given last, once.

        Raises:
            DamageError: the archive ends inside it.
        """
        size, self._data_left = self._data_left, 0
        try:
            data = self._source.take(size)
        except SourceError as failure:
            raise self._damage(str(failure), is_retryable=failure.retryable) from failure
        if len(data) < size:
            raise self._cut(f"inside {self._name}, {len(data)} of {size} bytes are there")
        return data

    def skip(self) -> None:
        """Pass over the member that was given last, or what is left of it; iterating on does so by itself.

        Raises:
            DamageError: the archive ends inside it.
        """
        try:
            skipped = self._source.skip(self._data_left + self._padding_left)
        except SourceError as failure:
            raise self._damage(str(failure), is_retryable=failure.retryable) from failure
        if skipped < self._data_left:
            raise self._cut(f"inside {self._name}, {skipped} of {self._data_left} bytes are there")
        self._data_left = self._padding_left = 0

    def _next_member(self) -> Member | None:
        while True:
            if self._data_left:
                self.skip()
            padding, self._padding_left = self._padding_left, 0
            self._start = self._source.offset + padding
            if self._stop is not None and self._start >= self._stop:
                self._source.skip(padding)
                return None
            # The padding comes along with the header: a call less for each member.
            block = self._source.take(padding + BLOCK)[padding:]
            if len(block) < BLOCK:
                self._start = self._source.offset - len(block)
            if (plain := self._plain_headers.read(block)) and not self._global:
                self._name, self._data_left = name, size = plain
                self._padding_left = -size % BLOCK
                return _member((name, size, self._start, ""))
            header = self._first_header(block)
            if header is None:
                return None
            pax: dict[str, str] = {}
            long_name = ""
            while header.kind in EXTENSIONS:
                data = self._extension(header)
                if header.kind == PAX_GLOBAL:
                    self.has_global_header = True
                    self._global.update(parse_pax(data))
                    break
                if header.kind in PAX:
                    pax.update(parse_pax(data))
                elif header.kind == LONG_NAME:
                    long_name = text(data)
                header = self._checked(self._source.take(BLOCK))
            if self._global:
                pax = {**self._global, **pax}
            if header.kind != PAX_GLOBAL and (member := self._member(header, pax, long_name)):
                return member

    def _member(self, header: Header, pax: dict[str, str], long_name: str) -> Member | None:
        """Turn a header that is no extension into a member and note how much data it has; None for other things."""
        name = pax.get("path", long_name or header.name)
        if header.kind in WITHOUT_DATA:
            if header.kind in LINKS:
                self._num_links += 1
                self._first_link = self._first_link or name
            return None
        size, problem = pax_size(pax["size"]) if "size" in pax else header.size, ""
        self._name, self._data_left, self._padding_left = name, size, -size % BLOCK
        if header.kind == GNU_SPARSE:
            size, problem = header.sparse_size, _SPARSE
            has_more = header.has_more_map
            while has_more and len(block := self._source.take(BLOCK)) == BLOCK:
                has_more = bool(block[504])
        elif header.kind not in REGULAR:
            self._oddities.append(f"{name} was skipped: its type {chr(header.kind)!r} is unknown")
            return None
        elif pax and any(key.startswith("GNU.sparse.") for key in pax):
            name, problem = pax.get("GNU.sparse.name", name), _SPARSE
            size = pax_size(pax.get("GNU.sparse.realsize", pax.get("GNU.sparse.size", str(size))))
        return Member(name, size, self._start, problem)

    def _extension(self, header: Header) -> bytes:
        """The data of a header that extends the next one."""
        if header.size > MAX_EXTENSION_BYTES:
            raise HeaderError(f"it announces {header.size} bytes of names")
        data = self._source.take(header.size)
        padding = -header.size % BLOCK
        if len(data) < header.size or self._source.skip(padding) < padding:
            raise self._cut("inside an extended header")
        return data

    def _first_header(self, block: bytes) -> Header | None:
        """The header at a member's border, None at the end of the archive."""
        if block == _ZEROS:
            behind = self._behind_zeros()
            if behind is None:
                return None
            block = behind
            self._start = self._source.offset - BLOCK
        if not block and self._start == 0:
            raise self._damage("the shard is empty (0 bytes)", is_retryable=self._source.is_remote)
        if not block:
            raise self._cut("at a member's border, before the mark of its end")
        try:
            return self._checked(block)
        except HeaderError as error:
            if self._start > 0:
                raise
            raise self._damage(f"not a tar archive: {looks_like(block)}") from error

    def _checked(self, block: bytes) -> Header:
        if len(block) < BLOCK and self._source.offset > BLOCK:
            raise self._cut(f"inside a header, {len(block)} of {BLOCK} bytes are there")
        header = parse_header(block)
        self._plain_headers.learn(block)
        return header

    def _behind_zeros(self) -> bytes | None:
        """After one block of zeros: the first header of a concatenated archive, None at the end of the file."""
        num_zeros = 1
        while (block := self._source.take(BLOCK)) == _ZEROS:
            num_zeros += 1
        if _is_header(block):
            if num_zeros == 1:
                self._oddities.append(f"one block of zeros at byte {self._start}: a member may have been lost there")
            return block
        if num_zeros == 1 and block:
            raise self._damage(f"a header of zeros at byte {self._start}")
        if num_zeros == 1:
            self._oddities.append("the archive ends in one block of zeros instead of two")
        if block.strip(b"\0"):
            self._pass_over_garbage(block)
        return None

    def _pass_over_garbage(self, block: bytes) -> None:
        begin = self._source.offset - len(block)
        while block:
            if _is_header(block):
                raise self._damage(
                    f"what follows the zeros at byte {self._start} is no archive, "
                    f"yet there is a header at byte {self._source.offset - BLOCK}"
                )
            block = self._source.take(BLOCK)
        num_bytes = self._source.offset - begin
        self._oddities.append(f"{num_bytes} bytes after the archive's end, at byte {begin}, were ignored")

    def _cut(self, where: str) -> DamageError:
        # A sender that did not tell the length may have been cut off; a file is as long as it is.
        return self._damage(f"the archive is cut {where}", is_retryable=self._source.is_remote)

    def _damage(self, message: str, *, is_retryable: bool = False) -> DamageError:
        end = self._source.num_bytes if self._stop is None else self._stop
        unread = None if end is None else max(0, end - self._start)
        return DamageError(message, offset=self._start, bytes_unread=unread, retryable=is_retryable)


def _is_header(block: bytes) -> bool:
    try:
        parse_header(block)
    except HeaderError:
        return False
    return True
