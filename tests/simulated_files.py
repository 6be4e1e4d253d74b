"""A process's hand on a disk that exists in memory alone: a FilePort, so that the ledger runs on it unchanged.

    simulated_disk.Disk   folders, files, hard links or none, times; what was not synced can be lost
    Host, Process         who may be alive, stopped or gone
    World                 what a simulation decides: time, who runs next, what fails at which step
    SimulatedFiles        one process's FilePort

Every method of the port is one step of the world or a few: an operation that a real process could die or be stopped in
the middle of is cut at that point. A world whose `before` and `after` do nothing but count time makes this a fast
simulator of many ranks, one call of the ledger after another; a world that hands over to another thread in `before`
interleaves the ranks at each of their operations (simulated_turns.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from simulated_disk import Disk, File, Folder

from geoloc_batch.store.files import FileStat, Owner


@dataclass(eq=False, slots=True)
class Host:
    """A machine with a monotonic clock of its own."""

    name: str
    ahead_s: float = 0.0
    boots: int = 1


class Process:
    """One process of a host. Whoever is not alive does nothing any more; who is stopped does nothing yet."""

    def __init__(self, host: Host, pid: int) -> None:
        self.host = host
        self.owner = Owner(host.name, f"{host.name}.{host.boots}", "pid:[1]", pid, started=pid)
        self.is_alive = True
        self.stopped_until_s = 0.0


class World(Protocol):
    """What a simulation decides."""

    disk: Disk
    processes: dict[int, Process]

    def now_s(self) -> float:
        """Seconds, the same for all."""

    def before(self, process: Process, name: str, path: Path) -> OSError | None:
        """A step is due: return for it to be done, raise for it to fail. What is returned is raised once it is done."""

    def after(self, process: Process, name: str, path: Path) -> None:
        """A step was done."""

    def sleep(self, process: Process, seconds: float) -> None:
        """Let that much time pass for the caller."""

    def every(self, process: Process, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        """See FilePort."""

    def token(self) -> str:
        """See FilePort."""


class SimulatedFiles:
    """The FilePort of one process."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    def _do(self, name: str, path: Path, *arguments: Any) -> Any:
        late = self._world.before(self._process, name, path)
        done = getattr(self._world.disk, name)(path, *arguments)
        self._world.after(self._process, name, path)
        if late is not None:
            raise late
        return done

    def create(self, path: Path) -> int:
        return int(self._do("create", path))

    def fill(self, path: Path, data: bytes) -> None:
        self._put(path, self._do("open", path), data)

    def write(self, path: Path, data: bytes) -> None:
        self._put(path, self._do("open_empty", path), data)

    def _put(self, path: Path, file: File, data: bytes) -> None:
        self._do("put", path, file, data[: len(data) // 2])
        self._do("put", path, file, data)

    def read(self, path: Path) -> bytes:
        return bytes(self._do("read", path))

    def digest(self, path: Path) -> tuple[int, str]:
        data = self.read(path)
        return len(data), hashlib.sha256(data).hexdigest()

    def sync(self, path: Path) -> None:
        self._do("sync", path)

    def sync_folder(self, path: Path) -> None:
        self._do("sync_folder", path)

    def link(self, source: Path, target: Path) -> None:
        # The step is told by its target: that is what changes.
        late = self._world.before(self._process, "link", target)
        self._world.disk.link(source, target)
        self._world.after(self._process, "link", target)
        if late is not None:
            raise late

    def rename(self, source: Path, target: Path) -> None:
        late = self._world.before(self._process, "rename", target)
        self._world.disk.rename(source, target)
        self._world.after(self._process, "rename", target)
        if late is not None:
            raise late

    def remove(self, path: Path) -> None:
        self._do("remove", path)

    def remove_folder(self, path: Path) -> None:
        self._do("remove_folder", path)

    def make_folder(self, path: Path) -> None:
        try:
            self._do("make_folder", path)
        except FileNotFoundError:
            # As pathlib does it: others may remove what is above at any moment.
            self.make_folder(path.parent)
            self.make_folder(path)
        except FileExistsError:
            if not isinstance(self._world.disk.node(path), Folder):
                raise

    def names(self, path: Path) -> list[str]:
        return list(self._do("names", path))

    def stat(self, path: Path) -> FileStat | None:
        found: FileStat | None = self._do("stat", path)
        return found

    def touch(self, path: Path) -> None:
        self._do("touch", path)

    def free_bytes(self, path: Path) -> int:
        return 1 << 40

    def monotonic(self) -> float:
        return self._world.now_s() + self._process.host.ahead_s

    def sleep(self, seconds: float) -> None:
        self._world.sleep(self._process, seconds)

    def every(self, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        return self._world.every(self._process, seconds, task)

    def token(self) -> str:
        return self._world.token()

    def owner(self) -> Owner:
        return self._process.owner

    def is_gone(self, owner: Owner) -> bool:
        # Processes of another boot cannot be asked for, like on a real machine.
        is_here = owner.boot == self._process.owner.boot
        return is_here and not self._world.processes[owner.pid].is_alive
