"""How the ranks of a training find each other, and notice at once when one of them is gone.

They meet at a store in the first rank, whose address the launcher tells. From then on each of the others holds a
connection to the first, over which nothing is said until the end: a process that ends in whatever way closes it.
Collectives alone would not do: those of NCCL wait for a lost rank until they time out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_INCOMPLETE, ConfigError, GeolocError

Store = Any
"""torch.distributed's, of which there are no types."""

MEETING_S = 300
"""For all ranks to come: the last may still be importing."""
_GRACE_S = 10.0
# A rank that fails says so before its connections break, yet perhaps over another way.
_VERDICT_S = 3.0
_WATCH_S = 0.1
_KNOCK_S = 5.0
# An error of all ranks reaches each by itself, and needs no second word.
_SHARED_S = 0.5
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

# Below the ports that systems give away by themselves.
_FIRST_PORT, _NUM_PORTS = 15_000, 17_000

log = logging.getLogger("geoloc_batch")

_meetings = itertools.count()


def address() -> tuple[str, int]:
    """Host and port of the first rank.

    MASTER_ADDR and MASTER_PORT where they are set, as torchrun and accelerate launch do. Under srun: the first node of
    the step, and a port that follows from the job and the step.

    Raises:
        ConfigError: nothing tells.
    """
    job, nodes = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_NODELIST", "")
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host and nodes:
        host = "127.0.0.1" if os.environ.get("SLURM_STEP_NUM_NODES") == "1" else first_node(nodes)
    if not port and job.isdigit():
        step = os.environ.get("SLURM_STEP_ID", "0")
        port = str(_FIRST_PORT + (16 * int(job) + (int(step) if step.isdigit() else 0)) % _NUM_PORTS)
    if not host or not port.isdigit():
        raise ConfigError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT {port!r}, so that the ranks cannot find the first of them; start "
            "them with srun, torchrun or accelerate launch, or set both"
        )
    return host, int(port)


def first_node(nodes: str) -> str:
    """The first name in one of SLURM's lists: gpu[007-012,20]-ib,login1 begins with gpu007-ib."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


@contextlib.contextmanager
def meet(rank: int, size: int) -> Iterator[tuple[Store, Lifeline]]:
    """Wait for all ranks; the store where they meet, and what tells that one is gone.

    Raises:
        GeolocError: not all came, or the first cannot be reached.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    host, port = address()
    try:
        store = _patiently(host, port, rank, size)
        # A process may train more than once, and the launcher's store forgets nothing.
        store = PrefixStore(f"training {next(_meetings)}", store)
        lifeline = Lifeline(_connections(store, host, rank, size))
    except (RuntimeError, OSError) as error:
        raise GeolocError(
            f"rank {rank} of {size} did not meet the others at {host}, port {port} (MASTER_ADDR, MASTER_PORT), within "
            f"{MEETING_S} s: {str(error).splitlines()[0]}; see whether all ranks were started, and whether that "
            "address can be reached from all nodes"
        ) from error
    with lifeline:
        yield store, lifeline


class Lifeline:
    """Ends this process when another rank of the training has ended, or has an error.

    The main thread is left some time to notice by itself: its collectives fail. If it is busy elsewhere, or waits for a
    GPU that waits for the lost rank, the process ends under it; what it writes is whole or not there.

    Args:
        connections: to the first rank, or in the first to all others.
    """

    def __init__(self, connections: list[socket.socket]) -> None:
        self.code = EXIT_COMPLETE
        """What this rank ends with; set before the end, unless that is in order."""
        self._connections = connections
        self.is_shared = False
        """Whether this rank ends with an error that all ranks have."""
        self._is_over, self._is_lost = threading.Event(), threading.Event()
        self._lost_code = EXIT_INCOMPLETE
        self._watcher = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def __enter__(self) -> Lifeline:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join(timeout=_GRACE_S)
        self._say(self.code)
        for connection in self._connections:
            connection.close()

    def code_of_lost(self) -> int:
        """The exit code of the rank that is gone, 75 where it was killed."""
        self._is_lost.wait(_VERDICT_S)
        return self._lost_code

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while not self._is_over.is_set():
                for key, _ in selector.select(_WATCH_S):
                    code = _heard(key.fileobj)
                    if code != EXIT_COMPLETE:
                        self._end(code)
                        return
                    selector.unregister(key.fileobj)

    def _end(self, code: int) -> None:
        self._lost_code = code
        self._is_lost.set()
        self._say(code)
        how = "was lost" if code == EXIT_INCOMPLETE else f"ended with an error (exit code {code})"
        if not self._is_over.wait(_SHARED_S) and not self.is_shared:
            log.error("another rank of this training %s: this one ends too; a checkpoint stays", how)
        if not self._is_over.wait(_GRACE_S):
            sys.stderr.flush()
            os._exit(code)

    def _say(self, code: int) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(bytes([code]))


def _patiently(host: str, port: int, rank: int, size: int) -> Store:
    """The store, awaited in a thread of its own: the main thread could not hear a signal meanwhile."""
    found: list[Store | RuntimeError] = []

    from torch.distributed.rendezvous import rendezvous

    def wait() -> None:
        try:
            # Under torchrun and accelerate launch the store is the launcher's, which this knows.
            timeout = timedelta(seconds=MEETING_S)
            found.append(next(rendezvous(f"tcp://{host}:{port}", rank, size, timeout=timeout))[0])
        except RuntimeError as error:
            found.append(error)

    waiter = threading.Thread(target=wait, name="meeting", daemon=True)
    waiter.start()
    while waiter.is_alive():
        waiter.join(_WATCH_S)
    if isinstance(found[0], RuntimeError):
        raise found[0]
    return found[0]


def told(store: Store, key: str) -> bytes:
    """What a rank has told the others; between two looks a signal is heard.

    Raises:
        RuntimeError: it has not, in time.
    """
    deadline_s = time.monotonic() + MEETING_S
    while not store.check([key]):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"nothing was heard of {key!r}")
        time.sleep(_WATCH_S)
    value: bytes = store.get(key)
    return value


def _connections(store: Store, host: str, rank: int, size: int) -> list[socket.socket]:
    if rank:
        port, token = told(store, "lifeline").split()
        connection = socket.create_connection((host, int(port)), timeout=MEETING_S)
        connection.sendall(token)
        return [_kept_alive(connection)]
    token = os.urandom(16).hex().encode()
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=size) as server:
        store.set("lifeline", b"%d %s" % (server.getsockname()[1], token))
        found: list[socket.socket] = []
        deadline_s = time.monotonic() + MEETING_S
        while len(found) < size - 1:
            server.settimeout(max(deadline_s - time.monotonic(), 0.001))
            connection, _ = server.accept()
            if _knows(connection, token):
                found.append(_kept_alive(connection))
            else:
                connection.close()
    return found


def _knows(connection: socket.socket, token: bytes) -> bool:
    """Whether it is a rank. Whoever else knocks at a port does not know the token, says nothing, or goes away."""
    connection.settimeout(_KNOCK_S)
    try:
        return connection.recv(len(token), socket.MSG_WAITALL) == token
    except OSError:
        return False


def _kept_alive(connection: socket.socket) -> socket.socket:
    """A machine that loses its power closes nothing: it is asked whether it is there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return connection


def _heard(connection: object) -> int:
    assert isinstance(connection, socket.socket)
    try:
        said = connection.recv(1)
    except OSError:
        said = b""
    return said[0] if said else EXIT_INCOMPLETE
