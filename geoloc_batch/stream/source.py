"""The bytes of a shard, front to back: a file by pread, or a stream from a pipe, a server or gzip.

    open_source -> FileSource     a regular file, by os.pread; skipping costs nothing
                `- StreamSource   anything that can only be read on: pipe:, http(s), gzip, a named pipe

A file is never mapped: cutting a mapped file is a SIGBUS, cutting this one is a short read.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from typing import Protocol

from geoloc_batch.stream.download import HttpStream
from geoloc_batch.stream.gunzip import GZIP_MAGIC, Gunzip
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.streams import ByteStream, PipeStream, PlainStream
from geoloc_batch.stream.web import is_http

FILE_BLOCK = 4096
"""Bytes that are read of a file at least."""

STREAM_BLOCK = 1 << 16
"""Bytes per read of a stream, at most. With 1 MB the reader of a server's shard works three times as long: so much is
allocated however little comes, and what a `take` leaves is copied. Deflate may unpack them to a thousand times as many.
"""


class SourceError(Exception):
    """The next bytes cannot be had. ``retryable`` for a fault of the transport, not of the bytes themselves."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Source(Protocol):
    """A shard's bytes for the tar reader."""

    offset: int
    """Position of the next byte (of the uncompressed stream for gzip)."""
    num_bytes: int | None
    """Length of the shard, None where it is not known."""
    is_remote: bool
    """Whether a missing end may be the transport's fault."""

    @property
    def warnings(self) -> list[str]:
        """What was odd so far."""
        ...

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end. Raises SourceError."""
        ...

    def skip(self, size: int) -> int:
        """Pass over bytes; returns how many there were."""
        ...

    def close(self) -> None:
        """Let go of the shard."""
        ...


class FileSource:
    """A regular file, read by pread.

    What is small comes out of a block of 4 kB, so that a json and the headers around it cost one call. What is larger
    is read by a call of its own, straight into the bytes that are handed on: a photo is never copied.

    The length is the one at opening: a file that shrinks meanwhile is a SourceError, one that grows is read to where
    it ended.
    """

    is_remote = False

    def __init__(self, fd: int, *, start: int = 0) -> None:
        self.num_bytes: int | None = os.fstat(fd).st_size
        self._end: int = self.num_bytes
        self.offset = start
        self.warnings: list[str] = []
        self._fd = fd
        self._buffer = b""
        self._at = 0
        if hasattr(os, "posix_fadvise"):
            # The kernel reads further ahead than it otherwise would.
            os.posix_fadvise(fd, start, 0, os.POSIX_FADV_SEQUENTIAL)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        at = self._at
        end = at + size
        if end > len(self._buffer):
            size = max(0, min(size, self._end - self.offset))
            if size > FILE_BLOCK:
                data = self._read(size, self.offset)
                self._buffer, self._at = b"", 0
                self.offset += size
                return data
            self._buffer = self._read(min(FILE_BLOCK, self._end - self.offset), self.offset)
            at, end = 0, size
        self._at = end
        self.offset += size
        return self._buffer[at:end]

    def _read(self, size: int, position: int) -> bytes:
        """Exactly so many bytes, which the file had when it was opened."""
        data = b""
        # One call gives at most 2 GB, and some network file systems give less than they could.
        while len(data) < size:
            try:
                part = os.pread(self._fd, size - len(data), position + len(data))
            except OSError as error:
                raise SourceError(f"reading failed: {error}", retryable=True) from error
            if not part:
                now = os.fstat(self._fd).st_size
                raise SourceError(f"the file shrank from {self._end} to {now} bytes while it was read", retryable=True)
            data = data + part if data else part
        return data

    def peek(self, size: int, position: int) -> bytes:
        """Bytes at any place, fewer only at the end of the file; the next `take` is not moved by it."""
        return self._read(max(0, min(size, self._end - position)), position)

    def skip(self, size: int) -> int:
        """Pass over bytes without reading them."""
        size = max(0, min(size, self._end - self.offset))
        self._at += size
        self.offset += size
        return size

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class StreamSource:
    """A stream that can only be read on; gzip is recognised by its magic and unpacked on the way."""

    def __init__(self, stream: ByteStream) -> None:
        self.offset = 0
        self.is_remote = stream.is_remote
        self.num_bytes: int | None = stream.num_bytes
        self._stream = stream
        self._unpack: Gunzip | None = None
        self._buffer = b""
        self._is_begun = False
        self._oddities: list[str] = []

    @property
    def warnings(self) -> list[str]:
        """What was odd about the transport, and about gzip."""
        return [*self._stream.warnings, *self._oddities]

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the stream."""
        parts = [self._buffer]
        missing = size - len(self._buffer)
        while missing > 0 and (part := self._more()):
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts) if len(parts) > 1 else self._buffer
        self._buffer = data[size:]
        self.offset += min(size, len(data))
        return data[:size]

    def skip(self, size: int) -> int:
        """Read and drop bytes."""
        left = size
        while left > 0 and (part := self.take(min(left, STREAM_BLOCK))):
            left -= len(part)
        return size - left

    def close(self) -> None:
        """End the transport."""
        self._stream.close()

    def _more(self) -> bytes:
        part = self._read(STREAM_BLOCK) if self._is_begun else self._begin()
        return self._unpacked(part) if self._unpack else part

    def _begin(self) -> bytes:
        self._is_begun = True
        head = b""
        while len(head) < len(GZIP_MAGIC) and (part := self._read(STREAM_BLOCK)):
            head += part
        # A server that was asked twice for the beginning may have answered otherwise the second time.
        self.num_bytes, self.is_remote = self._stream.num_bytes, self._stream.is_remote
        if head.startswith(GZIP_MAGIC):
            self._unpack = Gunzip(self._oddities)
            # The length is that of the packed bytes, positions count the unpacked ones.
            self.num_bytes = None
        return head

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            raise SourceError(str(error), retryable=True) from error

    def _unpacked(self, packed: bytes) -> bytes:
        """The next unpacked bytes, b"" only at the end; `packed` is what was read last."""
        assert self._unpack is not None
        try:
            while True:
                if not packed:
                    return self._unpack.finish()
                if data := self._unpack.feed(packed):
                    return data
                packed = self._read(STREAM_BLOCK)
        except (zlib.error, EOFError) as error:
            is_cut = isinstance(error, EOFError)
            raise SourceError(f"damaged gzip: {error}", retryable=is_cut and self.is_remote) from error


def open_source(shard: str, *, start: int = 0, interrupt: Interrupt | None = None) -> Source:
    """Open a shard.

    Args:
        shard: a path, `pipe:COMMAND` or an http(s) URL.
        start: first byte to read, for plain local files only.
        interrupt: when set by another thread, opening and reading end in an error, whatever they wait for.

    Raises:
        OSError: it cannot be opened.
    """
    interrupt = interrupt or Interrupt()
    if shard.startswith("pipe:"):
        return StreamSource(PipeStream(shard.removeprefix("pipe:"), interrupt))
    if is_http(shard):
        return StreamSource(HttpStream(shard, interrupt))
    # Opening a named pipe would otherwise wait for its writer, and know no interruption.
    fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | (0 if os.path.isfile(shard) else os.O_NONBLOCK))
    try:
        status = os.fstat(fd)
        is_file = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a shard", shard)
        if is_file and os.pread(fd, len(GZIP_MAGIC), 0) != GZIP_MAGIC:
            return FileSource(fd, start=start)
        return StreamSource(PlainStream(fd, status.st_size if is_file else None, interrupt))
    except BaseException:
        os.close(fd)
        raise
