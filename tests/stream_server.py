"""A web server that answers by a script and notes what it was asked, and what is owed of a shard read from it."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from stream_samples import Reading, jpeg, numbered, tar_bytes, told, unit_of

from geoloc_batch.records import UnitError

DATA = tar_bytes(numbered(40))
WHOLE = [(n, f"{n:05d}", b'{"n": %d}' % n) for n in range(40)]
NO_LENGTH = -1
BLOCK = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How one request is answered."""

    body: bytes = DATA
    """The whole file."""
    status: int = 200
    """Anything but 200: the status alone, and the headers."""
    headers: Mapping[str, str] = field(default_factory=dict)
    etag: str = '"v1"'
    modified: str = ""
    has_ranges: bool = True
    cut_at: int | None = None
    """Byte of the file before which the connection ends."""
    is_reset: bool = False
    """It ends by a reset."""
    stall_at: int | None = None
    """Byte of the file before which nothing comes any more."""
    says_bytes: int | None = None
    """The length that is told, NO_LENGTH for none."""
    is_chunked: bool = False
    raw: bytes | None = None
    """Sent instead of anything that is http."""


class Request(NamedTuple):
    """What a client wanted."""

    path: str
    range: str
    if_range: str


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers in turn, the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = [Answer()]
        self.requests: list[Request] = []
        self.num_sent = 0
        """Bytes of bodies, handed to the kernel at least."""
        self.is_over = threading.Event()

    def url(self, name: str = "a") -> str:
        """The address of a shard."""
        return f"http://127.0.0.1:{self.server_port}/{name}.tar"

    @property
    def ranges(self) -> list[str]:
        """The Range header of each request, "" where there was none."""
        return [request.range for request in self.requests]

    def handle_error(self, *_: object) -> None:
        """A client that goes away is nothing to talk about."""


@contextmanager
def running_server() -> Iterator[Server]:
    """A server in a thread of its own."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        answer = self.server.answers[0]
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            return
        self.send_response_only(answer.status)
        if answer.status == 200 and answer.says_bytes != NO_LENGTH:
            self.send_header("Content-Length", str(answer.says_bytes or len(answer.body)))
        self.end_headers()

    def do_GET(self) -> None:
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        asked = Request(self.path, self.headers.get("Range", ""), self.headers.get("If-Range", ""))
        self.server.requests.append(asked)
        if answer.raw is not None:
            self.wfile.write(answer.raw)
        elif answer.status != 200:
            self.send_response_only(answer.status)
            self._send_headers(answer, 0)
        else:
            self._send_file(answer, asked)

    def _send_file(self, answer: Answer, asked: Request) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", asked.range)
        start = int(found[1]) if found else 0
        is_same = asked.if_range in ("", answer.etag, answer.modified)
        if found and answer.has_ranges and is_same and start >= len(answer.body):
            self.send_response_only(416)
            self._send_headers(answer, 0)
            return
        if found and answer.has_ranges and is_same:
            self.send_response_only(206)
            total = "*" if answer.is_chunked else len(answer.body)
            if "Content-Range" not in answer.headers:
                self.send_header("Content-Range", f"bytes {start}-{len(answer.body) - 1}/{total}")
        else:
            start = 0
            self.send_response_only(200)
        self._send_headers(answer, answer.says_bytes if answer.says_bytes is not None else len(answer.body) - start)
        self._send_body(answer, start)

    def _send_headers(self, answer: Answer, num_bytes: int) -> None:
        if answer.is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif num_bytes != NO_LENGTH:
            self.send_header("Content-Length", str(num_bytes))
        told = {"ETag": answer.etag, "Last-Modified": answer.modified, **answer.headers}
        for name, text in told.items():
            if text:
                self.send_header(name, text)
        self.end_headers()

    def _send_body(self, answer: Answer, start: int) -> None:
        ends = [end for end in (answer.cut_at, answer.stall_at, len(answer.body)) if end is not None]
        with suppress(ConnectionError):
            for at in range(start, min(ends), BLOCK):
                part = answer.body[at : min(at + BLOCK, *ends)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if answer.is_chunked else part)
                self.server.num_sent += len(part)
            if answer.is_chunked and min(ends) == len(answer.body):
                self.wfile.write(b"0\r\n\r\n")
        if answer.stall_at is not None:
            self.server.is_over.wait(30)
        if answer.is_reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def read(server: Server, *answers: Answer) -> Reading:
    """Read a shard while the server gives these answers."""
    server.answers = list(answers)
    return Reading(unit_of(server.url()))


def unit_error(reading: Reading) -> UnitError:
    """The error that there must be."""
    error = reading.reader.unit_error
    assert error is not None
    return error


def assert_whole(reading: Reading) -> None:
    """Every photo of DATA, once and in order."""
    assert reading.reader.unit_error is None
    assert told(reading.samples) == WHOLE
    assert reading.photos == [jpeg(seed=n) for n in range(40)]


def assert_a_beginning(reading: Reading, num_bytes: int | None = len(DATA)) -> None:
    """The photos before the damage and nothing else; the error says where the first lost one begins."""
    error, rows = unit_error(reading), len(reading.samples)
    assert told(reading.samples) == WHOLE[:rows]
    assert reading.photos == [jpeg(seed=n) for n in range(rows)]
    assert error.retryable
    assert error.offset >= 0
    assert error.bytes_unread == (None if num_bytes is None else num_bytes - error.offset)
