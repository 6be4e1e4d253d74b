"""Verify: is everything there, once, and unharmed? Read from the files; the markers only say what should be there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.done import check_source
from geoloc_batch.store.features import read_header
from geoloc_batch.store.files import OsFiles, digest, stat
from geoloc_batch.store.goal import Goal, marker_path, parse_goal, reached_goals
from geoloc_batch.store.marker import FileRecord, Marker, read_marker, staged_name, standing_marker
from geoloc_batch.store.pin import FOREIGN_BUT_HARMLESS, RUN_FILE, config_hash, read_config
from geoloc_batch.store.plan import plan_name, read_plan
from geoloc_batch.store.seen import Seen

PLAN_NAME = re.compile(r"plan(_\d+)?\.parquet")
# What reading a table may raise that somebody has changed.
TABLE_ERRORS = (InputError, OSError, pa.ArrowException, KeyError, TypeError, ValueError)


@dataclass(slots=True)
class Verification:
    """What was found."""

    units: int = 0
    """Planned."""
    samples: int = 0
    """Photos that the units say they have seen."""
    rows: int = 0
    """Rows in the files."""
    errors: int = 0
    """Error rows in the files."""
    missing: int = 0
    """Units that are planned and not committed, and files that were committed and are absent."""
    duplicates: int = 0
    """Rows of the same photo, and good rows of the same key in one shard, each beyond the first."""
    problems: list[str] = field(default_factory=list)
    """Each names the thing and the command that mends it."""

    @property
    def ok(self) -> bool:
        """Nothing is missing, doubled or wrong."""
        return not self.problems and not self.missing and not self.duplicates


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
                f"{config}: two runs are mixed; {_again(out, marker.unit)}"
            )
        _check_unit(out, unit, marker, found, seen)
    if undone:
        found.missing += undone
        found.problems.append(f"{undone} of {len(plan)} units are not done; run the same command again")
    _check_doubles(out, plan, seen, found)
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


def _again(out: Path, *units: int) -> str:
    return f"geoloc retry {out}{''.join(f' --unit {unit}' for unit in units)} makes it again"


def _check_doubles(out: Path, plan: Sequence[Unit], seen: Seen, found: Verification) -> None:
    """What stands twice: within a shard a unit may be made again, between embedding pairs that would mend nothing."""
    for double in seen.doubles():
        found.duplicates += double.count
        found.problems.append(
            f"{double.shard}: {double.count} {double.what} stand more than once; {_again(out, *double.units)}"
        )
    between = list(seen.doubles_between_pairs())
    if not between:
        return
    doubled = sum(double.count for double in between)
    found.duplicates += doubled
    holders = " and ".join(f"unit {index} ({plan[index].source})" for index in between[0].units[:2])
    found.problems.append(
        f"{doubled} photos, of {len(between)} shards, stand in more than one embedding pair, those of "
        f"{between[0].shard} in {holders}: two sources hold the same photos, which a retry cannot mend; take another "
        f"--out and give it only one of the two, or, where they are other photos of the same names, embed each under "
        f"shard names of its own"
    )


def _check_unit(out: Path, unit: Unit, marker: Marker, found: Verification, seen: Seen) -> None:
    """Every file of a unit: there, unharmed, and as long as the counts say."""
    counts = marker.counts
    problems_before = len(found.problems)
    rows_of: dict[str, int] = {}
    error_rows = 0
    is_noted = False
    for file in marker.files:
        path = out / file.path
        length = _check_file(out, marker, file, found)
        if length is None:
            continue
        if path.suffix == ".npy":
            rows_of[file.path] = length
            continue
        is_error_table = path.parent.name == "errors"
        if is_error_table:
            error_rows += length
        else:
            rows_of[file.path] = length
        # Several tables of one unit hold the same photos: the first is looked at.
        if is_error_table or not is_noted:
            try:
                seen.add(unit, pq.ParquetFile(path).read(["key", "shard", "row"]), are_rows=not is_error_table)
            except TABLE_ERRORS as error:
                found.problems.append(f"{path} does not name its photos ({error}); {_again(out, marker.unit)}")
            is_noted = is_noted or not is_error_table
    rows = max(rows_of.values(), default=0)
    found.rows += rows
    found.errors += error_rows
    if len(found.problems) > problems_before:
        # With a file that is gone or harmed the sums cannot hold: it has been named.
        return
    name = f"unit {marker.unit} ({marker.source})"
    if any(length != rows for length in rows_of.values()) or (rows, error_rows) != (counts.rows, counts.errors):
        found.problems.append(
            f"{name} was committed with {counts.rows} rows and {counts.errors} error rows, and its files hold "
            f"{sorted(set(rows_of.values())) or 0} and {error_rows}; {_again(out, marker.unit)}"
        )
    elif rows + error_rows != counts.samples:
        found.problems.append(
            f"{name} saw {counts.samples} photos and has {rows} rows + {error_rows} error rows; "
            f"{_again(out, marker.unit)}"
        )


def _check_file(out: Path, marker: Marker, file: FileRecord, found: Verification) -> int | None:
    """Rows of one committed file, None where it is gone or harmed."""
    path = out / file.path
    # In staging where a move was cut off: the next start brings it here.
    waits = not marker.kept and (out / marker.staging / staged_name(file.path)).is_file()
    mend = "run the same command again" if waits else _again(out, marker.unit)
    try:
        if not path.is_file():
            found.missing += 1
            found.problems.append(f"{path} is missing; {mend}")
            return None
        if digest(path) != (file.size, file.sha256):
            found.problems.append(f"{path} is not what was committed (size or checksum); {mend}")
            return None
        if path.suffix == ".npy":
            return read_header(path)[0][0]
        return int(pq.read_metadata(path).num_rows)
    except TABLE_ERRORS as error:
        found.problems.append(f"{path} cannot be read: {error}; {_again(out, marker.unit)}")
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
