"""Ranks: who works on a run, and who has gone silent, as well as somebody can tell who only looks."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.lease import SECOND_NS, Lease, parse_lease_name, read_lease
from geoloc_batch.store.progress import Result, speed
from geoloc_batch.store.standing import read_many

UNNAMED = "unknown"
"""Whose lease does not say yet who took it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One process that holds a unit, or has committed one lately."""

    name: str
    """host-pid-r{rank}, as its log in _logs/ is called."""
    state: Literal["working", "silent", "idle"]
    """silent: holds units and has shown no sign of life for longer than it may. idle: holds none."""
    silent_s: float
    """Seconds since its last beat, or, of an idle one, since its last commit."""
    holds: tuple[int, ...]
    """Units that it has in hand."""
    units: int
    """Those that stand by its hand."""
    samples: int
    """Photos in them."""
    images_per_second: float | None
    """Lately; None where nothing tells."""


@dataclass(frozen=True, slots=True)
class Leased:
    """The leases of a run at one moment."""

    live: tuple[Lease, ...]
    dead: tuple[Lease, ...]
    """Their owners have missed their beats, or are known to have ended."""
    now_s: float
    """By the file server's clock where it would tell, else by this machine's."""


def read_leases(out: Path) -> Leased:
    """Every lease, and whose owner still lives."""
    machine = OsFiles()
    names = (name for name in machine.names(out / "_leases") if parse_lease_name(name))
    found = [lease for lease in read_many(lambda name: _read(out / "_leases" / name), names) if lease is not None]
    now_s = _now_s(machine, out) if found else time.time()
    live = {lease.path for lease in found if _is_live(machine, lease, now_s)}
    return Leased(
        tuple(lease for lease in found if lease.path in live),
        tuple(lease for lease in found if lease.path not in live),
        now_s,
    )


def _read(path: Path) -> Lease | None:
    """A lease, None where it has been given back meanwhile."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        # Of the open file: its time is no further question to the file server.
        return read_lease(path, os.fstat(file.fileno()).st_mtime_ns, lambda _: file.readall())
    return None


def _is_live(machine: OsFiles, lease: Lease, now_s: float) -> bool:
    is_gone = lease.owner is not None and machine.is_gone(lease.owner)
    return not is_gone and now_s - lease.mtime_ns / SECOND_NS <= lease.stale_s


def _now_s(machine: OsFiles, out: Path) -> float:
    """By the file server's clock, which may differ from ours by more than a lease's time.

    For that a file is made for a moment, as every rank has one; where this user may not, our own clock has to do.
    """
    clock = out / "_leases" / f"clock.{machine.token()}"
    with contextlib.suppress(OSError):
        try:
            return machine.create(clock) / SECOND_NS
        finally:
            clock.unlink(missing_ok=True)
    return time.time()


def ranks_of(leased: Leased, results: Iterable[Result], latest: Sequence[Result], start_s: float) -> tuple[Rank, ...]:
    """Everybody who holds a unit or has committed one lately: silent ones first, then by name.

    Args:
        leased: who holds what.
        results: all that is done.
        latest: those with work since `start_s`.
        start_s: seconds since 1970.
    """
    held: dict[str, list[Lease]] = defaultdict(list)
    for lease in (*leased.live, *leased.dead):
        held[lease.worker or UNNAMED].append(lease)
    lately: dict[str, list[Result]] = defaultdict(list)
    for result in latest:
        if result.worker:
            lately[result.worker].append(result)
    made: dict[str, tuple[int, int]] = {}
    for result in results:
        units, samples = made.get(result.worker, (0, 0))
        made[result.worker] = units + 1, samples + result.samples
    alive = {lease.worker or UNNAMED for lease in leased.live}
    ranks = []
    for name in {*held, *lately}:
        signs = [lease.mtime_ns / SECOND_NS for lease in held[name]] or [made.ended_s for made in lately[name]]
        per_s = speed(lately[name], start_s, lambda result: result.samples)
        ranks.append(
            Rank(
                name=name,
                state="working" if name in alive else "silent" if held[name] else "idle",
                silent_s=round(max(0.0, leased.now_s - max(signs)), 1),
                holds=tuple(sorted({lease.goal.unit for lease in held[name]})),
                units=made.get(name, (0, 0))[0],
                samples=made.get(name, (0, 0))[1],
                images_per_second=None if per_s is None else round(per_s, 2),
            )
        )
    return tuple(sorted(ranks, key=lambda rank: (("silent", "working", "idle").index(rank.state), rank.name)))
