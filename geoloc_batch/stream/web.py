"""http and https: addresses, and one request to a server. For the body of a shard see download."""

from __future__ import annotations

import errno
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from geoloc_batch.stream.interrupt import Interrupt

STALL_TIMEOUT_S = 60.0
"""A server that sends nothing for this long is taken for gone."""

FAULTS = (OSError, http.client.HTTPException, ValueError)
"""What http.client lets through: its own errors, and ValueError where an answer holds numbers that are none."""

_PASSING = frozenset({408, 425, 429})
# By errno, opening tells what another run may find otherwise from what no run will.
_ERRNO = {
    **dict.fromkeys((400, 405, 410, 414), errno.EINVAL),
    **dict.fromkeys((401, 402, 403, 407, 451), errno.EACCES),
    404: errno.ENOENT,
}
_PATH_SAFE = "/%:@!$&'()*+,;="


class RefusedError(OSError):
    """Asking again at once is of no use."""


class BusyError(OSError):
    """The server answered a 5xx, 408, 425 or 429: it may answer otherwise soon."""

    def __init__(self, words: str, retry_after_s: float) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s
        """How long it asks us to wait, 0 where it does not say."""


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


def head_num_bytes(url: str, *, timeout_s: float = 10.0) -> int:
    """Length of what an address holds, by one HEAD request; 0 where the server does not tell.

    Raises:
        OSError: the server cannot be reached.
    """
    interrupt = Interrupt()
    try:
        with ask(url, interrupt, method="HEAD", timeout_s=timeout_s) as answer:
            return max(0, int(answer.headers.get("Content-Length") or 0))
    except (BusyError, RefusedError, http.client.HTTPException, ValueError):
        return 0
    finally:
        interrupt.unwatch()


def ask(
    url: str,
    interrupt: Interrupt,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> http.client.HTTPResponse:
    """One request; redirections are followed.

    Args:
        url: as the user wrote it.
        interrupt: ends the waiting; it watches the connection until told otherwise.
        method: GET or HEAD.
        headers: to be sent beside our own.
        timeout_s: None for STALL_TIMEOUT_S.

    Raises:
        BusyError: the server is busy.
        RefusedError: it answered anything else that is no success, or its certificate is not to be trusted.
        OSError, http.client.HTTPException, ValueError: the connection failed, or what came over it is no http.
    """
    # Stored bytes are wanted as they are, whatever the server could pack on the way.
    sent = {"User-Agent": "geoloc-batch", "Accept-Encoding": "identity", **(headers or {})}
    request = urllib.request.Request(as_sent(url), method=method, headers=sent)
    opener = urllib.request.build_opener(_HttpHandler(interrupt), _HttpsHandler(interrupt), _NoFtp())
    try:
        answer = opener.open(request, timeout=timeout_s or STALL_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        words = f"the server answered {error.code} {error.reason}"
        if error.code >= 500 or error.code in _PASSING:
            raise BusyError(words, _retry_after_s(error.headers)) from None
        raise RefusedError(_ERRNO.get(error.code, errno.EIO), words) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise RefusedError(errno.EACCES, str(error.reason)) from None
        raise OSError(str(error.reason)) from None
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def _retry_after_s(headers: Message) -> float:
    """What the server asks us to wait: seconds, or a date, which is read by its own clock."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(text) - now).total_seconds())
    except (TypeError, ValueError):
        return 0.0


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
        raise RefusedError(errno.EIO, f"the server sent on to {req.full_url}, which is neither http nor https")


def _connection(
    kind: type[http.client.HTTPConnection], interrupt: Interrupt, host: str, **options: Any
) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    # http.client's own hook for how a socket is made; TLS and proxies are built on top of it.
    connection._create_connection = interrupt.connect  # type: ignore[attr-defined]
    return connection
