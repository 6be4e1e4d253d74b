"""Closing a stream that waits for a server: at once, and nothing is left behind."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from interrupt_samples import Waiting, until

from geoloc_batch.stream import backoff as backoff_module


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
