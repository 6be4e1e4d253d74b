"""Verify: is everything there, once, and unharmed? Read from the files; the markers only say what should be there."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.store.features import read_header
from geoloc_batch.store.files import digest
from geoloc_batch.store.marker import FileRecord, Marker, marker_path, read_marker, staged_name
from geoloc_batch.store.pin import config_hash, read_config
from geoloc_batch.store.plan import read_plan

PLAN_NAME = re.compile(r"plan(_\d+)?\.parquet")


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
    config = config_hash(read_config(out))
    plan, _ = read_plan(out)
    found.units = len(plan)
    seen = _Seen()
    recorded: set[str] = set()
    undone = 0
    for unit in plan:
        try:
            marker = read_marker(out, unit.index)
        except OutputError as error:
            found.problems.append(str(error))
            undone += 1
            continue
        if marker is None:
            undone += 1
            continue
        recorded.update(file.path for file in marker.files)
        found.samples += marker.counts.samples
        if marker.config != config:
            found.problems.append(
                f"unit {unit.index} ({unit.source}) was made with config {marker.config}, {out / 'run.json'} says "
                f"{config}: two runs are mixed; {_again(out, marker)}"
            )
        _check_unit(out, marker, found, seen)
    if undone:
        found.missing += undone
        found.problems.append(f"{undone} of {len(plan)} units are not done; run the same command again")
    seen.check_shards(found)
    _check_orphans(out, recorded, found)
    return found


def _again(out: Path, marker: Marker) -> str:
    return f"remove {marker_path(out, marker.unit)} and run the same command again"


def _check_unit(out: Path, marker: Marker, found: Verification, seen: _Seen) -> None:
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
            seen.add(pq.ParquetFile(path).read(["key", "shard", "row"]), are_rows=not is_error_table)
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
            f"{sorted(set(rows_of.values())) or 0} and {error_rows}; {_again(out, marker)}"
        )
    elif rows + error_rows != counts.samples:
        found.problems.append(
            f"{name} saw {counts.samples} photos and has {rows} rows + {error_rows} error rows; {_again(out, marker)}"
        )


def _check_file(out: Path, marker: Marker, file: FileRecord, found: Verification) -> int | None:
    """Rows of one committed file, None where it is gone or harmed."""
    path = out / file.path
    try:
        if not path.is_file():
            found.missing += 1
            # In staging where a move was cut off: the next start brings it here.
            waits = (out / marker.staging / staged_name(file.path)).is_file()
            mend = "run the same command again" if waits else _again(out, marker)
            found.problems.append(f"{path} is missing; {mend}")
            return None
        if digest(path) != (file.size, file.sha256):
            found.problems.append(f"{path} is not what was committed (size or checksum); {_again(out, marker)}")
            return None
        if path.suffix == ".npy":
            return read_header(path)[0][0]
        return int(pq.read_metadata(path).num_rows)
    except (InputError, OSError, pa.ArrowException) as error:
        found.problems.append(f"{path} cannot be read: {error}; {_again(out, marker)}")
        return None


class _Seen:
    """Row numbers and keys of every shard, gathered from all units: a large tar is several units."""

    def __init__(self) -> None:
        self._rows: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._key_hashes: dict[str, list[NDArray[np.int64]]] = defaultdict(list)

    def add(self, table: pa.Table, *, are_rows: bool) -> None:
        """Note a table. Error rows count by row alone: the later of two equal keys is one, and rightly so."""
        shards = table["shard"].to_numpy(zero_copy_only=False)
        rows = table["row"].to_numpy().astype(np.int64)
        # Eight bytes a key: the keys of millions of photos need not fit into memory.
        hashes = np.fromiter(map(hash, table["key"].to_pylist()), dtype=np.int64, count=table.num_rows)
        for shard in sorted(set(shards.tolist())):
            of_shard = shards == shard
            self._rows[shard].append(rows[of_shard])
            if are_rows:
                self._key_hashes[shard].append(hashes[of_shard])

    def check_shards(self, found: Verification) -> None:
        """Count what stands twice."""
        for what, gathered in (("photos", self._rows), ("keys", self._key_hashes)):
            for shard, parts in gathered.items():
                values = np.concatenate(parts)
                doubled = len(values) - len(np.unique(values))
                if doubled:
                    found.duplicates += doubled
                    found.problems.append(
                        f"{shard}: {doubled} {what} stand more than once; remove the markers of its units in _done and "
                        f"run the same command again"
                    )


def _check_orphans(out: Path, recorded: set[str], found: Verification) -> None:
    """Result files that no marker names."""
    for suffix in ("npy", "parquet"):
        for path in sorted(out.rglob(f"*.{suffix}")):
            relative = path.relative_to(out)
            is_ours = relative.parts[0].startswith("_") or PLAN_NAME.fullmatch(relative.parts[0]) is not None
            if not is_ours and relative.as_posix() not in recorded and not _is_committed_since(out, relative):
                found.problems.append(f"{path} belongs to no committed unit; remove it")


def _is_committed_since(out: Path, relative: Path) -> bool:
    """Whether a unit that was still in work when its marker was asked for has brought this file since."""
    number = relative.stem.rpartition("_")[2]
    try:
        marker = read_marker(out, int(number)) if number.isdecimal() else None
    except OutputError:
        # The marker is broken, which has been told: whether the file belongs to it nobody knows.
        return True
    return marker is not None and any(file.path == relative.as_posix() for file in marker.files)
