"""What a simulated run has cost, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster_jobs import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one run."""

    ranks: int
    units: int
    makespan_s: float
    """From the first start to the last marker."""
    ideal_s: float
    """The same work on the same ranks, alive at the same times, with nothing lost and no rank ever idle."""
    over_ideal: float
    idle: float
    """Share of their time that ranks waited for a unit while there were some that nobody had ever taken."""
    doubled: float
    """Work that was done and not kept, over all work that was needed."""
    executions: int
    lost: int
    deaths: int
    preemptions: int
    ops_per_unit: float
    work_per_unit: float
    """In units of the metadata server's work, all operations of the run over its units."""
    mean_load: float
    """Of the metadata server over the run, of its capacity."""
    peak_load: float
    """What was asked of it in the worst ten seconds, of its capacity."""
    longest_wait_s: float
    """Of one operation in the server's queue."""
    ops_per_s: float
    acquire_ms: float
    """Mean of an acquire that gave a unit, those that gave none counted in."""
    commit_ms: float
    fresh_s: float
    """When the last unit was begun for the first time."""
    known_most_s: float | None
    """From the last marker until 99 of 100 witnesses knew what came of everything."""
    known_s: float | None
    """The same of the last of them: it may be one that works on what others have done by now."""


def figures(cluster: Cluster) -> Figures:
    """Of a cluster that has run."""
    setting, server, tally = cluster.setting, cluster.server, cluster.tally
    is_complete = cluster.is_complete
    makespan_s = cluster.completed_s if is_complete else cluster.clock.now_s
    needed_s = sum(cluster.seconds)
    lives = [
        (life.since_s, min(life.until_s if life.until_s is not None else makespan_s, makespan_s), life.speed)
        for life in cluster.lives
        if life.since_s < makespan_s
    ]
    alive_s = sum(until_s - since_s for since_s, until_s, _ in lives)
    ideal = ideal_s(lives, needed_s)
    num_ops = sum(server.num_ops.values())
    work = server.work
    capacity = server.model.capacity
    until = int(makespan_s) + 1
    bins = server.work_by_second
    in_run = sum(bins[:until])
    ends = sorted(life.until_s for life in cluster.lives if life.is_complete and life.until_s is not None)
    return Figures(
        ranks=setting.ranks,
        units=setting.units,
        makespan_s=makespan_s,
        ideal_s=ideal,
        over_ideal=makespan_s / ideal,
        idle=tally.idle_s / alive_s,
        doubled=tally.worked_s / needed_s - 1,
        executions=tally.executions,
        lost=tally.lost,
        deaths=cluster.deaths,
        preemptions=cluster.preemptions,
        ops_per_unit=num_ops / setting.units,
        work_per_unit=work / setting.units,
        mean_load=in_run / makespan_s / capacity,
        peak_load=max(sum(bins[at : at + 10]) for at in range(until)) / 10 / capacity,
        longest_wait_s=server.longest_wait_s,
        ops_per_s=num_ops * in_run / work / makespan_s,
        acquire_ms=1000 * tally.acquire_s / max(tally.executions, 1),
        commit_ms=1000 * tally.commit_s / max(tally.won + tally.lost, 1),
        fresh_s=cluster.all_leased_s,
        known_most_s=ends[(99 * len(ends) - 1) // 100] - makespan_s if is_complete and ends else None,
        known_s=ends[-1] - makespan_s if is_complete and ends else None,
    )


def ideal_s(lives: Sequence[tuple[float, float, float]], needed_s: float) -> float:
    """When work would be done that nothing holds up.

    Args:
        lives: of each process, since when and until when it lived and how fast it was.
        needed_s: seconds of work at speed 1.
    """
    changes = sorted([(since, speed) for since, _, speed in lives] + [(until, -speed) for _, until, speed in lives])
    now_s, speed, left_s = 0.0, 0.0, needed_s
    for time_s, change in changes:
        if speed * (time_s - now_s) >= left_s:
            return now_s + left_s / speed
        left_s -= speed * (time_s - now_s)
        now_s, speed = time_s, speed + change
    # Where the run was given up, its end.
    return now_s
