"""Markers: `_done/{thousands}/{unit}.json` says that a unit is committed, by whom and with which files.

`{unit}r{n}.json` says the same of its n-th retry, whose result stands in place of the one before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from geoloc_batch.errors import OutputError
from geoloc_batch.records import UnitError
from geoloc_batch.store.goal import Goal, marker_path
from geoloc_batch.store.publish import canonical_json, read_published

LAYOUT = 1
# The JSON types of a marker's values, by their names: each name means the same wherever it stands.
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("source", "token", "staging", "config", "path", "sha256", "shard", "message"), (str,)),
    **dict.fromkeys(("worker", "limiting_stage"), (str,)),
    **dict.fromkeys(
        ("layout", "unit", "retry", "size", "samples", "rows", "errors", "retryable_errors", "offset"), (int,)
    ),
    **dict.fromkeys(("quarantined", "kept", "retryable"), (bool,)),
    **dict.fromkeys(("files", "obsolete", "warnings"), (list,)),
    "bytes_unread": (int, type(None)),
    "unit_error": (dict, type(None)),
    **dict.fromkeys(("counts", "errors_by_stage"), (dict,)),
    "work": (dict, type(None)),
    **dict.fromkeys(("seconds", "ended_s"), (float, int)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCounts:
    """What came out of one unit."""

    samples: int
    """Photos seen."""
    rows: int
    """One for each good photo, or for each location that they show."""
    errors: int
    """Error rows."""
    unit_error: UnitError | None
    """Set where the unit could not be read to its end."""
    warnings: tuple[str, ...]
    retryable_errors: int = 0
    """Error rows that another try could turn into rows."""
    errors_by_stage: dict[str, int] = field(default_factory=dict)
    """Error rows by the stage that refused them; empty in markers of older versions."""

    @property
    def is_retryable(self) -> bool:
        """Whether another execution could give more."""
        return self.retryable_errors > 0 or (self.unit_error is not None and self.unit_error.retryable)

    @property
    def good(self) -> int:
        """Photos behind the rows: as many, unless they are grouped."""
        return self.samples - self.errors

    def is_worse_than(self, other: UnitCounts) -> bool:
        """Whether something good would be lost by it."""
        return self.good < other.good or (self.unit_error is not None and other.unit_error is None)

    def is_better_than(self, other: UnitCounts) -> bool:
        """Whether something is gained by it, and nothing good lost."""
        is_mended = self.unit_error is None and other.unit_error is not None
        is_gain = self.good > other.good or self.errors < other.errors or is_mended
        return is_gain and not self.is_worse_than(other)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One published file."""

    path: str
    """Relative to OUT."""
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Who made a result, and when: for people who look, nothing is decided by it."""

    worker: str
    """Name of the process, as its log has it."""
    ended_s: float
    """When it was committed: seconds since 1970 by the file server's clock."""
    seconds: float
    """From lease to commit, also where what stood before was kept."""
    limiting_stage: str = ""
    """The busiest stage of the process until then, "" where it does not measure."""


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
    retry: int = 0
    """Of which retry this is the result; 0 for the first one."""
    kept: bool = False
    """The retry gave nothing better: files and counts are those of the result before, which stays."""
    obsolete: tuple[str, ...] = ()
    """Files of the result before, relative to OUT, that this one does not have."""
    work: Work | None = None
    """None in quarantine, and in markers of older versions."""

    @property
    def goal(self) -> Goal:
        """What was reached."""
        return Goal(self.unit, self.retry)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the files, relative to OUT."""
        return tuple(file.path for file in self.files)

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
        if not all(type(count) is int for count in counts.get("errors_by_stage", {}).values()):
            raise TypeError("a stage's number of errors is no integer")
        fields["counts"] = UnitCounts(**counts)
        fields["files"] = tuple(FileRecord(**_typed(file)) for file in fields["files"])
        if not all(isinstance(path, str) for path in fields.get("obsolete", ())):
            raise TypeError("an obsolete file is not text")
        fields["obsolete"] = tuple(fields.get("obsolete", ()))
        if fields.get("work") is not None:
            fields["work"] = Work(**_typed(fields["work"]))
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
    if marker.work is not None and not (math.isfinite(marker.work.ended_s) and math.isfinite(marker.work.seconds)):
        raise ValueError("a time is no number")
    staging = _parts(marker.staging)
    if marker.staging.startswith("/") or len(staging) != 2 or staging[0] != "_staging" or staging[1] == "..":
        raise ValueError(f"staging is {marker.staging!r:.80}")
    for relative in (*(file.path for file in marker.files), *marker.obsolete):
        parts = _parts(relative)
        if relative.startswith("/") or not parts or ".." in parts or "\0" in relative:
            raise ValueError(f"path is {relative!r:.80}")


def _parts(path: str) -> list[str]:
    """As PurePosixPath has them, which takes half of the time that a marker takes to be read."""
    return [part for part in path.split("/") if part not in ("", ".")]


def read_marker(out: Path, goal: Goal, read: Callable[[Path], bytes] = Path.read_bytes) -> Marker | None:
    """The marker of a goal, None where it is not reached.

    Raises:
        OutputError: the file is no marker, or that of another goal.
    """
    path = marker_path(out, goal)
    data = read_published(path, read)
    if data is None:
        return None
    try:
        marker = Marker.from_bytes(data)
        if marker.goal != goal:
            raise ValueError(f"it is that of unit {marker.unit}, retry {marker.retry}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        again = f"geoloc retry {out} --unit {goal.unit}" if goal.retry else "run the same command again"
        raise OutputError(f"{path} is not a marker of unit {goal.unit} ({error}); remove it and {again}") from error
    return marker


def standing_marker(out: Path, unit: int, read: Callable[[Path], bytes] = Path.read_bytes) -> Marker | None:
    """The marker of what stands of a unit: that of its latest retry, or its first.

    Raises:
        OutputError: it is no marker, or that of another goal.
    """
    goal = Goal(unit)
    while read_published(marker_path(out, later := Goal(unit, goal.retry + 1)), read) is not None:
        goal = later
    return read_marker(out, goal, read)


def staged_name(relative: str) -> str:
    """Name in the staging folder of what will become OUT/relative: flat, and with no result's suffix."""
    return quote(relative, safe="") + ".part"
