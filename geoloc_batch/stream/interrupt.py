"""Ends the waiting of a thread for a shard's sender: a named pipe, a command, a server."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.1
"""How often a waiting thread looks whether it was interrupted."""


class Interrupt:
    """Set by one thread, it makes every wait of another end in an OSError (ECANCELED), and each later one too.

    Sockets that are blocked in a library's own read are shut down, one at a time: see `watch`.
    """

    def __init__(self) -> None:
        self._event = Event()
        self._lock = Lock()
        self._watched: socket.socket | None = None

    def set(self) -> None:
        """End all waiting."""
        with self._lock:
            self._event.set()
            if self._watched is not None:
                # ENOTCONN: it had ended by itself.
                with suppress(OSError):
                    self._watched.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise OSError if `set` was called."""
        if self._event.is_set():
            raise OSError(errno.ECANCELED, "reading was stopped")

    def sleep(self, seconds: float) -> None:
        """Wait so long."""
        self._event.wait(seconds)
        self.check()

    def wait_until_ready(self, fd: int, events: int, timeout_s: float = math.inf) -> None:
        """Wait for one of poll's `events`, or for the other side's end.

        Raises:
            TimeoutError: nothing happened for so long.
        """
        poll = select.poll()
        poll.register(fd, events)
        end = time.monotonic() + timeout_s
        self.check()
        while not poll.poll(POLL_S * 1000):
            self.check()
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def call(self, function: Callable[[], T]) -> T:
        """Run what knows no interruption, such as a question to a name server; when stopped, leave it to itself."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        Thread(target=run, name="interruptible", daemon=True).start()
        while not wait([future], POLL_S).done:
            self.check()
        return future.result()

    def connect(
        self, address: tuple[str, int], timeout_s: float, source_address: tuple[str, int] | None = None
    ) -> socket.socket:
        """socket.create_connection, interruptible; the socket is watched from now on."""
        host, port = address
        failure = OSError(errno.ENOENT, f"{host} has no address")
        for family, kind, protocol, _, place in self.call(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ):
            connection = socket.socket(family, kind, protocol)
            try:
                if source_address is not None:
                    connection.bind(source_address)
                self._connect(connection, place, timeout_s)
                self.watch(connection)
            except OSError as error:
                connection.close()
                self.check()
                failure = error
            else:
                return connection
        raise failure

    def _connect(self, connection: socket.socket, place: Any, timeout_s: float) -> None:
        connection.setblocking(False)
        code = connection.connect_ex(place)
        if code == errno.EINPROGRESS:
            self.wait_until_ready(connection.fileno(), select.POLLOUT, timeout_s)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        connection.settimeout(timeout_s)

    def watch(self, connection: socket.socket) -> None:
        """Shut this socket down when interrupted, instead of the one that was watched before."""
        # A duplicate: it stays valid when TLS takes the socket over, and when its owner closes it meanwhile.
        twin = connection.dup()
        self.unwatch()
        with self._lock:
            self._watched = twin
        if self._event.is_set():
            self.unwatch()
            self.check()

    def unwatch(self) -> None:
        """Let go of the watched socket; until then its connection stays open."""
        with self._lock:
            watched, self._watched = self._watched, None
        if watched is not None:
            watched.close()
