"""Adoption: the units of a run are found in the plan of OUT, or appended to it, whatever other ranks do meanwhile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.done import Done
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import Goal, marker_path, retry_without_first
from geoloc_batch.store.places import told_of_moved
from geoloc_batch.store.plan import Plan, load_plan, match_plan, plan_bytes, plan_name
from geoloc_batch.store.publish import publish, remove_tree, stage_candidate

# Over a network a part of the plan may show later than the markers of its units.
LOOK_WAITS_S = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a rank works on."""

    units: list[Unit]
    """In the order of their indexes."""
    sources: dict[int, str]
    """Each unit's source as it was pinned: by that its marker knows it."""
    warnings: list[str]


def adopt(files: FilePort, out: Path, units: Sequence[Unit], done: Done, *, has_links: bool) -> Adopted:
    """Pin units, or find them again; see Ledger.adopt_plan."""
    moved: list[str] = []
    while True:
        plan = load_checked(files, out, done)
        names = _listed_once(files, out)
        done.look_all((unit.index for unit in plan.units), names)
        _refuse_lone_retries(out, [unit.index for unit in plan.units if unit.index not in done], names)
        adopted, fresh, warnings = match_plan(plan.units, units, done.__contains__, plan.places)
        if not fresh:
            break
        # Asked while they are new: once they are pinned, the next turn cannot tell.
        given = {unit.index for unit in adopted}
        moved = moved or told_of_moved([unit for unit in plan.units if unit.index not in given], fresh, plan.places)
        append(files, out, fresh, plan.num_parts, has_links=has_links)
    # Another rank may have published the plan and not synced it yet: our markers must not outlive it.
    files.sync_folder(out)
    return Adopted(adopted, {unit.index: plan.units[unit.index].source for unit in adopted}, [*warnings, *moved])


def load_checked(files: FilePort, out: Path, done: Done) -> Plan:
    """The plan, refused where units are done that it does not have: their indexes would be given out again."""
    marker: Path | None = None
    for wait_s in LOOK_WAITS_S:
        if marker is not None:
            files.sleep(wait_s)
        # Read after the marker was seen: whoever made that had the plan.
        plan = load_plan(out, files.read)
        marker = done.beyond(len(plan.units))
        if marker is None:
            return plan
    name = plan_name(plan.num_parts)
    raise OutputError(
        f"{marker} says that a unit is done which the plan in {out} does not have: {name} was removed; put it back as "
        f"it was, or take another --out"
    )


def _listed_once(files: FilePort, out: Path) -> Callable[[Path], Iterable[str]]:
    """Lists folders of markers, each once, and those alone that are there: a new OUT has none of a long plan's."""
    there = set(files.names(out / "_done"))

    @functools.cache
    def names(folder: Path) -> list[str]:
        return files.names(folder) if folder.name in there else []

    return names


def _refuse_lone_retries(out: Path, undone: Sequence[int], names: Callable[[Path], Iterable[str]]) -> None:
    """A unit whose first marker was removed would be done anew, and its files moved over those of its retry."""
    retry = retry_without_first(out, undone, names)
    if retry is not None:
        raise OutputError(
            f"{marker_path(out, retry)} is the marker of a retry, and {marker_path(out, Goal(retry.unit)).name} before "
            f"it has gone; put that back as it was, or remove every marker of unit {retry.unit} and run the same "
            f"command again"
        )


def append(files: FilePort, out: Path, fresh: Sequence[Unit], part: int, *, has_links: bool) -> None:
    """Publish one more part of the plan. Another rank may be faster: the caller looks again.

    Raises:
        OutputError: a later part stands there, so this one was removed.
    """
    name, data = plan_name(part), plan_bytes(fresh, out)
    later = plan_name(part + 1)
    if files.stat(out / later) is not None and files.stat(out / name) is None:
        raise OutputError(f"{out} has {later} and no {name}; put that back as it was, or take another --out")
    scratch = out / "_staging" / f"plan.{files.token()}"
    # Gone where a rank that saw us stopped for long has swept it: the caller's next turn does it again.
    with contextlib.suppress(FileNotFoundError):
        candidate = stage_candidate(files, scratch, name, data)
        publish(files, candidate, out / name, data, has_links=has_links)
    remove_tree(files, scratch)
