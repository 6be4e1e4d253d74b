"""The body of one shard on a server, taken up again where a connection broke, and only if it is still the same file.

    GET                                  the body, byte 0 on
    a cut, a stall, a 5xx, ...           wait (backoff), then
    GET, Range: bytes=N-, If-Range: V    206: the same file, byte N on
                                         200: another file, or no ranges: the end; but of the same strong ETag
                                         N bytes are passed over

V is the file's strong ETag, or the time of its last change where its length is known too.
"""

from __future__ import annotations

import http.client
import re
from typing import NamedTuple

from geoloc_batch.stream.backoff import Backoff
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.web import FAULTS, BusyError, RefusedError, ask

PROGRESS_BYTES = 1 << 20
"""So much must come, or the failures meanwhile are counted as in a row."""

_SKIP_BLOCK = 1 << 20


class Version(NamedTuple):
    """What tells one state of a file from another."""

    etag: str
    """As sent; a weak one begins with W/ and promises no equal bytes."""
    modified: str
    num_bytes: int | None

    @property
    def strong_etag(self) -> str:
        """The ETag, "" where it promises no equal bytes."""
        return "" if self.etag.startswith("W/") else self.etag

    @property
    def validator(self) -> str:
        """What If-Range is to hold, "" where nothing will do."""
        return self.strong_etag or (self.modified if self.num_bytes is not None else "")

    def is_other(self, answer: http.client.HTTPResponse, num_bytes: int | None) -> bool:
        """Whether an answer is about another state of the file, by all that both tell."""
        etag, modified = _told(answer)
        pairs: list[tuple[object, object]] = [(self.num_bytes, num_bytes), (self.etag, etag)]
        # Copies of one file on several machines may differ in their times.
        if not self.strong_etag or self.strong_etag != etag:
            pairs.append((self.modified, modified))
        return any(before and now and before != now for before, now in pairs)


def _told(answer: http.client.HTTPResponse) -> tuple[str, str]:
    """ETag and time of the last change, "" where the server does not tell."""
    return answer.headers.get("ETag", "").strip(), answer.headers.get("Last-Modified", "").strip()


class HttpStream:
    """The body of a GET, with as many further requests as it takes, within the bounds of Backoff.

    Args:
        url: the address.
        interrupt: ends every wait in an OSError.

    Raises:
        OSError: the server refuses, or cannot be had in so many tries.
    """

    def __init__(self, url: str, interrupt: Interrupt) -> None:
        self.num_bytes: int | None = None
        self.is_remote = True
        self._url = url
        self._interrupt = interrupt
        self._backoff = Backoff(interrupt)
        self._reason = ""
        self._num_read = 0
        self._progress_at = 0
        self._failed_at = 0
        self._version = Version("", "", None)
        self._answer: http.client.HTTPResponse | None = None
        try:
            while self._answer is None:
                self._try_to_connect()
        except BaseException:
            interrupt.unwatch()
            raise

    @property
    def warnings(self) -> list[str]:
        """That the server had to be asked again, once for all times."""
        times = self._backoff.num_retries
        if not times:
            return []
        often = "once" if times == 1 else f"{times} times"
        return [f"the server was asked again {often}, the last time after {self._failed_at} bytes: {self._reason}"]

    def read(self, size: int) -> bytes:
        """Bytes as they come, b"" at the end.

        Raises:
            OSError: the connection failed and cannot be taken up again; it says after how many bytes, and why.
        """
        while True:
            if self._answer is None:
                self._try_to_connect()
                continue
            try:
                data = self._answer.read1(size)
                if not data:
                    self._interrupt.check()
                    if self.num_bytes is not None and self._num_read < self.num_bytes:
                        raise ConnectionError("it was cut")
            except FAULTS as error:
                self._fail(error)
                continue
            self._num_read += len(data)
            if self._num_read - self._progress_at >= PROGRESS_BYTES:
                self._progress_at = self._num_read
                self._backoff.note_progress()
            return data

    def close(self) -> None:
        """Close the connection."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        self._interrupt.unwatch()

    def _try_to_connect(self) -> None:
        """One request, for what is missing yet; if it fails in a way that may pass, wait."""
        try:
            self._answer = self._resumed() if self._num_read else self._begun()
        except RefusedError as refusal:
            self._interrupt.check()
            if not self._num_read:
                raise
            raise self._ended(f"{self._reason}; it cannot be taken up again: {refusal.strerror or refusal}") from None
        except FAULTS as error:
            self._fail(error)

    def _begun(self) -> http.client.HTTPResponse:
        answer = ask(self._url, self._interrupt)
        if answer.status != 200:
            answer.close()
            raise ConnectionError(f"the server answered {answer.status} to a request for the whole")
        self.num_bytes = answer.length
        # A sender that told the length can prove that the shard itself, not the connection, is cut.
        self.is_remote = self.num_bytes is None
        self._version = Version(*_told(answer), self.num_bytes)
        return answer

    def _resumed(self) -> http.client.HTTPResponse:
        """The rest of the body. Raises RefusedError where it would not be the same file's."""
        if not self._version.validator:
            raise RefusedError("the server does not tell the version of the file, so it may have changed")
        headers = {"Range": f"bytes={self._num_read}-", "If-Range": self._version.validator}
        answer = ask(self._url, self._interrupt, headers=headers)
        try:
            if answer.status == 206:
                self._check_part(answer)
            elif answer.status != 200:
                raise ConnectionError(f"the server answered {answer.status} to a request for a part")
            else:
                self._check_whole(answer)
                self._pass_over(answer, self._num_read)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check_part(self, answer: http.client.HTTPResponse) -> None:
        told = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"\s*bytes\s+(\d{1,18})-\d{1,18}/(\d{1,18}|\*)\s*", told, re.ASCII)
        if found is None or int(found[1]) != self._num_read:
            raise RefusedError(f"asked for what follows byte {self._num_read}, the server sent {told!r}")
        total = None if found[2] == "*" else int(found[2])
        if self._version.is_other(answer, total):
            raise RefusedError("the file has changed meanwhile")
        if self.num_bytes is None:
            self.num_bytes = total

    def _check_whole(self, answer: http.client.HTTPResponse) -> None:
        if self._version.is_other(answer, answer.length):
            raise RefusedError("the file has changed meanwhile")
        if not self._version.strong_etag or self._version.strong_etag != _told(answer)[0]:
            raise RefusedError("the server sends no part of a file, and no ETag that proves it to be the same")

    def _pass_over(self, answer: http.client.HTTPResponse, size: int) -> None:
        while size > 0:
            data = answer.read1(min(size, _SKIP_BLOCK))
            if not data:
                raise ConnectionError("it was cut while what is known was passed over")
            size -= len(data)

    def _fail(self, error: Exception) -> None:
        """Let go of the connection and wait, or give up."""
        # Its words alone: the error itself would keep the connection's halves alive in a cycle with a frame.
        self._reason = str(error) or repr(error)
        self.close()
        self._interrupt.check()
        self._failed_at = self._num_read
        if not self._backoff.wait(error.retry_after_s if isinstance(error, BusyError) else 0.0):
            raise self._ended(f"{self._backoff.num_vain} tries in a row failed, the last one: {self._reason}")

    def _ended(self, words: str) -> OSError:
        if not self._num_read:
            return OSError(f"{self._url}: {words}")
        total = "" if self.num_bytes is None else f" of {self.num_bytes}"
        return OSError(f"{self._url}: the connection failed after {self._num_read}{total} bytes: {words}")
