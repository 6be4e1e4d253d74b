"""Progress: how fast a run is, what it waits for and how long it will take, from what is done.

A result's photos are spread evenly over the time from its lease to its commit. A rank's speed is what falls into the
last ten minutes before the run's latest commit, over the time in which it worked then: a night without a job is none. A
run's speed is the sum over the ranks that are at work; where none of these has committed anything yet, or none is left,
that of all in the same ten minutes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from geoloc_batch.records import Unit
from geoloc_batch.store.lease import SECOND_NS, Lease
from geoloc_batch.store.standing import Standing

SPAN_S = 600.0
UNKNOWN_STAGE = "unknown"
"""Stage of error rows in runs of older versions, whose markers do not tell."""


@dataclass(frozen=True, slots=True)
class Result:
    """What is kept of a marker: there may be a million of them."""

    unit: int
    samples: int
    rows: int
    errors: int
    errors_by_stage: dict[str, int]
    has_unit_error: bool
    is_retryable: bool
    is_quarantined: bool
    worker: str
    """Who made it, "" where that is not known."""
    limiting_stage: str
    began_s: float
    ended_s: float
    """Seconds since 1970, by the file server's clock."""

    @staticmethod
    def of(standing: Standing) -> Result:
        """From the marker."""
        marker, work = standing.marker, standing.marker.work
        counts = marker.counts
        ended_s = work.ended_s if work else standing.mtime_s
        seconds = max(0.0, work.seconds if work else marker.seconds)
        told = sum(counts.errors_by_stage.values())
        untold = {UNKNOWN_STAGE: counts.errors - told} if counts.errors > told else {}
        return Result(
            unit=marker.unit,
            samples=counts.samples,
            rows=counts.rows,
            errors=counts.errors,
            errors_by_stage=counts.errors_by_stage | untold,
            has_unit_error=counts.unit_error is not None,
            is_retryable=counts.is_retryable,
            is_quarantined=marker.quarantined,
            worker=work.worker if work else "",
            limiting_stage=work.limiting_stage if work else "",
            began_s=ended_s - seconds,
            ended_s=ended_s,
        )

    def share_after(self, start_s: float) -> float:
        """Which part of the work on it was done after `start_s`, 0 to 1."""
        if self.ended_s <= start_s:
            return 0.0
        return min(1.0, (self.ended_s - start_s) / max(self.ended_s - self.began_s, 1e-9))


def recent(results: Iterable[Result]) -> tuple[list[Result], float]:
    """The results with work in the last SPAN_S before the latest of them, and when that span began."""
    made = [result for result in results if not result.is_quarantined]
    start_s = max((result.ended_s for result in made), default=0.0) - SPAN_S
    return [result for result in made if result.ended_s > start_s], start_s


def speed(results: Sequence[Result], start_s: float, weigh: Callable[[Result], float]) -> float | None:
    """What was done a second since `start_s`, over the time in which somebody worked; None where that cannot be told.

    Args:
        results: in any order.
        start_s: seconds since 1970.
        weigh: what a result counts for: its photos, or its bytes.
    """
    done = sum(weigh(result) * result.share_after(start_s) for result in results)
    worked_s = _union_s((max(result.began_s, start_s), result.ended_s) for result in results)
    return done / worked_s if worked_s > 0 else None


def speed_in_all(
    results: Sequence[Result], start_s: float, weigh: Callable[[Result], float], workers: Collection[str]
) -> tuple[float | None, int]:
    """The speed of a run, and how many of the `workers`, who are at work now, it is of; 0 where it is that of all."""
    made: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.worker in workers:
            made[result.worker].append(result)
    speeds = [per_s for own in made.values() if (per_s := speed(own, start_s, weigh)) is not None]
    return (sum(speeds), len(speeds)) if speeds else (speed(results, start_s, weigh), 0)


def _union_s(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans lasted."""
    until, total = float("-inf"), 0.0
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def limiting_stage(results: Iterable[Result]) -> str | None:
    """The stage that most of the time was spent waiting for, None where nobody has measured it."""
    seconds: dict[str, float] = defaultdict(float)
    for result in results:
        if result.limiting_stage not in ("", "none"):
            seconds[result.limiting_stage] += result.ended_s - result.began_s
    return max(seconds, key=lambda stage: seconds[stage], default=None)


def seconds_left(
    plan: Sequence[Unit], results: Mapping[int, Result], working: Collection[Lease], now_s: float
) -> float | None:
    """How long it will take at the present speed, None where nothing tells.

    Args:
        plan: every unit.
        results: what is done, by unit.
        working: live leases; what they have probably done of their units counts.
        now_s: by the file server's clock.
    """
    sizes = [unit.num_bytes for unit in plan if unit.num_bytes > 0]
    # One of unknown size is taken for a middling one.
    usual = sum(sizes) / len(sizes) if sizes else 1.0
    latest, start_s = recent(results.values())
    workers = {lease.worker for lease in working if lease.worker}
    per_s, num_measured = speed_in_all(latest, start_s, lambda result: plan[result.unit].num_bytes or usual, workers)
    if not per_s:
        return None
    if num_measured:
        # Who has committed nothing yet is taken for as fast as the others.
        per_s *= len(workers) / num_measured
    paces = [
        (result.ended_s - result.began_s) / (plan[result.unit].num_bytes or usual)
        for result in latest
        if result.ended_s > result.began_s
    ]
    # Once for all of thousands of ranks.
    pace = median(paces)
    left: float = sum(unit.num_bytes or usual for unit in plan if unit.index not in results)
    begun = {lease.goal.unit: lease.taken_ns / SECOND_NS for lease in working if lease.taken_ns}
    for unit, since_s in begun.items():
        if unit not in results and unit < len(plan):
            size = plan[unit].num_bytes or usual
            left -= size * min(1.0, max(0.0, now_s - since_s) / (pace * size))
    return max(0.0, left / per_s)
