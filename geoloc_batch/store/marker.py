"""Markers: `_done/{thousands}/{unit}.json` says that a unit is committed, by whom and with which files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit, UnitError
from geoloc_batch.store.publish import canonical_json, read_published

LAYOUT = 1
# The JSON types of a marker's values, by their names: each name means the same wherever it stands.
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("source", "token", "staging", "config", "path", "sha256", "shard", "message"), (str,)),
    **dict.fromkeys(("layout", "unit", "size", "samples", "rows", "errors", "offset"), (int,)),
    **dict.fromkeys(("quarantined", "retryable"), (bool,)),
    **dict.fromkeys(("files", "warnings"), (list,)),
    "bytes_unread": (int, type(None)),
    "unit_error": (dict, type(None)),
    "counts": (dict,),
    "seconds": (float, int),
}


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
        fields = _typed(json.loads(data))
        if fields.pop("layout") != LAYOUT:
            raise ValueError("it was written by another version")
        counts = _typed(fields["counts"])
        if counts["unit_error"] is not None:
            counts["unit_error"] = UnitError(**_typed(counts["unit_error"]))
        if not all(isinstance(warning, str) for warning in counts["warnings"]):
            raise TypeError("a warning is not text")
        counts["warnings"] = tuple(counts["warnings"])
        fields["counts"] = UnitCounts(**counts)
        fields["files"] = tuple(FileRecord(**_typed(file)) for file in fields["files"])
        marker = Marker(**fields)
        _check(marker)
        return marker


def _typed(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.80} stands for an object")
    for name, member in value.items():
        if type(member) not in TYPES.get(name, ()):
            raise TypeError(f"{name} is {member!r:.80}")
    return value


def _check(marker: Marker) -> None:
    """Files are moved to and from its paths: they must not lead out of OUT, and staging folders are removed whole."""
    if marker.quarantined and (marker.files or marker.counts.unit_error is None):
        raise ValueError("quarantined is true, and it has results")
    staging = PurePosixPath(marker.staging).parts
    if len(staging) != 2 or staging[0] != "_staging" or staging[1] == "..":
        raise ValueError(f"staging is {marker.staging!r:.80}")
    for file in marker.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in file.path:
            raise ValueError(f"path is {file.path!r:.80}")


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
        OutputError: the file is no marker, or that of another unit.
    """
    path = marker_path(out, unit)
    data = read_published(path, read)
    if data is None:
        return None
    try:
        marker = Marker.from_bytes(data)
        if marker.unit != unit:
            raise ValueError(f"unit is {marker.unit}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path} is not a marker of unit {unit} ({error}); remove it and run the same command again"
        ) from error
    return marker


def staged_name(relative: str) -> str:
    """Name in the staging folder of what will become OUT/relative: flat, and with no result's suffix."""
    return quote(relative, safe="") + ".part"
