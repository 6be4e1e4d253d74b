"""How much of a run has been read: a unit that was not leaves neither predictions nor error rows behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import GeolocError
from geoloc_batch.store.pin import RUN_FILE
from geoloc_batch.store.status import status


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where the run stands that the predictions are of."""

    out: str
    units: int = 0
    units_not_done: int | None = None
    """Waiting or running. None where the run cannot tell."""
    unit_errors: int | None = None
    """Done units that were not read to their end; likewise."""
    complaint: str = ""
    """Why the run cannot tell."""

    @property
    def is_whole(self) -> bool:
        """Whether every unit was read to its end."""
        return self.units_not_done == 0 and self.unit_errors == 0


def is_run(folder: Path) -> bool:
    """Whether a folder is OUT of a run. Its run.json is a folder itself where there are no hard links."""
    return (folder / RUN_FILE).exists()


def progress_of(out: Path) -> Progress:
    """Ask a run how far it is. A run that cannot tell makes a complaint, no error: its predictions can be read."""
    try:
        found = status(out)
    except (GeolocError, OSError) as error:
        return Progress(out=str(out), complaint=str(error))
    return Progress(
        out=str(out), units=found.units, units_not_done=found.units - found.done, unit_errors=found.unit_errors
    )
