"""A process's hand on the shared filesystem of a simulated cluster: a FilePort, so that the ledger runs unchanged.

An operation that touches nothing but the caller's own staging folder can meet nobody: its time is added to that of the
next one that can, which saves the simulator most of its switches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster_clock import Vanished
from cluster_server import Server

from geoloc_batch.store.files import FileStat, Owner

SECOND_NS = 1_000_000_000


@dataclass(eq=False, slots=True)
class Node:
    """A machine. Its processes share a cache of names, where the filesystem has one that may be old."""

    name: str
    cache: dict[tuple[str, str], tuple[float, object]] = field(default_factory=dict)


class SimulatedFiles:
    """The FilePort of one process."""

    def __init__(self, server: Server, node: Node, pid: int, processes: dict[int, SimulatedFiles]) -> None:
        self.is_alive = True
        self.seconds = 0.0
        """That this process has spent in operations."""
        self._server = server
        self._clock = server.clock
        self._disk = server.disk
        self._node = node
        self._owner = Owner(node.name, f"boot-of-{node.name}", "pid:[1]", pid, started=pid)
        self._processes = processes
        self._tokens = (f"{pid:08x}{number:08x}" for number in itertools.count())
        self._debt_s = 0.0

    def _do(self, name: str, path: str, units: float = 0.0, extra_s: float = 0.0) -> None:
        """Pay for an operation, then be at the time at which it is done."""
        if not self.is_alive:
            raise Vanished
        server, clock = self._server, self._clock
        # Queued now, though it is sent when the debt is paid: else it would hold up what others send before.
        taken_s = server.charge(name, units or server.model.work[name]) + extra_s
        self.seconds += taken_s
        self._debt_s += taken_s
        if "/_staging/" not in path:
            self._pay()
        self._disk.now_ns = int(clock.now_s * SECOND_NS)

    def _pay(self) -> None:
        debt_s, self._debt_s = self._debt_s, 0.0
        self._clock.wait(debt_s)
        if not self.is_alive:
            raise Vanished

    def _known(self, name: str, path: str) -> tuple[object] | None:
        """What this node's cache answers, None where it has to ask."""
        stale_s = self._server.model.stale_s
        if stale_s:
            at_s, answer = self._node.cache.get((name, path), (-stale_s, None))
            if self._clock.now_s - at_s < stale_s:
                return (answer,)
        return None

    def _learn(self, name: str, path: str, answer: object) -> None:
        if self._server.model.stale_s:
            if len(self._node.cache) > 10_000:
                self._node.cache.clear()
            self._node.cache[name, path] = (self._clock.now_s, answer)

    def _changed(self, *paths: str) -> None:
        """A node sees at once what it has done itself."""
        if self._node.cache:
            for path in paths:
                self._node.cache.pop(("stat", path), None)
                self._node.cache.pop(("names", path.rpartition("/")[0]), None)

    def create(self, path: Path) -> int:
        """See FilePort."""
        self._do("create", where := str(path))
        self._changed(where)
        made_ns = self._disk.create(where)
        self._server.on_name(where)
        return made_ns

    def fill(self, path: Path, data: bytes) -> None:
        """See FilePort."""
        self._do("fill", where := str(path))
        self._disk.put(where, data, len(data))

    def write(self, path: Path, data: bytes) -> None:
        """See FilePort."""
        self._do("write", where := str(path))
        self._changed(where)
        self._disk.write(where, data, len(data))

    def write_table(self, path: Path, token: bytes, size: int) -> None:
        """What the writers of tables do: a file of a size, whose bytes go to data servers that are no bottleneck."""
        self._do("write", where := str(path), extra_s=size / self._server.model.bytes_per_s)
        self._disk.write(where, token, size)

    def read(self, path: Path) -> bytes:
        """See FilePort."""
        self._do("read", where := str(path))
        return self._disk.read(where).data

    def digest(self, path: Path) -> tuple[int, str]:
        """See FilePort."""
        file = self._disk.read(where := str(path))
        self._do("digest", where, extra_s=file.size / self._server.model.bytes_per_s)
        return file.size, file.data.decode()

    def sync(self, path: Path) -> None:
        """See FilePort."""
        self._do("sync", where := str(path), extra_s=self._server.model.sync_s)
        self._disk.read(where)

    def sync_folder(self, path: Path) -> None:
        """See FilePort."""
        # Of any folder: what it waits for is the disk, and nobody waits for what it does.
        where = str(path)
        if self._server.model.sync_folder_s:
            self._do("sync_folder", "/_staging/", extra_s=self._server.model.sync_folder_s)
        if where not in self._disk.folders:
            raise FileNotFoundError(where)

    def link(self, source: Path, target: Path) -> None:
        """See FilePort."""
        self._do("link", where := str(target))
        self._changed(where)
        self._disk.link(str(source), where)
        self._server.on_name(where)

    def rename(self, source: Path, target: Path) -> None:
        """See FilePort."""
        self._do("rename", where := str(target))
        self._changed(str(source), where)
        self._disk.rename(str(source), where)

    def remove(self, path: Path) -> None:
        """See FilePort."""
        self._do("remove", where := str(path))
        self._changed(where)
        self._disk.remove(where)

    def remove_folder(self, path: Path) -> None:
        """See FilePort."""
        self._do("remove_folder", where := str(path))
        self._changed(where)
        self._disk.remove_folder(where)

    def make_folder(self, path: Path) -> None:
        """See FilePort."""
        self._do("make_folder", where := str(path))
        self._changed(where)
        self._disk.make_folder(where)

    def names(self, path: Path) -> list[str]:
        """See FilePort."""
        where = str(path)
        if (known := self._known("names", where)) is not None:
            return list(known[0])  # type: ignore[call-overload,no-any-return]
        folder, model = self._disk.folders.get(where), self._server.model
        num_names = len(folder.names) if folder is not None else 0
        self._do("names", where, model.work["names"] + num_names / model.entries_per_unit)
        found = self._disk.names(where)
        self._learn("names", where, found)
        return found

    def stat(self, path: Path) -> FileStat | None:
        """See FilePort."""
        where = str(path)
        if (known := self._known("stat", where)) is not None:
            return known[0]  # type: ignore[return-value]
        self._do("stat", where)
        found = self._disk.stat(where)
        self._learn("stat", where, found)
        return found

    def touch(self, path: Path) -> None:
        """See FilePort."""
        self._do("touch", where := str(path))
        self._changed(where)
        self._disk.touch(where)

    def free_bytes(self, path: Path) -> int:
        """See FilePort."""
        self._do("free_bytes", str(path))
        return 1 << 50

    def monotonic(self) -> float:
        """See FilePort."""
        return self._clock.now_s + self._debt_s

    def sleep(self, seconds: float) -> None:
        """See FilePort."""
        self._debt_s += seconds
        if self._debt_s:
            self._pay()

    def every(self, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        """See FilePort. Its operations count, and take no time of the process."""
        is_over = False

        def again() -> None:
            if self.is_alive and not is_over:
                debt_s, self._debt_s = self._debt_s, 0.0
                task()
                self._debt_s = debt_s
                self._clock.at(self._clock.now_s + seconds, again)

        def end() -> None:
            nonlocal is_over
            is_over = True

        self._clock.at(self._clock.now_s + seconds, again)
        return end

    def token(self) -> str:
        """See FilePort."""
        return next(self._tokens)

    def owner(self) -> Owner:
        """See FilePort."""
        return self._owner

    def is_gone(self, owner: Owner) -> bool:
        """See FilePort."""
        return owner.boot == self._owner.boot and not self._processes[owner.pid].is_alive
