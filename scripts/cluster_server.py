"""The metadata server of a simulated cluster: what each operation costs it, and how long that takes.

One queue in front of one server, first come, first served: OUT lies on one metadata server, however many there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster_clock import Clock
from cluster_disk import Disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Filesystem:
    """A model of a server. Its figures are assumptions: take those of your own (mdtest of IO500 measures them)."""

    round_trip_s: float
    """From a rank to the server and back, without waiting there."""
    capacity: float
    """Units of work that the metadata server does in a second; `work` says what an operation takes."""
    entries_per_unit: int = 200
    """Names of a listing that cost one unit."""
    sync_s: float = 0.002
    """To bring a file's bytes to the disk, beside their transfer."""
    sync_folder_s: float = 0.001
    """To bring a folder's names to the disk."""
    bytes_per_s: float = 1e9
    """At which one rank writes, and reads back to hash."""
    stale_s: float = 0.0
    """How old a stat or a listing may be that a node answers from its own cache."""
    work: dict[str, float] = field(
        default_factory=lambda: {
            "create": 1.5,  # open with O_CREAT | O_EXCL, close
            "fill": 1.0,  # open, write, close
            "write": 2.0,  # the same with a new name
            "read": 1.0,
            "digest": 1.0,
            "sync": 1.0,
            "sync_folder": 1.0,
            "link": 1.5,
            "rename": 2.0,
            "remove": 1.0,
            "remove_folder": 1.5,
            "make_folder": 1.5,
            "names": 1.0,
            "stat": 0.5,
            "touch": 1.0,
            "free_bytes": 0.5,
        }
    )


FILESYSTEMS = {
    "lustre": Filesystem(round_trip_s=0.0004, capacity=60_000),
    "nfs": Filesystem(round_trip_s=0.0006, capacity=15_000, entries_per_unit=100, sync_folder_s=0.0, stale_s=3.0),
}


class Server:
    """A disk behind a model's queue, and what was asked of it."""

    def __init__(self, clock: Clock, model: Filesystem) -> None:
        self.clock = clock
        self.model = model
        self.disk = Disk()
        self.num_ops: Counter[str] = Counter()
        self.work = 0.0
        self.work_by_second: list[float] = []
        """In units, by the second at which it was asked for."""
        self.longest_wait_s = 0.0
        self.on_name: Callable[[str], None] = lambda path: None
        """Told of each name that was created or linked, or that a folder was renamed to."""
        self._free_s = 0.0

    def charge(self, name: str, units: float) -> float:
        """Queue an operation; after how many seconds its answer is back."""
        model, now_s = self.model, self.clock.now_s
        self.num_ops[name] += 1
        self.work += units
        second = int(now_s)
        if second >= len(self.work_by_second):
            self.work_by_second += [0.0] * (second + 1 - len(self.work_by_second))
        self.work_by_second[second] += units
        queued_s = self._free_s - now_s
        if queued_s < 0.0:
            queued_s = 0.0
        elif queued_s > self.longest_wait_s:
            self.longest_wait_s = queued_s
        served_s = queued_s + units / model.capacity
        self._free_s = now_s + served_s
        return served_s + model.round_trip_s


def filesystem(name: str, **changes: float | None) -> Filesystem:
    """A preset with some of its figures replaced; None replaces nothing."""
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(FILESYSTEMS[name], **given)
