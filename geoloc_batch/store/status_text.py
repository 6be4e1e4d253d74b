"""A status in words, for a terminal."""

from __future__ import annotations

from geoloc_batch.store.ranks import Rank
from geoloc_batch.store.status import Status

MAX_RANKS = 24
"""Lines for ranks: silent ones first, so that none of those is left out by many that work."""
MAX_HELD = 4


def format_status(found: Status) -> str:
    """Several lines, the last without a line break."""
    units = [f"{found.done} of {found.units} units done"]
    units += [f"{count} {word}" for count, word in ((found.running, "running"), (found.waiting, "waiting")) if count]
    failed = []
    if found.unit_errors:
        failed.append(f"units that could not be read to their end: {found.unit_errors}")
    if found.quarantined:
        failed.append(f"given up after executions that never ended: {found.quarantined}")
    if found.retryable:
        failed.append(f"units that geoloc retry could mend: {found.retryable}")
    lines = [
        f"{found.out}: {found.state}, {', '.join(units)}",
        f"  photos   {found.samples:,} seen: {found.rows:,} rows, {_errors(found)}",
        *([f"  failed   {'; '.join(failed)}"] if failed else []),
        f"  speed    {_speed(found)}",
    ]
    return "\n".join([*lines, *_ranks(found.ranks)])


def format_line(found: Status) -> str:
    """The same in one line."""
    silent = [f"{found.silent} silent"] if found.silent else []
    return ", ".join(
        [
            f"{found.done}/{found.units} units",
            f"{found.running} running",
            f"{found.waiting} waiting",
            f"{found.unit_errors} failed",
            f"{found.samples} photos",
            f"{found.errors} errors",
            *silent,
            _speed(found),
        ]
    )


def _errors(found: Status) -> str:
    if not found.errors:
        return "no errors"
    stages = sorted(found.errors_by_stage.items(), key=lambda item: -item[1])
    return f"{found.errors:,} errors ({', '.join(f'{stage} {count:,}' for stage, count in stages)})"


def _speed(found: Status) -> str:
    if found.images_per_second is None:
        return "not known yet"
    parts = [f"{found.images_per_second:,.1f} images/s"]
    if found.limiting_stage is not None:
        parts.append(f"limited by {found.limiting_stage}")
    if found.state != "complete":
        nobody = "nobody works on it" if found.state == "stopped" else "time left not known"
        parts.append(f"{_span(found.eta_seconds)} left" if found.eta_seconds is not None else nobody)
    return ", ".join(parts)


def _ranks(ranks: tuple[Rank, ...]) -> list[str]:
    if not ranks:
        return []
    width = max(4, *(len(rank.name) for rank in ranks[:MAX_RANKS]))
    lines = [f"  {'rank':<{width}}  {'state':<8}  {'units':>6}  {'photos':>10}  {'images/s':>9}"]
    for rank in ranks[:MAX_RANKS]:
        per_s = "" if rank.images_per_second is None else f"{rank.images_per_second:,.1f}"
        line = f"  {rank.name:<{width}}  {rank.state:<8}  {rank.units:>6}  {rank.samples:>10,}  {per_s:>9}"
        if rank.state == "silent":
            more = ", ..." if len(rank.holds) > MAX_HELD else ""
            held = ", ".join(map(str, rank.holds[:MAX_HELD])) + more
            line += f"  for {_span(rank.silent_s)}, holds unit {held}"
        lines.append(line)
    if len(ranks) > MAX_RANKS:
        lines.append(f"  and {len(ranks) - MAX_RANKS:,} more; --json has all of them")
    return lines


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
