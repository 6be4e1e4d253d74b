"""Shards on a server: http and https addresses, the body of one GET."""

from __future__ import annotations

import errno
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from geoloc_batch.stream.interrupt import Interrupt

OPEN_TRIES = 3
RETRY_DELAY_S = 0.5
"""Wait before the second try; it doubles with each further one."""
STALL_TIMEOUT_S = 60.0
"""A server that sends nothing for this long is given up."""

_GONE = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
# What http.client lets through: its own errors, and ValueError where an answer holds numbers that are none.
_FAULTS = (OSError, http.client.HTTPException, ValueError)
_PATH_SAFE = "/%:@!$&'()*+,;="


def is_http(shard: str) -> bool:
    """Whether the shard's name is an http or https address."""
    return shard.startswith(("http://", "https://"))


def address_fault(url: str) -> str:
    """Why nobody can be asked for what the address names; "" where somebody can."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        ascii_host = host.encode("idna")
    except ValueError as error:
        return str(error)
    if parts.username is not None:
        return "names and passwords are not sent; use a command such as 'pipe:curl -fsS ADDRESS'"
    if not host or port == 0:
        return "it names no host" if not host else "port 0 cannot be asked"
    if re.search(rb"[\x00-\x20\x7f]", ascii_host):
        return f"{host!r} is no host"
    return ""


def as_sent(url: str) -> str:
    """The address in ASCII: what is beyond it, and spaces, percent-encoded; what is encoded already stays."""
    parts = urlsplit(url)
    place = parts.netloc
    if not place.isascii():
        place = (parts.hostname or "").encode("idna").decode() + (f":{parts.port}" if parts.port else "")
    path, query = (
        re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(os.fsencode(part), safe=safe))
        for part, safe in ((parts.path, _PATH_SAFE), (parts.query, _PATH_SAFE + "?"))
    )
    return urlunsplit((parts.scheme, place, path, query, ""))


class HttpStream:
    """The body of one GET. Opening is tried three times with growing waits; a cut body is an OSError."""

    def __init__(self, url: str, interrupt: Interrupt) -> None:
        self._url = url
        self._interrupt = interrupt
        try:
            self._response = _with_retries(lambda: _open(url, "GET", interrupt), url, interrupt)
        except BaseException:
            interrupt.unwatch()
            raise
        self.num_bytes: int | None = self._response.length
        # A sender that told the length can prove that the shard itself, not the connection, is cut.
        self.is_remote = self.num_bytes is None
        self._num_read = 0

    def read(self, size: int) -> bytes:
        """Bytes as they come; at the end, OSError if fewer came than the server had promised."""
        try:
            data = self._response.read1(size)
        except _FAULTS as error:
            self._interrupt.check()
            raise OSError(f"{self._url}: the connection failed after {self._num_read} bytes: {error!r}") from error
        self._num_read += len(data)
        if not data:
            self._interrupt.check()
            if self.num_bytes is not None and self._num_read < self.num_bytes:
                raise OSError(f"{self._url}: the connection was cut after {self._num_read} of {self.num_bytes} bytes")
        return data

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._interrupt.unwatch()


def head_num_bytes(url: str, *, timeout_s: float = 10.0) -> int:
    """Length of what an address holds, by one HEAD request; 0 where the server does not tell.

    Raises:
        OSError: the server cannot be reached.
    """
    interrupt = Interrupt()
    try:
        with _open(url, "HEAD", interrupt, timeout_s=timeout_s) as response:
            return max(0, int(response.headers.get("Content-Length") or 0))
    except urllib.error.HTTPError as error:
        error.close()
        return 0
    except (http.client.HTTPException, ValueError):
        return 0
    finally:
        interrupt.unwatch()


class _HttpHandler(urllib.request.HTTPHandler):
    """urllib's handler, on connections that an Interrupt ends."""

    def __init__(self, interrupt: Interrupt) -> None:
        super().__init__()
        self._interrupt = interrupt

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._interrupt), req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    """The same for https."""

    def __init__(self, interrupt: Interrupt) -> None:
        super().__init__()
        self._interrupt = interrupt

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, http.client.HTTPSConnection, self._interrupt), req)


class _NoFtp(urllib.request.FTPHandler):
    """urllib would follow a server that sends on to an ftp address, and wait there without an end."""

    def ftp_open(self, req: urllib.request.Request) -> NoReturn:
        raise OSError(f"the server sent on to {req.full_url}, which is neither http nor https")


def _connection(
    kind: type[http.client.HTTPConnection], interrupt: Interrupt, host: str, **options: Any
) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    # http.client's own hook for how a socket is made; TLS and proxies are built on top of it.
    connection._create_connection = interrupt.connect  # type: ignore[attr-defined]
    return connection


def _open(url: str, method: str, interrupt: Interrupt, *, timeout_s: float | None = None) -> http.client.HTTPResponse:
    # Stored bytes are wanted as they are, whatever the server could pack on the way.
    headers = {"User-Agent": "geoloc-batch", "Accept-Encoding": "identity"}
    request = urllib.request.Request(as_sent(url), method=method, headers=headers)
    opener = urllib.request.build_opener(_HttpHandler(interrupt), _HttpsHandler(interrupt), _NoFtp())
    answer = opener.open(request, timeout=timeout_s or STALL_TIMEOUT_S)
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def _with_retries(
    attempt: Callable[[], http.client.HTTPResponse], url: str, interrupt: Interrupt
) -> http.client.HTTPResponse:
    # Its words alone: the error itself would keep the connection's halves alive in a cycle with this frame.
    reason = ""
    for number in range(OPEN_TRIES):
        if number:
            interrupt.sleep(RETRY_DELAY_S * 2 ** (number - 1))
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _GONE:
                raise OSError(_GONE[error.code], f"the server answered {error.code} {error.reason}", url) from error
            reason = str(error)
        except _FAULTS as error:
            reason = str(error)
        interrupt.check()
    raise OSError(f"{url} could not be opened in {OPEN_TRIES} tries: {reason}")
