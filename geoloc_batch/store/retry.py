"""Retry: which done units are tried again."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit
from geoloc_batch.store.adoption import load_checked
from geoloc_batch.store.done import Done, check_source
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import reached_goals
from geoloc_batch.store.marker import UnitCounts, read_marker
from geoloc_batch.store.places import Source, place_of, reopened


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry works on."""

    planned: list[Unit]
    """Every pinned unit."""
    units: list[Unit] = field(default_factory=list)
    """Those to execute, as they can be opened now."""
    retries: dict[int, int] = field(default_factory=dict)
    """The number of the retry, by the index of each of them."""
    warnings: list[str] = field(default_factory=list)


def retried(
    files: FilePort, out: Path, done: Done, choose: Callable[[UnitCounts], bool], forced: Collection[int]
) -> Retried:
    """Choose among what is done; see Ledger.adopt_retries."""
    plan = load_checked(files, out, done)
    found = Retried(plan.units)
    reached = reached_goals(out, range(len(plan.units)), files.names)
    unknown = sorted(unit for unit in forced if unit not in reached)
    if unknown:
        is_planned = 0 <= unknown[0] < len(plan.units)
        why = "it is not done yet; run its command again" if is_planned else "there is none"
        raise InputError(f"unit {unknown[0]} of {out} cannot be retried: {why}")
    ranges: dict[Source, list[Unit]] = defaultdict(list)
    for unit in plan.units:
        ranges[unit.kind, unit.source].append(unit)
    for index, goal in sorted(reached.items()):
        marker = read_marker(out, goal, files.read)
        if marker is None:
            continue
        check_source(out, marker, plan.units[index].source)
        if index not in forced and not choose(marker.counts):
            continue
        planned = plan.units[index]
        resized = _resized(reopened(planned, plan.places.get(index)), ranges[planned.kind, planned.source])
        if resized is None:
            found.warnings.append(
                f"unit {index} is left out: {planned.source} was planned in ranges, and has another size now; put the "
                f"old file back, or take another --out"
            )
            continue
        found.units.append(resized)
        found.retries[index] = goal.retry + 1
    return found


def _resized(unit: Unit, ranges: Sequence[Unit]) -> Unit | None:
    """A unit with today's size; None where it is one range of a file that has changed, for then its borders lie."""
    place = place_of(unit)
    if unit.kind != "shard" or place is None or not os.path.isfile(place):
        return unit
    size = os.path.getsize(place)
    if len(ranges) == 1:
        return dataclasses.replace(unit, num_bytes=size)
    return unit if sum(other.num_bytes for other in ranges) == size else None
