"""Verification: what `geoloc verify` finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from geoloc_batch.errors import InputError

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
    """Rows in the files; of grouped predictions one stands for all photos of a location."""
    errors: int = 0
    """Error rows in the files."""
    missing: int = 0
    """Units that are planned and not committed, and files that were committed and are absent."""
    duplicates: int = 0
    """Rows of the same photo, and good rows of the same key in one shard (of the same location in one unit), each
    beyond the first."""
    problems: list[str] = field(default_factory=list)
    """Each names the thing and the command that mends it."""

    @property
    def ok(self) -> bool:
        """Nothing is missing, doubled or wrong."""
        return not self.problems and not self.missing and not self.duplicates


def again(out: Path, *units: int) -> str:
    """The command that makes units anew."""
    return f"geoloc retry {out}{''.join(f' --unit {unit}' for unit in units)} makes it again"
