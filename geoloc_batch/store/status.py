"""Status: how far a run is, for somebody who only looks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from geoloc_batch.records import Unit
from geoloc_batch.store.files import OsFiles, stat
from geoloc_batch.store.goal import Goal, reached_goals
from geoloc_batch.store.lease import SECOND_NS
from geoloc_batch.store.pin import RUN_FILE, read_config
from geoloc_batch.store.plan import plan_name, read_plan
from geoloc_batch.store.progress import Result, limiting_stage, recent, seconds_left, speed_in_all
from geoloc_batch.store.ranks import Leased, Rank, ranks_of, read_leases
from geoloc_batch.store.standing import read_standing


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands. Units are done, running or waiting; one that is retried is done, and may run."""

    out: str
    state: Literal["complete", "running", "stopped"]
    """stopped: units are left, and nobody holds one."""
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
    errors_by_stage: dict[str, int]
    """Error rows by the stage that refused them; "unknown" in what older versions made."""
    started: str
    """When the config was pinned, ISO 8601, UTC."""
    images_per_second: float | None
    """Over the last ten minutes of work, all ranks together that are at work; None where nothing tells."""
    eta_seconds: float | None
    """Until all is done, at that speed; None where nobody works, or nothing tells."""
    limiting_stage: str | None
    """What the ranks waited for most in that time; None where nothing tells."""
    silent: int
    """Ranks that hold units and show no sign of life; others take these up."""
    ranks: tuple[Rank, ...]
    """Who holds a unit, or has committed one in that time."""


def status(out: Path | str) -> Status:
    """Read an output folder, also one that this user cannot write.

    Raises:
        OutputError: it is none of ours, or its plan or a marker is broken.
    """
    return Looker(out).look()


class Looker:
    """Looks at a run again and again: a marker never changes, so each is read once."""

    def __init__(self, out: Path | str) -> None:
        self.out = Path(out)
        self._results: dict[Goal, Result] = {}
        self._plan: list[Unit] = []
        self._num_parts = 0

    def look(self) -> Status:
        """As `status`."""
        read_config(self.out)
        if not self._num_parts or stat(self.out / plan_name(self._num_parts)) is not None:
            self._plan, self._num_parts = read_plan(self.out)
        # First: what is committed after this look is done, and not waiting.
        leased = read_leases(self.out)
        reached = reached_goals(self.out, range(len(self._plan)), OsFiles().names)
        fresh = sorted(set(reached.values()) - self._results.keys())
        found = {standing.marker.goal: Result.of(standing) for standing in read_standing(self.out, fresh)}
        known = self._results | found
        self._results = {goal: known[goal] for goal in reached.values() if goal in known}
        return self._sum(leased)

    def _sum(self, leased: Leased) -> Status:
        results = {result.unit: result for result in self._results.values()}
        latest, start_s = recent(results.values())
        running, retried = self._in_work(leased)
        workers = {lease.worker for lease in leased.live if lease.worker}
        per_s, _ = speed_in_all(latest, start_s, lambda result: result.samples, workers)
        is_complete = len(results) == len(self._plan) > 0 and not retried
        ranks = ranks_of(leased, results.values(), latest, start_s)
        left_s = seconds_left(self._plan, results, leased.live, leased.now_s) if leased.live else None
        stages: Counter[str] = Counter()
        for result in results.values():
            stages.update(result.errors_by_stage)
        return Status(
            out=str(self.out),
            state="complete" if is_complete else "running" if leased.live else "stopped",
            units=len(self._plan),
            done=len(results),
            running=running + retried,
            waiting=len(self._plan) - len(results) - running,
            quarantined=sum(result.is_quarantined for result in results.values()),
            unit_errors=sum(result.has_unit_error for result in results.values()),
            retryable=sum(result.is_retryable for result in results.values()),
            samples=sum(result.samples for result in results.values()),
            rows=sum(result.rows for result in results.values()),
            errors=sum(result.errors for result in results.values()),
            errors_by_stage=dict(sorted(stages.items())),
            started=self._started(),
            images_per_second=None if per_s is None else round(per_s, 2),
            eta_seconds=0.0 if is_complete else None if left_s is None else round(left_s, 1),
            limiting_stage=limiting_stage(latest),
            silent=sum(rank.state == "silent" for rank in ranks),
            ranks=ranks,
        )

    def _in_work(self, leased: Leased) -> tuple[int, int]:
        """Units that are executed for the first time, and those that are retried."""
        stands = {goal.unit: goal for goal in self._results}
        live = {lease.goal for lease in leased.live if lease.goal.unit < len(self._plan)}
        first = {goal.unit for goal in live if goal.unit not in stands}
        return len(first), sum(goal.unit in stands and goal > stands[goal.unit] for goal in live)

    def _started(self) -> str:
        pinned = stat(self.out / RUN_FILE)
        return datetime.fromtimestamp(pinned.mtime_ns / SECOND_NS if pinned else 0, UTC).isoformat(timespec="seconds")
