"""gzip as a stream."""

from __future__ import annotations

import zlib

GZIP_MAGIC = b"\x1f\x8b"


class Gunzip:
    """gzip members one after another, their checksums verified by zlib; other bytes after them are a warning."""

    def __init__(self, warnings: list[str]) -> None:
        self._warnings = warnings
        self._inflate = zlib.decompressobj(wbits=31)
        self._num_ignored = 0

    def feed(self, packed: bytes) -> bytes:
        """What the next packed bytes unpack to. Raises zlib.error on damage."""
        if self._num_ignored:
            self._num_ignored += len(packed)
            return b""
        parts = [self._inflate.decompress(packed)]
        while self._inflate.eof:
            rest = self._inflate.unused_data.lstrip(b"\0")
            if not rest:
                break
            if not rest.startswith(GZIP_MAGIC[: len(rest)]):
                self._num_ignored = len(rest)
                break
            self._inflate = zlib.decompressobj(wbits=31)
            parts.append(self._inflate.decompress(rest))
        return b"".join(parts)

    def finish(self) -> bytes:
        """Say that nothing comes any more. Raises EOFError when something should."""
        if not self._inflate.eof:
            raise EOFError("the compressed stream ends too early")
        if self._num_ignored:
            self._warnings.append(f"{self._num_ignored} bytes after the end of the gzip stream were ignored")
            self._num_ignored = 0
        return b""
