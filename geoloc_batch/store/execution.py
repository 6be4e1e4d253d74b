"""Execution: one rank's work on one unit; and the sums over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geoloc_batch.records import Unit
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.marker import UnitCounts, staged_name


@dataclass(frozen=True, slots=True)
class Execution:
    """One rank's work on one unit."""

    unit: Unit
    goal: Goal
    """What it is to publish: the unit's first result, or that of a retry."""
    token: str
    """Names it apart from every other execution."""
    number: int
    """1 for the first of this goal, up to `max_executions`."""
    staging: Path
    """Its folder."""
    files: FilePort = field(repr=False, compare=False)
    """The machine, for `stage`."""
    taken_ns: int = field(default=0, compare=False)
    """When its lease was taken, by the file server's clock."""

    def stage(self, relative: str) -> Path:
        """Where to write what will become OUT/relative. The name ends in .part, whatever it becomes."""
        # Made again where a rank that thought us dead took it away: then the commit finds that out, in order.
        self.files.make_folder(self.staging)
        return self.staging / staged_name(relative)


@dataclass(frozen=True, slots=True)
class Held:
    """An execution in the hands of this process."""

    execution: Execution
    since_s: float
    """By the machine's own seconds."""
    is_suspect: bool
    """A dead execution left the unit: should it kill this process too, nothing else is to be blamed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over the units of the shards given in this call. `status`, `verify` and a retry count all that OUT holds."""

    units: int
    done: int
    """Committed or quarantined."""
    units_failed: int
    """Done with a unit error, quarantined ones included."""
    samples: int
    rows: int
    errors: int

    @staticmethod
    def of(units: int, counts: Sequence[UnitCounts]) -> Totals:
        """Of so many units, those with these counts being done."""
        return Totals(
            units=units,
            done=len(counts),
            units_failed=sum(count.unit_error is not None for count in counts),
            samples=sum(count.samples for count in counts),
            rows=sum(count.rows for count in counts),
            errors=sum(count.errors for count in counts),
        )

    @staticmethod
    def sum(parts: Iterable[Totals]) -> Totals:
        """Of units that are in one part each."""
        columns = zip(*(dataclasses.astuple(part) for part in (Totals.of(0, ()), *parts)), strict=True)
        return Totals(**dict(zip((field.name for field in dataclasses.fields(Totals)), map(sum, columns), strict=True)))
