"""Leases: who works on which unit, and who has stopped.

A lease is the file `_leases/{goal}.{slot}`, made by O_EXCL: slot 1 is the first execution, 2 and 3 the later ones, so
that of two ranks that back up the same execution one wins. Its owner touches it every beat. It is live until its
time is `stale_beats` beats old by the file server's clock, or its owner is known to be gone. A lease that a dead owner
left counts as an execution; one that is given back does not.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from geoloc_batch.store.files import FilePort, Owner
from geoloc_batch.store.goal import Goal, parse_goal
from geoloc_batch.store.publish import remove_file
from geoloc_batch.store.some import SOME_CLOCKS, some

SECOND_NS = 1_000_000_000
# Of leases whose owner does not say after how long he is dead: four beats of 15 s, the defaults.
USUAL_STALE_S = 60.0


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease as a reader finds it."""

    goal: Goal
    slot: int
    path: Path
    mtime_ns: int
    token: str = ""
    """The execution's; "" while its owner has not written it yet."""
    owner: Owner | None = None
    taken_ns: int = 0
    """When it was taken, by the file server's clock."""
    worker: str = ""
    """Name of the owner's process in logs and markers."""
    stale_s: float = USUAL_STALE_S
    """Without a beat for so long the owner is to be taken for dead."""


def parse_lease_name(name: str) -> tuple[Goal, int] | None:
    """(goal, slot) of a lease's file name, None for any other name."""
    label, _, slot = name.partition(".")
    goal = parse_goal(label)
    return (goal, int(slot)) if goal and slot.isdecimal() else None


def read_lease(path: Path, mtime_ns: int, read: Callable[[Path], bytes] = Path.read_bytes) -> Lease | None:
    """The lease at `path`, None where the name is none's; one that is half written has no owner yet."""
    name = parse_lease_name(path.name)
    if name is None:
        return None
    try:
        fields = json.loads(read(path))
        owner = Owner(**fields["owner"])
        worker = str(fields.get("worker", f"{owner.host}-{owner.pid}"))
        stale_s = float(fields.get("stale_s", USUAL_STALE_S))
        return Lease(*name, path, mtime_ns, fields["token"], owner, fields["taken_ns"], worker, stale_s)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Lease(*name, path, mtime_ns)


class Leases:
    """The folder of leases, seen by one rank."""

    def __init__(self, files: FilePort, folder: Path, *, beat_s: float, stale_beats: int, worker: str = "") -> None:
        self.files = files
        self.folder = folder
        self.beat_s = beat_s
        self.stale_s = beat_s * stale_beats
        self._owner = files.owner()
        self.worker = worker or f"{self._owner.host}-{self._owner.pid}"
        self._clock = folder / f"clock.{files.token()}"
        self._held: dict[str, Path] = {}
        # Lease -> its time when last seen, and since when (our own seconds) it has not moved.
        self._unmoved: dict[Path, tuple[int, float]] = {}
        self._now_s = 0.0
        self._lock = threading.Lock()
        self._stop_beating: Callable[[], None] | None = None

    def take(self, goal: Goal, slot: int, token: str) -> Lease | None:
        """Take a slot of a goal, None where it is taken."""
        path = self.folder / f"{goal.label}.{slot}"
        try:
            taken_ns = self.files.create(path)
        except FileExistsError:
            return None
        said = {"worker": self.worker, "stale_s": self.stale_s}
        text = json.dumps({"token": token, "owner": asdict(self._owner), "taken_ns": taken_ns, **said})
        try:
            self.files.fill(path, text.encode())
        except FileNotFoundError:
            # We stood still for so long that the goal was reached meanwhile, and a sweep took our lease.
            return None
        except OSError:
            # A full disk: what says nothing must not count as an execution.
            remove_file(self.files, path)
            raise
        with self._lock:
            self._held[token] = path
        self._start_beating()
        return Lease(goal, slot, path, taken_ns, token, self._owner, taken_ns, self.worker, self.stale_s)

    def give_back(self, token: str) -> None:
        """Remove a lease of ours."""
        self._drop(token)

    def keep(self, claim: Path) -> None:
        """Touch another file of ours with every beat, too, until it is dropped."""
        with self._lock:
            self._held[str(claim)] = claim
        self._start_beating()

    def drop(self, claim: Path) -> None:
        """Remove a file that was kept."""
        self._drop(str(claim))

    def _drop(self, name: str) -> None:
        with self._lock:
            path = self._held.pop(name, None)
        if path is not None:
            remove_file(self.files, path)

    def all(self) -> dict[Goal, list[Lease]]:
        """Every lease in the folder, by goal, slots in order."""
        return self._read(name for name in self.files.names(self.folder) if parse_lease_name(name))

    def of(self, goals: Iterable[Goal], num_slots: int) -> dict[Goal, list[Lease]]:
        """Those of a few goals, slots in order: what thousands of other ranks hold is not even listed."""
        return self._read(f"{goal.label}.{slot}" for goal in goals for slot in range(1, num_slots + 1))

    def _read(self, names: Iterable[str]) -> dict[Goal, list[Lease]]:
        leases: dict[Goal, list[Lease]] = {}
        for name in names:
            found = self.files.stat(self.folder / name)
            if found is not None:
                lease = read_lease(self.folder / name, found.mtime_ns, self.files.read)
                if lease is not None:
                    leases.setdefault(lease.goal, []).append(lease)
        for of_goal in leases.values():
            of_goal.sort(key=lambda lease: lease.slot)
        return leases

    def server_now_ns(self) -> int:
        """Now by the file server's clock, read off a file of our own. To be asked before a look at the leases."""
        self._now_s = self.files.monotonic()
        for _ in range(3):
            try:
                self.files.touch(self._clock)
            except FileNotFoundError:
                # First use, or swept by a rank that saw it unused for long.
                with contextlib.suppress(FileExistsError):
                    self.files.create(self._clock)
            found = self.files.stat(self._clock)
            if found is not None:
                return found.mtime_ns
        raise FileNotFoundError(f"{self._clock} vanishes as soon as it is made; is something cleaning the folder?")

    def is_gone(self, lease: Lease) -> bool:
        """True where the owner has certainly ended."""
        return lease.owner is not None and lease.owner != self._owner and self.files.is_gone(lease.owner)

    def is_live(self, lease: Lease, now_ns: int) -> bool:
        """Whether the owner has beaten lately and is not known to be gone."""
        with self._lock:
            if lease.token in self._held:
                return True
        if self.is_gone(lease) or now_ns - lease.mtime_ns > self.stale_s * SECOND_NS:
            return False
        # A server's clock that was set back leaves times in its future: what has not moved for the whole
        # span by our own clock is as stale. The span ends before the look: where we stood still in the midst of
        # it, the lease may have moved since.
        seen_ns, since_s = self._unmoved.get(lease.path, (0, 0.0))
        if seen_ns != lease.mtime_ns:
            since_s = self.files.monotonic()
        self._unmoved[lease.path] = (lease.mtime_ns, since_s)
        return self._now_s - since_s <= self.stale_s

    def sweep_clocks(self, now_ns: int) -> None:
        """Remove clock files of ranks that ended without doing so; not all of very many, for each rank has one."""
        names = [name for name in self.files.names(self.folder) if name.startswith("clock.")]
        for name in some(names, SOME_CLOCKS):
            found = self.files.stat(self.folder / name) if name != self._clock.name else None
            if found is not None and now_ns - found.mtime_ns > 10 * self.stale_s * SECOND_NS:
                remove_file(self.files, self.folder / name)

    def beat(self) -> None:
        """Touch every lease held, and all else that is kept."""
        with self._lock:
            paths = list(self._held.values())
        for path in paths:
            # A beat that fails is a missed beat: if they all do, somebody else takes over, and one of us wins.
            with contextlib.suppress(OSError):
                self.files.touch(path)

    def close(self) -> None:
        """Stop beating and remove the clock file. Leases still held stay where they are."""
        if self._stop_beating is not None:
            self._stop_beating()
        remove_file(self.files, self._clock)

    def _start_beating(self) -> None:
        if self._stop_beating is None:
            self._stop_beating = self.files.every(self.beat_s, self.beat)
