from __future__ import annotations

import gzip
import http.server
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stream_samples import Reading, numbered, tar_bytes, told, unit_of, write_tar

from geoloc_batch.records import UnitError
from geoloc_batch.stream import web as web_module
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader
from geoloc_batch.stream.shards import expand_shards, plan_units

DATA = tar_bytes(numbered(40))


def unit_error(reading: Reading) -> UnitError:
    assert reading.reader.unit_error is not None
    return reading.reader.unit_error


def is_whole(reading: Reading) -> bool:
    return len(reading.samples) == 40 and reading.reader.unit_error is None and reading.reader.warnings == ()


def is_a_beginning(reading: Reading) -> bool:
    rows = [row for row, _, _ in told(reading.samples)]
    return rows == list(range(len(rows))) and 0 < len(rows) < 40


def test_a_pipe_is_read_like_its_file(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    assert is_whole(Reading(unit_of(f"pipe:cat {shard}")))
    assert is_whole(Reading(unit_of(f"pipe:gzip -c < {shard}")))


def test_a_named_pipe_is_read_as_a_stream(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    writer = threading.Thread(target=lambda: (tmp_path / "a.tar").write_bytes(DATA))
    writer.start()
    assert is_whole(Reading(unit_of(tmp_path / "a.tar")))
    writer.join()


def test_a_command_that_fails_is_a_retryable_unit_error_even_after_a_whole_tar(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:cat {shard}; exit 7"))
    assert len(reading.samples) == 40
    assert unit_error(reading).retryable
    assert "exit status 7" in unit_error(reading).message
    cut = Reading(unit_of(f"pipe:head -c 20000 {shard}; kill -9 $$"))
    assert is_a_beginning(cut)
    assert "signal 9" in unit_error(cut).message


def test_a_pipe_that_ends_early_without_complaint_may_be_tried_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:head -c 20000 {shard}"))
    assert is_a_beginning(reading)
    assert unit_error(reading).retryable
    assert unit_error(reading).bytes_unread is None
    assert unit_error(Reading(unit_of("pipe:true"))).retryable
    assert not unit_error(Reading(unit_of("pipe:echo no tar at all"))).retryable


def test_a_pipe_is_ended_when_enough_photos_were_read(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(40))
    reading = Reading(unit_of(f"pipe:cat {shard}; sleep 60", max_rows=3))
    assert [sample.row for sample in reading.samples] == [0, 1, 2]
    assert reading.reader.unit_error is None


def test_abort_ends_a_pipe_that_says_nothing(tmp_path: Path) -> None:
    interrupt = Interrupt()
    reader = UnitReader(unit_of(f"pipe:touch {tmp_path}/begun; sleep 60 & sleep 60"), interrupt)
    thread = threading.Thread(target=lambda: list(reader))
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    interrupt.set()
    thread.join(10)
    assert not thread.is_alive()


class Server(http.server.ThreadingHTTPServer):
    """Serves DATA in several ways, by the path's first part."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.failures = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()

    def do_GET(self) -> None:
        kind = self.path.strip("/").removesuffix(".tar")
        self.server.requests.append(kind)
        if kind == "missing":
            self.send_error(404)
        elif kind == "failing" or (kind == "flaky" and self.server.requests.count("flaky") < 3):
            self.send_error(503)
        elif kind in ("moved", "moved-to-ftp", "moved-to-nowhere"):
            self.send_response(302)
            places = {"moved": self.server.url("good"), "moved-to-ftp": "ftp://127.0.0.1/a"}
            self.send_header("Location", places.get(kind, "http://[half/a.tar"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_body(kind)

    def send_body(self, kind: str) -> None:
        body = gzip.compress(DATA) if kind == "gzip" else DATA
        self.send_response(200)
        if kind == "bad-chunks":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"4e20\r\n" + body[:20000] + b"\r\nthese are no digits\r\n"
        elif kind not in ("lengthless", "lengthless-cut"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "stall":
            self.wfile.write(body[:20000])
            self.wfile.flush()
            time.sleep(30)
        elif kind in ("cut", "lengthless-cut"):
            self.wfile.write(body[:20000])
        else:
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(web_module, "RETRY_DELAY_S", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["good", "gzip", "moved", "lengthless"])
def test_a_shard_of_a_server_is_read_like_its_file(server: Server, kind: str) -> None:
    assert is_whole(Reading(unit_of(server.url(kind))))


def test_a_cut_connection_is_a_retryable_unit_error_after_the_whole_photos(server: Server) -> None:
    reading = Reading(unit_of(server.url("cut")))
    assert is_a_beginning(reading)
    error = unit_error(reading)
    assert error.retryable
    assert f"cut after 20000 of {len(DATA)} bytes" in error.message
    assert error.bytes_unread == len(DATA) - error.offset
    reading = Reading(unit_of(server.url("lengthless-cut")))
    assert is_a_beginning(reading)
    assert unit_error(reading).retryable


def test_opening_is_tried_three_times(server: Server) -> None:
    assert is_whole(Reading(unit_of(server.url("flaky"))))
    assert server.requests == ["flaky"] * 3
    reading = Reading(unit_of(server.url("failing")))
    assert server.requests[3:] == ["failing"] * 3
    assert (unit_error(reading).offset, unit_error(reading).retryable) == (-1, True)
    assert "503" in unit_error(reading).message


def test_an_absent_shard_is_not_asked_for_again(server: Server) -> None:
    error = unit_error(Reading(unit_of(server.url("missing"))))
    assert server.requests == ["missing"]
    assert (error.offset, error.retryable) == (-1, False)
    assert "404" in error.message


def test_a_server_that_is_not_there_is_a_retryable_unit_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "RETRY_DELAY_S", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar"
    error = unit_error(Reading(unit_of(url)))
    assert (error.offset, error.retryable) == (-1, True)
    assert plan_units([url])[0].num_bytes == 0


def test_a_server_that_stalls_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 0.3)
    reading = Reading(unit_of(server.url("stall")))
    assert is_a_beginning(reading)
    assert unit_error(reading).retryable


def test_close_does_not_wait_for_a_server_that_stalls(server: Server) -> None:
    stream = BatchStream([unit_of(server.url("stall"))], side=20, batch_size=2, config=StreamConfig(decode_threads=1))
    next(iter(stream))
    time.sleep(0.2)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("geoloc-")]


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("a b", "/a%20b"),
        ("é/東", "/%C3%A9/%E6%9D%B1"),
        ("a%20b", "/a%20b"),
        ("100%", "/100%25"),
        ("a[0]{1}", "/a%5B0%5D%7B1%7D"),
        (os.fsdecode(b"caf\xe9"), "/caf%E9"),
        ("x?q=a b&r=ü/1", "/x?q=a%20b&r=%C3%BC/1"),
    ],
)
def test_an_address_is_percent_encoded_when_it_is_asked_for(server: Server, name: str, sent: str) -> None:
    url = server.url(name)
    # Braces would be taken for a range.
    (shard,) = expand_shards([url]) if "{" not in url else [url]
    (unit,) = plan_units([shard])
    reading = Reading(unit)
    assert is_whole(reading)
    assert unit.num_bytes == len(DATA)
    assert {sample.shard for sample in reading.samples} == {url}
    assert server.requests == [f"{sent}.tar".strip("/").removesuffix(".tar")]


def test_a_host_beyond_ascii_is_asked_for_by_its_registered_name() -> None:
    assert web_module.as_sent("http://bücher.example:8080/ä") == "http://xn--bcher-kva.example:8080/%C3%A4"


@pytest.mark.parametrize(("kind", "words"), [("moved-to-ftp", "ftp://127.0.0.1/a, which is"), ("moved-to-nowhere", "")])
def test_a_server_that_sends_on_to_no_server_is_a_retryable_unit_error(server: Server, kind: str, words: str) -> None:
    error = unit_error(Reading(unit_of(server.url(kind))))
    assert (error.offset, error.retryable) == (-1, True)
    assert words in error.message


def test_a_body_in_damaged_chunks_is_a_retryable_unit_error(server: Server) -> None:
    reading = Reading(unit_of(server.url("bad-chunks")))
    assert is_a_beginning(reading)
    assert unit_error(reading).retryable


@pytest.mark.parametrize(
    "answer", [b"HELLO\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000]
)
def test_a_server_that_speaks_no_http_is_a_retryable_unit_error_of_unknown_size(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(web_module, "RETRY_DELAY_S", 0.01)

    class Stranger(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(10_000)
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Stranger) as stranger:
        thread = threading.Thread(target=stranger.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            url = f"http://127.0.0.1:{stranger.server_address[1]}/a.tar"
            assert plan_units([url])[0].num_bytes == 0
            error = unit_error(Reading(unit_of(url)))
        finally:
            stranger.shutdown()
            thread.join()
    assert (error.offset, error.retryable) == (-1, True)
    assert "could not be opened in 3 tries" in error.message


def test_sizes_of_remote_shards_are_asked_for(server: Server) -> None:
    units = plan_units([server.url("good"), "pipe:true"])
    assert [unit.num_bytes for unit in units] == [len(DATA), 0]
