"""Streams: the output of a `pipe:` command, the body of an http(s) answer, a file that is read front to back.

The first two raise OSError when the transport fails, also where what came over looked whole: a command that ends with
an error, a connection that closed before the length the server had promised.
"""

from __future__ import annotations

import errno
import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Protocol

OPEN_TRIES = 3
RETRY_DELAY_S = 0.5
"""Wait before the second try; it doubles with each further one."""
STALL_TIMEOUT_S = 60.0
"""A server that sends nothing for this long is given up."""

_GONE = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}


class ByteStream(Protocol):
    """What a StreamSource reads from."""

    num_bytes: int | None
    """Length where the sender told it, None otherwise."""
    is_remote: bool
    """Whether a missing end may be the transport's fault."""

    def read(self, size: int) -> bytes:
        """Bytes as they come, b"" at the end. Raises OSError for a fault of the transport."""
        ...

    def abort(self) -> None:
        """Make a read that is blocked in another thread return."""
        ...

    def close(self) -> None:
        """Let go of the sender."""
        ...


def is_http(shard: str) -> bool:
    """Whether the shard's name is an http or https address."""
    return shard.startswith(("http://", "https://"))


class PlainStream:
    """A local file that must be read front to back: compressed, or not a regular file (a named pipe)."""

    is_remote = False

    def __init__(self, fd: int, num_bytes: int | None) -> None:
        self.num_bytes = num_bytes
        self._fd = fd

    def read(self, size: int) -> bytes:
        """The next bytes."""
        return os.read(self._fd, size)

    def abort(self) -> None:
        """Nothing: a named pipe without a writer blocks until one comes."""

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PipeStream:
    """What `sh -c COMMAND` writes to its standard output.

    The command leads a process group of its own, so that abort and close end whatever it started.
    """

    is_remote = True
    num_bytes: int | None = None

    def __init__(self, command: str) -> None:
        self._command = command
        self._process = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def read(self, size: int) -> bytes:
        """Bytes as they come; at the end, OSError if the command failed."""
        data: bytes = self._output.read(size) or b""
        if not data and (status := self._process.wait()) != 0:
            reason = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
            raise OSError(f"the command of pipe:{self._command} {reason}")
        return data

    def abort(self) -> None:
        """Kill the command."""
        # Not yet waited for, so its id cannot have been given to another process.
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def close(self) -> None:
        """Kill the command if it still runs, and collect it."""
        self.abort()
        self._output.close()
        self._process.wait()


class HttpStream:
    """The body of one GET. Opening is tried three times with growing waits; a cut body is an OSError."""

    is_remote = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._response = _with_retries(lambda: _open(url, "GET"), url)
        self.num_bytes: int | None = self._response.length
        # A sender that told the length can prove that the shard itself, not the connection, is cut.
        self.is_remote = self.num_bytes is None
        self._num_read = 0

    def read(self, size: int) -> bytes:
        """Bytes as they come; at the end, OSError if fewer came than the server had promised."""
        try:
            data = self._response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{self._url}: the connection failed after {self._num_read} bytes: {error!r}") from error
        self._num_read += len(data)
        if not data and self.num_bytes is not None and self._num_read < self.num_bytes:
            raise OSError(f"{self._url}: the connection was cut after {self._num_read} of {self.num_bytes} bytes")
        return data

    def abort(self) -> None:
        """Shut the connection down under a blocked read."""
        try:
            with socket.socket(fileno=os.dup(self._response.fileno())) as twin:
                twin.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):
            return

    def close(self) -> None:
        """Close the connection."""
        self._response.close()


def head_num_bytes(url: str, *, timeout_s: float = 10.0) -> int:
    """Length of what an address holds, by one HEAD request; 0 where the server does not tell.

    Raises:
        OSError: the server cannot be reached.
    """
    try:
        with _open(url, "HEAD", timeout_s=timeout_s) as response:
            return int(response.headers.get("Content-Length") or 0)
    except (urllib.error.HTTPError, ValueError):
        return 0


def _open(url: str, method: str, *, timeout_s: float | None = None) -> http.client.HTTPResponse:
    # Stored bytes are wanted as they are, whatever the server could pack on the way.
    headers = {"User-Agent": "geoloc-batch", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, method=method, headers=headers)
    answer = urllib.request.urlopen(request, timeout=timeout_s or STALL_TIMEOUT_S)
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def _with_retries(attempt: Callable[[], http.client.HTTPResponse], url: str) -> http.client.HTTPResponse:
    reason: Exception | None = None
    for number in range(OPEN_TRIES):
        if number:
            time.sleep(RETRY_DELAY_S * 2 ** (number - 1))
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _GONE:
                raise OSError(_GONE[error.code], f"the server answered {error.code} {error.reason}", url) from error
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
    raise OSError(f"{url} could not be opened in {OPEN_TRIES} tries: {reason}") from reason
