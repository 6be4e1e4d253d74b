"""Closing a stream that waits for somebody: at once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stream_samples import Reading, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.stream import backoff as backoff_module
from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader

# No other process sleeps so long.
LONG = f"3{os.getpid():07d}"


def until(is_met: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def sleepers(mark: str = LONG) -> list[int]:
    """Processes with the mark among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def children() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found.update({int(folder.name)} if parent == os.getpid() else ())
    return found


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("geoloc-")]


class Waiting:
    """A stream whose consumer waits in a thread of its own."""

    def __init__(self, shard: str) -> None:
        self.children = children()
        self.items: list[Any] = []
        self.stream = BatchStream([unit_of(shard)], side=20, batch_size=99, config=StreamConfig(decode_threads=2))
        self.consumer = threading.Thread(target=lambda: self.items.extend(self.stream))
        self.consumer.start()

    def close(self) -> None:
        """From this thread, as a watcher of signals does it."""
        assert self.consumer.is_alive()
        started = time.monotonic()
        self.stream.close()
        self.consumer.join(5)
        seconds = time.monotonic() - started
        assert not self.consumer.is_alive()
        assert self.items == []
        assert seconds < 1.5, f"{seconds:.1f} s"
        assert own_threads() == []
        assert children() == self.children


@pytest.mark.parametrize(
    "command",
    [
        "touch {begun}; sleep {long}",
        "touch {begun}; sleep {long} & sleep {long}",
        "cat {shard}; touch {begun}; sleep {long}",
        "cat {shard}; exec >&-; touch {begun}; sleep {long}",
        "(trap '' TERM HUP INT; touch {begun}; sleep {long}; sleep {long}) | cat",
    ],
)
def test_close_ends_a_command_and_all_that_it_started(tmp_path: Path, command: str) -> None:
    begun, shard = tmp_path / "begun", write_tar(tmp_path / "a.tar", numbered(3))
    waiting = Waiting("pipe:" + command.format(begun=begun, shard=shard, long=LONG))
    until(begun.exists)
    until(sleepers)
    time.sleep(0.1)
    waiting.close()
    until(lambda: not sleepers())


def test_close_does_not_wait_for_what_a_command_has_put_out_of_reach(tmp_path: Path) -> None:
    waiting = Waiting(f"pipe:setsid sleep {LONG} & sleep {LONG}")
    until(lambda: len(sleepers()) == 2)
    waiting.close()
    try:
        until(lambda: len(sleepers()) == 1)
    finally:
        for process in sleepers():
            os.kill(process, signal.SIGKILL)


def test_what_a_command_leaves_running_ends_with_its_unit(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(3))
    before = children()
    reading = Reading(unit_of(f"pipe:sleep {LONG} > /dev/null 2>&1 & cat {shard}"))
    assert reading.reader.unit_error is None
    assert len(reading.samples) == 3
    until(lambda: not sleepers())
    assert children() == before


PROGRAM = """
import sys
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.streams import PipeStream
PipeStream(sys.argv[1], Interrupt()).read(1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_does_not_outlive_a_process_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    begun = tmp_path / "begun"
    command = f"touch {begun}; sleep {LONG} & cat /dev/null; sleep {LONG}"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, command]) as process:
        until(begun.exists)
        until(lambda: len(sleepers()) == 2)
        process.send_signal(number)
        assert process.wait(10) == -number
    until(lambda: not sleepers())


@pytest.mark.parametrize("has_writer", [False, True])
def test_close_ends_the_waiting_for_a_named_pipe(tmp_path: Path, has_writer: bool) -> None:
    fifo = tmp_path / "a.tar"
    os.mkfifo(fifo)
    waiting = Waiting(str(fifo))
    writer = os.open(fifo, os.O_WRONLY) if has_writer else -1
    time.sleep(0.2)
    waiting.close()
    if has_writer:
        os.close(writer)


class Silent:
    """A server that takes connections and says nothing, or one line again and again."""

    def __init__(self, answer: bytes = b"", backlog: int = 8) -> None:
        self.answer = answer
        self.accepted: list[socket.socket] = []
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.place = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.accepted.append(connection)
            if self.answer:
                connection.recv(10_000)
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        if self.thread.is_alive():
            self.thread.join()
        for connection in self.accepted:
            connection.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    server.thread.start()
    yield server
    server.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_close_ends_the_waiting_for_a_server_that_never_answers(silent: Silent, scheme: str) -> None:
    waiting = Waiting(f"{scheme}://{silent.place}/a.tar")
    until(lambda: silent.accepted)
    time.sleep(0.1)
    waiting.close()
    # Whoever is called must see that the caller is gone.
    silent.accepted[0].settimeout(5)
    while silent.accepted[0].recv(10_000):
        pass


def test_close_ends_the_waiting_for_a_connection() -> None:
    server = Silent(backlog=0)
    others = []
    # Whom the full queue leaves no room waits for an answer to its first packet.
    for _ in range(4):
        other = socket.socket()
        other.setblocking(False)
        other.connect_ex(server.socket.getsockname())
        others.append(other)
    try:
        waiting = Waiting(f"http://{server.place}/a.tar")
        time.sleep(0.3)
        waiting.close()
    finally:
        for other in others:
            other.close()
        server.close()


def test_close_ends_the_wait_between_two_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 60.0)
    server = Silent(answer=b"HTTP/1.0 503 Busy\r\nContent-Length: 0\r\n\r\n")
    server.thread.start()
    try:
        waiting = Waiting(f"http://{server.place}/a.tar")
        until(lambda: server.accepted)
        time.sleep(0.2)
        waiting.close()
        assert len(server.accepted) == 1
    finally:
        server.close()


def test_close_ends_the_wait_between_two_runs_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module, "FIRST_WAIT_S", 60.0)
    waiting = Waiting(f"pipe:echo x >> {tmp_path}/runs; exit 1")
    until((tmp_path / "runs").exists)
    time.sleep(0.2)
    waiting.close()
    assert (tmp_path / "runs").read_text() == "x\n"


def test_close_ends_the_waiting_for_a_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> list[Any]:
        is_asked.set()
        may_answer.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    waiting = Waiting("http://far.example/a.tar")
    try:
        assert is_asked.wait(10)
        waiting.close()
    finally:
        may_answer.set()


def test_close_while_the_threads_are_being_started_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class SlowThread(threading.Thread):
        def start(self) -> None:
            time.sleep(0.1)
            super().start()

    monkeypatch.setattr(batches_module, "Thread", SlowThread)
    waiting = Waiting(f"pipe:sleep {LONG}")
    until(own_threads)
    waiting.close()


def test_a_failure_that_close_brings_about_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    is_closing = threading.Event()

    class Failing(UnitReader):
        def __iter__(self) -> Any:
            is_closing.wait(10)
            raise RuntimeError("the connection went away")

    monkeypatch.setattr(batches_module, "UnitReader", Failing)
    waiting = Waiting("a.tar")
    waiting.stream._exchange.stop()
    is_closing.set()
    waiting.consumer.join(5)
    waiting.stream.close()
    assert list(waiting.stream) == []


def test_an_interrupted_unit_says_so_and_may_be_tried_again(tmp_path: Path) -> None:
    interrupt = Interrupt()
    reader = UnitReader(unit_of(write_tar(tmp_path / "a.tar", numbered(9))), interrupt)
    items = iter(reader)
    next(items)
    interrupt.set()
    assert list(items) == []
    assert reader.unit_error is not None
    assert (reader.unit_error.message, reader.unit_error.retryable) == ("reading was stopped", True)


def test_a_named_pipe_waits_for_a_writer_that_comes_late_and_writes_slowly(tmp_path: Path) -> None:
    fifo, data = tmp_path / "a.tar", tar_bytes(numbered(5))
    os.mkfifo(fifo)

    def write() -> None:
        time.sleep(0.3)
        with open(fifo, "wb", buffering=0) as file:
            time.sleep(0.3)
            for start in range(0, len(data), 5000):
                file.write(data[start : start + 5000])
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    reading = Reading(unit_of(fifo))
    writer.join()
    assert reading.reader.unit_error is None
    assert len(reading.samples) == 5
