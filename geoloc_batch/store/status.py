"""Status: how far a run is, for somebody who only looks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from geoloc_batch.store.files import OsFiles, stat
from geoloc_batch.store.goal import Goal, marker_path, reached_goals
from geoloc_batch.store.lease import SECOND_NS, read_lease
from geoloc_batch.store.marker import Marker, read_marker
from geoloc_batch.store.pin import RUN_FILE, read_config
from geoloc_batch.store.plan import read_plan

# The ledger's own defaults: a lease that has missed four beats of 15 s is dead.
STALE_S = 60.0
# Speed is taken from the units that were committed in this span before the latest.
SPEED_SPAN_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands. Units are done, running or waiting; one that is retried is done, and may run."""

    out: str
    units: int
    done: int
    """Committed or quarantined."""
    running: int
    waiting: int
    quarantined: int
    unit_errors: int
    """Done units with a unit error, quarantined ones included."""
    retryable: int
    """Done units with an error that another try could mend: what `geoloc retry` executes."""
    samples: int
    """Photos seen."""
    rows: int
    """One for each good photo, or for each location that they show."""
    errors: int
    started: str
    """When the config was pinned, ISO 8601, UTC."""
    images_per_second: float | None
    """Over the last ten minutes of commits, all ranks together; None where fewer than two units tell."""


def status(out: Path | str) -> Status:
    """Read an output folder. Nothing is written, so it may be asked of a folder that one cannot write.

    Raises:
        OutputError: it is none of ours.
    """
    out = Path(out)
    read_config(out)
    plan, _ = read_plan(out)
    reached = reached_goals(out, range(len(plan)), OsFiles().names)
    markers = {goal: marker for goal in reached.values() if (marker := read_marker(out, goal)) is not None}
    live = _live_goals(out)
    running = {goal for goal in live if goal.unit not in reached}
    counts = [marker.counts for marker in markers.values()]
    pinned = stat(out / RUN_FILE)
    return Status(
        out=str(out),
        units=len(plan),
        done=len(markers),
        running=len(running) + sum(goal.unit in reached and goal > reached[goal.unit] for goal in live),
        waiting=len(plan) - len(markers) - len(running),
        quarantined=sum(marker.quarantined for marker in markers.values()),
        unit_errors=sum(count.unit_error is not None for count in counts),
        retryable=sum(count.is_retryable for count in counts),
        samples=sum(count.samples for count in counts),
        rows=sum(count.rows for count in counts),
        errors=sum(count.errors for count in counts),
        started=datetime.fromtimestamp(pinned.mtime_ns / SECOND_NS if pinned else 0, UTC).isoformat(timespec="seconds"),
        images_per_second=_speed(out, markers),
    )


def _live_goals(out: Path) -> set[Goal]:
    """Goals with a live lease, as well as can be told without writing (by this machine's clock)."""
    machine = OsFiles()
    live = set()
    for name in machine.names(out / "_leases"):
        found = stat(out / "_leases" / name)
        lease = read_lease(out / "_leases" / name, found.mtime_ns) if found is not None else None
        if lease is None or found is None:
            continue
        is_gone = lease.owner is not None and machine.is_gone(lease.owner)
        if not is_gone and time.time() - found.mtime_ns / SECOND_NS <= STALE_S:
            live.add(lease.goal)
    return live


def _speed(out: Path, markers: dict[Goal, Marker]) -> float | None:
    times = {goal: found.mtime_ns / SECOND_NS for goal in markers if (found := stat(marker_path(out, goal)))}
    latest = max(times.values(), default=0.0)
    recent = sorted((when, goal) for goal, when in times.items() if when >= latest - SPEED_SPAN_S)
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    # The first of them began before the span that is measured.
    samples = sum(markers[goal].counts.samples for _, goal in recent[1:])
    return round(samples / (recent[-1][0] - recent[0][0]), 2)
