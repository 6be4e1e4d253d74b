"""Markers: `_done/{thousands}/{unit}.json` says that a unit is committed, by whom and with which files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit, UnitError
from geoloc_batch.store.publish import canonical_json, read_published

LAYOUT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCounts:
    """What came out of one unit."""

    samples: int
    """Photos seen."""
    rows: int
    errors: int
    """Error rows."""
    unit_error: UnitError | None
    """Set where the unit could not be read to its end."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One published file."""

    path: str
    """Relative to OUT."""
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """What a commit publishes."""

    unit: int
    source: str
    token: str
    """Of the execution that won."""
    staging: str
    """Its folder, relative to OUT, from which the files are moved."""
    files: tuple[FileRecord, ...]
    counts: UnitCounts
    config: str
    """Hash of the pinned config."""
    seconds: float
    """From lease to commit."""
    quarantined: bool = False
    """No execution ever committed: the unit has no files."""

    def to_bytes(self) -> bytes:
        """The marker's file."""
        return canonical_json({"layout": LAYOUT, **asdict(self)})

    @staticmethod
    def from_bytes(data: bytes) -> Marker:
        """Read a marker's file; ValueError, KeyError or TypeError where it is none."""
        fields: dict[str, Any] = json.loads(data)
        if fields.pop("layout") != LAYOUT:
            raise ValueError("it was written by another version")
        counts = fields["counts"]
        if counts["unit_error"] is not None:
            counts["unit_error"] = UnitError(**counts["unit_error"])
        counts["warnings"] = tuple(counts["warnings"])
        fields["counts"] = UnitCounts(**counts)
        fields["files"] = tuple(FileRecord(**file) for file in fields["files"])
        return Marker(**fields)


def quarantine_marker(unit: Unit, token: str, staging: str, config: str, max_executions: int) -> Marker:
    """The marker of a unit that no execution has survived."""
    message = (
        f"{max_executions} executions ended without a commit: either it kills the process that reads it, or the jobs "
        f"were killed from outside that often; without its marker it is read again"
    )
    error = UnitError(unit.source, message, offset=-1, bytes_unread=unit.num_bytes or None, retryable=True)
    return Marker(
        unit=unit.index,
        source=unit.source,
        token=token,
        staging=staging,
        files=(),
        counts=UnitCounts(samples=0, rows=0, errors=0, unit_error=error, warnings=()),
        config=config,
        seconds=0.0,
        quarantined=True,
    )


def marker_path(out: Path, unit: int) -> Path:
    """Where the marker of a unit stands: a thousand to a folder."""
    return out / "_done" / f"{unit // 1000:03d}" / f"{unit:06d}.json"


def read_marker(out: Path, unit: int, read: Callable[[Path], bytes] = Path.read_bytes) -> Marker | None:
    """The marker of a unit, None where it has none.

    Raises:
        OutputError: the file is no marker.
    """
    path = marker_path(out, unit)
    data = read_published(path, read)
    if data is None:
        return None
    try:
        return Marker.from_bytes(data)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is not a marker ({error}); remove it and run the same command again") from error


def staged_name(relative: str) -> str:
    """Name in the staging folder of what will become OUT/relative: flat, and with no result's suffix."""
    return quote(relative, safe="") + ".part"
