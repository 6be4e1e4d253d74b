"""The processes of a simulated cluster: each drives a production Ledger as the engine does, and may be killed.

    reader   acquires the next unit when the one in work is nearly done, for its photos fit into no buffer
    worker   spends the time that a unit takes
    writer   stages tables and commits

What the engine overlaps overlaps here: a rank stands idle only where the ledger is slower than the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster_clock import Clock, Handover
from cluster_files import SimulatedFiles
from greenlet import greenlet

from geoloc_batch.records import Unit
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts

OUT = Path("/shared/out")
PINNED = {"encoder": "simulated"}
# As the engine waits where everything is in work elsewhere.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0
# What a reader is ahead of the encoder: some hundred photos.
AHEAD_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One file that a unit gives."""

    path: str
    """Relative to OUT, with a place for the unit's index."""
    bytes_per_photo: int


EMBED = (
    Table(path="img_emb/img_emb_{:06d}.npy", bytes_per_photo=2048),
    Table(path="metadata/metadata_{:06d}.parquet", bytes_per_photo=60),
)


@dataclass(kw_only=True, slots=True)
class Tally:
    """Seconds and executions, over all processes."""

    executions: int = 0
    """Begun."""
    won: int = 0
    lost: int = 0
    """Through, and another had been faster."""
    worked_s: float = 0.0
    idle_s: float = 0.0
    """That workers waited for a unit while some had never been taken."""
    commit_s: float = 0.0
    acquire_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Process:
    """One life of a rank.

    Args:
        slot: number of the rank in its job and node.
        speed: of the rank, 1 for the usual.
        seconds_of: how long a unit takes at speed 1.
        adopt: gives an open ledger its units.
        fresh_until: when the last unit was taken for the first time, infinity while there are some.
        is_over: whether all units are done, and this process need not find that out.
        on_end: called when it has ended by itself.
    """

    slot: int
    clock: Clock
    files: SimulatedFiles
    speed: float
    photos: int
    seconds_of: Callable[[Unit], float]
    adopt: Callable[[Ledger], object]
    fresh_until: Callable[[], float]
    is_over: Callable[[], bool]
    on_end: Callable[[Process], None]
    tally: Tally
    make_ledger: Callable[..., Ledger] = Ledger
    since_s: float = 0.0
    """When it began to look for work."""
    until_s: float | None = None
    """When it ended or was killed."""
    is_stopping: bool = False
    """Asked to end: it takes nothing more."""
    is_complete: bool = False
    """It has seen that everything is done."""
    totals: Totals | None = None
    """What it says has come of that."""
    _ledger: Ledger = field(init=False)
    _asked: Handover[bool] = field(init=False)
    _to_work: Handover[Execution | None] = field(init=False)
    _to_write: Handover[Execution | None] = field(init=False)
    _tasks: list[greenlet] = field(default_factory=list)

    def start(self) -> None:
        """Begin to live."""
        self.since_s = self.clock.now_s
        self._asked, self._to_work, self._to_write = (Handover(self.clock) for _ in range(3))
        self._tasks = [self.clock.start(work) for work in (self._read, self._work, self._write)]

    def kill(self) -> None:
        """End it where it stands."""
        self.files.is_alive = False
        self.until_s = self.clock.now_s
        for task in self._tasks:
            self.clock.kill(task)
        self._tasks = []

    def _read(self) -> None:
        self._ledger = self.make_ledger(OUT, files=self.files, worker=f"{self.files.owner().host}-r{self.slot}")
        self._ledger.open(PINNED)
        self.adopt(self._ledger)
        pause_s = FIRST_WAIT_S
        self._asked.put(True)
        while self._asked.get() and not self.is_stopping and not self.is_over():
            began_s = self.clock.now_s
            taken = self._ledger.acquire()
            self.tally.acquire_s += self.clock.now_s - began_s
            if taken is None:
                self.is_complete = True
                break
            if taken == "wait":
                self.clock.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_WAIT_S)
                self._asked.put(True)
            else:
                pause_s = FIRST_WAIT_S
                self.tally.executions += 1
                self._to_work.put(taken)
        self._to_work.put(None)

    def _work(self) -> None:
        execution: Execution | None = None
        while True:
            began_s = self.clock.now_s
            execution = self._to_work.get()
            self.tally.idle_s += max(0.0, min(self.clock.now_s, self.fresh_until()) - began_s)
            if execution is not None:
                began_s, seconds = self.clock.now_s, self.seconds_of(execution.unit) / self.speed
                try:
                    self.clock.wait(max(0.0, seconds - AHEAD_S))
                    self._asked.put(True)
                    self.clock.wait(min(seconds, AHEAD_S))
                finally:
                    # Killed in the midst of it, too.
                    self.tally.worked_s += (self.clock.now_s - began_s) * self.speed
            self._to_write.put(execution)
            if execution is None:
                return

    def _write(self) -> None:
        while (execution := self._to_write.get()) is not None:
            began_s = self.clock.now_s
            index = execution.unit.index
            outputs = [table.path.format(index) for table in EMBED]
            for table, relative in zip(EMBED, outputs, strict=True):
                token = f"{execution.token} {relative}".encode()
                self.files.write_table(execution.stage(relative), token, table.bytes_per_photo * self.photos)
            counts = UnitCounts(samples=self.photos, rows=self.photos, errors=0, unit_error=None, warnings=())
            if self._ledger.commit(execution, outputs, counts):
                self.tally.won += 1
            else:
                self.tally.lost += 1
            self.tally.commit_s += self.clock.now_s - began_s
        if self.is_complete:
            self.totals = self._ledger.totals()
        self._ledger.close()
        self.until_s = self.clock.now_s
        self.on_end(self)
