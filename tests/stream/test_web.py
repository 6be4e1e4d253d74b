"""Addresses, and servers that give what was asked for at once, later or never."""

from __future__ import annotations

import gzip
import os
import threading
import time

import pytest
from stream_samples import Reading, unit_of
from stream_server import DATA, NO_LENGTH, Answer, Server, assert_whole, read, unit_error

from geoloc_batch.stream import web as web_module
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.shards import expand_shards, plan_units


@pytest.mark.parametrize(
    "answer",
    [
        Answer(),
        Answer(body=gzip.compress(DATA)),
        Answer(says_bytes=NO_LENGTH),
        Answer(is_chunked=True),
        Answer(etag="", has_ranges=False),
    ],
)
def test_a_shard_of_a_server_is_read_like_its_file_by_one_request(server: Server, answer: Answer) -> None:
    reading = read(server, answer)
    assert_whole(reading)
    assert reading.reader.warnings == ()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 425, 429])
def test_a_server_that_is_busy_at_first_costs_nothing_but_a_warning(server: Server, status: int) -> None:
    reading = read(server, *[Answer(status=status)] * 3, Answer())
    assert_whole(reading)
    assert server.ranges == [""] * 4
    (warning,) = reading.reader.warnings
    assert f"asked again 3 times, the last time after 0 bytes: the server answered {status}" in warning


def test_a_server_that_stays_busy_is_a_retryable_unit_error_of_a_shard_not_opened(server: Server) -> None:
    reading = read(server, Answer(status=503))
    assert len(server.requests) == 5
    error = unit_error(reading)
    assert (reading.items, error.offset, error.bytes_unread, error.retryable) == ([], -1, None, True)
    assert "5 tries in a row failed, the last one: the server answered 503" in error.message


@pytest.mark.parametrize(
    ("status", "is_retryable"),
    [(401, True), (403, True), (404, True), (409, True), (400, False), (405, False), (410, False), (414, False)],
)
def test_a_refusal_is_not_asked_for_again_and_names_its_status(server: Server, status: int, is_retryable: bool) -> None:
    error = unit_error(read(server, Answer(status=status), Answer()))
    assert len(server.requests) == 1
    assert (error.offset, error.retryable) == (-1, is_retryable)
    assert f"cannot be opened: the server answered {status}" in error.message


@pytest.mark.parametrize("raw", [b"HELLO\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"", b"HTTP/1.1 503"])
def test_an_answer_that_breaks_off_or_is_no_http_is_asked_for_again(server: Server, raw: bytes) -> None:
    assert_whole(read(server, Answer(raw=raw), Answer(raw=raw), Answer()))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("location", "words"),
    [("ftp://127.0.0.1/a", "ftp://127.0.0.1/a, which is"), ("http://[half/a.tar", ""), ("/a.tar", "302")],
)
def test_a_server_that_sends_on_to_nowhere_is_a_retryable_unit_error(server: Server, location: str, words: str) -> None:
    error = unit_error(read(server, Answer(status=302, headers={"Location": location})))
    assert (error.offset, error.retryable) == (-1, True)
    assert words in error.message


def test_a_server_that_is_not_there_is_a_retryable_unit_error(server: Server) -> None:
    url = server.url()
    server.server_close()
    error = unit_error(Reading(unit_of(url)))
    assert (error.offset, error.retryable) == (-1, True)
    assert "5 tries in a row failed, the last one: [Errno 111] Connection refused" in error.message


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
    assert_whole(reading)
    assert unit.num_bytes == len(DATA)
    assert {sample.shard for sample in reading.samples} == {url}
    assert [request.path for request in server.requests] == [f"{sent}.tar"]


def test_a_host_beyond_ascii_is_asked_for_by_its_registered_name() -> None:
    assert web_module.as_sent("http://bücher.example:8080/ä") == "http://xn--bcher-kva.example:8080/%C3%A4"


def test_sizes_of_remote_shards_are_asked_for(server: Server) -> None:
    units = plan_units([server.url("a"), "pipe:true", server.url("b")])
    assert [unit.num_bytes for unit in units] == [len(DATA), 0, len(DATA)]
    server.answers = [Answer(status=503)]
    assert plan_units([server.url()])[0].num_bytes == 0


@pytest.mark.parametrize(
    "raw", [b"HELLO\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000]
)
def test_a_server_that_speaks_no_http_is_a_retryable_unit_error_of_unknown_size(server: Server, raw: bytes) -> None:
    server.answers = [Answer(raw=raw)]
    assert plan_units([server.url()])[0].num_bytes == 0
    error = unit_error(Reading(unit_of(server.url())))
    assert (error.offset, error.retryable) == (-1, True)
    assert len(server.requests) == 5


def test_close_does_not_wait_for_a_server_that_stalls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 60.0)
    server.answers = [Answer(stall_at=20_000)]
    stream = BatchStream([unit_of(server.url())], side=20, batch_size=2, config=StreamConfig(decode_threads=1))
    next(iter(stream))
    time.sleep(0.2)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("geoloc-")]
