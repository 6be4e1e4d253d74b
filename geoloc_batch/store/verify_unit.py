"""What one unit's files must be, and what may not stand twice; a part of verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from geoloc_batch.records import Unit
from geoloc_batch.store.features import read_header
from geoloc_batch.store.files import digest
from geoloc_batch.store.marker import FileRecord, Marker, staged_name
from geoloc_batch.store.seen import Seen
from geoloc_batch.store.tables import NUM_VIEWS
from geoloc_batch.store.verification import TABLE_ERRORS, Verification, again

IDENTITY = ["key", "shard", "row"]


def check_unit(out: Path, unit: Unit, marker: Marker, found: Verification, seen: Seen) -> None:
    """Every file of a unit: there, unharmed, and as long as the counts say."""
    problems_before = len(found.problems)
    held = _Held()
    for file in marker.files:
        length = _check_file(out, marker, file, found)
        if length is not None:
            try:
                held.add(out / file.path, length, unit, seen)
            except TABLE_ERRORS as error:
                path = out / file.path
                found.problems.append(f"{path} does not name its photos ({error}); {again(out, marker.unit)}")
    found.rows += held.rows
    found.errors += held.errors
    # With a file that is gone or harmed the sums cannot hold: it has been named.
    if len(found.problems) == problems_before:
        _check_sums(out, marker, held, found)


@dataclass(slots=True)
class _Held:
    """What the files of a unit hold."""

    lengths: set[int] = field(default_factory=set)
    """Rows of each table of predictions; without one, of the embeddings."""
    photos: set[int] = field(default_factory=set)
    """Good photos by each file."""
    errors: int = 0
    has_predictions: bool = False
    is_noted: bool = False

    @property
    def rows(self) -> int:
        return max(self.lengths, default=0)

    def add(self, path: Path, length: int, unit: Unit, seen: Seen) -> None:
        """Count a file of so many rows, and note whom they show."""
        if path.suffix == ".npy":
            self._count(length, length, is_prediction=False)
            return
        if path.parent.name == "errors":
            self.errors += length
            seen.add(unit, pq.ParquetFile(path).read(IDENTITY), are_rows=False)
            return
        file = pq.ParquetFile(path)
        is_prediction = path.parent.name == "predictions"
        is_grouped = is_prediction and NUM_VIEWS in file.schema_arrow.names
        table = file.read([*IDENTITY, *([NUM_VIEWS] if is_grouped else [])])
        # Several tables of one unit hold the same photos, and locations: the first is looked at.
        if is_grouped and not self.has_predictions:
            seen.add_locations(unit, table)
        self._count(length, sum(table[NUM_VIEWS].to_pylist()) if is_grouped else length, is_prediction=is_prediction)
        if not self.is_noted:
            seen.add(unit, table, are_rows=not is_grouped)
            self.is_noted = True

    def _count(self, rows: int, photos: int, *, is_prediction: bool) -> None:
        self.photos.add(photos)
        if is_prediction and not self.has_predictions:
            # They have one row for several photos where those are grouped, unlike the embeddings beside them.
            self.has_predictions = True
            self.lengths = set()
        if is_prediction or not self.has_predictions:
            self.lengths.add(rows)


def _check_sums(out: Path, marker: Marker, held: _Held, found: Verification) -> None:
    counts = marker.counts
    name = f"unit {marker.unit} ({marker.source})"
    if len(held.lengths) > 1 or len(held.photos) > 1 or (held.rows, held.errors) != (counts.rows, counts.errors):
        found.problems.append(
            f"{name} was committed with {counts.rows} rows and {counts.errors} error rows, and its files hold "
            f"{sorted(held.lengths | held.photos) or 0} and {held.errors}; {again(out, marker.unit)}"
        )
    elif (photos := max(held.photos, default=0)) + held.errors != counts.samples:
        rows = f"{held.rows} rows" if photos == held.rows else f"{held.rows} rows of {photos} photos"
        found.problems.append(
            f"{name} saw {counts.samples} photos and has {rows} + {held.errors} error rows; {again(out, marker.unit)}"
        )


def _check_file(out: Path, marker: Marker, file: FileRecord, found: Verification) -> int | None:
    """Rows of one committed file, None where it is gone or harmed."""
    path = out / file.path
    # In staging where a move was cut off: the next start brings it here.
    waits = not marker.kept and (out / marker.staging / staged_name(file.path)).is_file()
    mend = "run the same command again" if waits else again(out, marker.unit)
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
        found.problems.append(f"{path} cannot be read: {error}; {again(out, marker.unit)}")
        return None


def check_doubles(out: Path, plan: Sequence[Unit], seen: Seen, found: Verification) -> None:
    """What stands twice: within a shard a unit may be made again, between embedding pairs that would mend nothing."""
    for double in seen.doubles():
        found.duplicates += double.count
        found.problems.append(
            f"{double.shard}: {double.count} {double.what} stand more than once; {again(out, *double.units)}"
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
