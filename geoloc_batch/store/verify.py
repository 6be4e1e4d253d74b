"""Verify: is everything there, once, and unharmed? Read from the files; the markers only say what should be there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.done import check_source
from geoloc_batch.store.files import OsFiles, stat
from geoloc_batch.store.goal import Goal, marker_path, parse_goal, reached_goals
from geoloc_batch.store.marker import Marker, read_marker, standing_marker
from geoloc_batch.store.pin import FOREIGN_BUT_HARMLESS, RUN_FILE, config_hash, read_config
from geoloc_batch.store.plan import plan_name, read_plan
from geoloc_batch.store.seen import Seen
from geoloc_batch.store.verification import Verification, again
from geoloc_batch.store.verify_unit import check_doubles, check_unit

PLAN_NAME = re.compile(r"plan(_\d+)?\.parquet")


def verify(out: Path | str) -> Verification:
    """Check an output folder. Nothing is changed.

    Raises:
        OutputError: it is none of ours.
    """
    out = Path(out)
    found = Verification()
    config = _read_config(out, found)
    plan = _read_plan(out, found)
    if plan is None:
        # Which files belong to what cannot be told: none of them may be called too many.
        return found
    found.units = len(plan)
    seen = Seen()
    recorded: set[str] = set()
    leaving: set[str] = set()
    undone = 0
    reached = reached_goals(out, range(len(plan)), OsFiles().names)
    for unit in plan:
        marker = _read_marker(out, unit, reached.get(unit.index, Goal(unit.index)), found)
        if marker is None:
            undone += 1
            continue
        recorded.update(file.path for file in marker.files)
        if (out / marker.staging).is_dir():
            leaving.update(marker.obsolete)
        found.samples += marker.counts.samples
        if config is not None and marker.config != config:
            found.problems.append(
                f"unit {unit.index} ({unit.source}) was made with config {marker.config}, {out / RUN_FILE} says "
                f"{config}: two runs are mixed; {again(out, marker.unit)}"
            )
        check_unit(out, unit, marker, found, seen)
    if undone:
        found.missing += undone
        found.problems.append(f"{undone} of {len(plan)} units are not done; run the same command again")
    check_doubles(out, plan, seen, found)
    _check_markers(out, len(plan), found)
    _check_orphans(out, recorded, leaving, found)
    return found


def _read_config(out: Path, found: Verification) -> str | None:
    """Hash of the pinned config, None where run.json is there and harmed."""
    try:
        return config_hash(read_config(out))
    except (OutputError, OSError) as error:
        if stat(out / RUN_FILE) is None:
            raise
        found.problems.append(
            f"{out / RUN_FILE} cannot be read ({error}); put it back as it was, or run again with another --out"
        )
        return None


def _read_plan(out: Path, found: Verification) -> list[Unit] | None:
    """The planned units; None, and a problem, where there is no plan to hold the files against."""
    try:
        plan, num_parts = read_plan(out)
    except (OutputError, OSError) as error:
        found.problems.append(f"{error}; then run the same command again")
        return None
    parts = {plan_name(part) for part in range(num_parts)}
    strays = sorted(path.name for path in out.iterdir() if PLAN_NAME.fullmatch(path.name) and path.name not in parts)
    if strays:
        found.problems.append(
            f"{out} has {strays[0]} and no {plan_name(num_parts)}; put that back as it was, or run again with another "
            f"--out"
        )
    if plan:
        return plan
    if not strays:
        markers = sum(1 for _ in (out / "_done").glob("*/*.json"))
        results = sum(1 for _ in _results(out))
        if markers or results:
            found.problems.append(
                f"{out} has no {plan_name(0)}, and {markers} markers and {results} files of results: whose they are is "
                f"lost; put the plan back as it was, or run again with another --out"
            )
        else:
            found.problems.append(f"nothing was planned in {out}, so nothing is proved; run the same command again")
    return None


def _read_marker(out: Path, unit: Unit, goal: Goal, found: Verification) -> Marker | None:
    """A unit's marker; None, and a problem where one is there, for none of its own."""
    try:
        marker = read_marker(out, goal)
        if marker is not None:
            check_source(out, marker, unit.source)
        return marker
    except OutputError as error:
        found.problems.append(str(error))
    except OSError as error:
        path = marker_path(out, goal)
        found.problems.append(f"{path} cannot be read ({error}); remove it and run the same command again")
    return None


def _check_markers(out: Path, num_units: int, found: Verification) -> None:
    """Markers of units that the plan does not have, and what is none."""
    beyond: list[Path] = []
    for path in sorted((out / "_done").glob("*/*")):
        goal = parse_goal(path.name.removesuffix(".json"))
        if FOREIGN_BUT_HARMLESS.fullmatch(path.name):
            continue
        if goal is None or path != marker_path(out, goal):
            found.problems.append(f"{path} is not a marker; remove it")
        elif goal.unit >= num_units:
            beyond.append(path)
        elif goal.retry and stat(marker_path(out, goal.before)) is None:
            found.problems.append(
                f"{path} is the marker of a retry, and {marker_path(out, goal.before).name} before it has gone; put "
                f"that back as it was, or remove every marker of unit {goal.unit} and run the same command again"
            )
    # A run that goes on may have planned and done more since the plan was read.
    if beyond and len(read_plan(out)[0]) == num_units:
        found.problems.append(
            f"{len(beyond)} units are marked done that the plan does not have, the first in {beyond[0]}: a part of the "
            f"plan was removed; put it back as it was, or remove these markers and run the command for their shards "
            f"again"
        )


def _results(out: Path) -> Iterator[Path]:
    """Every result file, relative to OUT."""
    for suffix in ("npy", "parquet"):
        for path in sorted(out.rglob(f"*.{suffix}")):
            relative = path.relative_to(out)
            if not relative.parts[0].startswith("_") and not PLAN_NAME.fullmatch(relative.parts[0]):
                yield relative


def _check_orphans(out: Path, recorded: set[str], leaving: set[str], found: Verification) -> None:
    """Result files that no marker names. Those of which a retry that was cut off has not come to be rid are leaving."""
    for relative in _results(out):
        if relative.as_posix() not in recorded and not _is_committed_since(out, relative):
            mend = "run the same command again" if relative.as_posix() in leaving else "remove it"
            found.problems.append(f"{out / relative} belongs to no committed unit; {mend}")


def _is_committed_since(out: Path, relative: Path) -> bool:
    """Whether a unit that was still in work when its marker was asked for has brought this file since."""
    number = relative.stem.rpartition("_")[2]
    try:
        marker = standing_marker(out, int(number)) if number.isdecimal() else None
    except (OutputError, OSError):
        # The marker is broken, which has been told: whether the file belongs to it nobody knows.
        return True
    return marker is not None and any(file.path == relative.as_posix() for file in marker.files)
