"""What the tests of a long plan's end share: ranks that come to it, and what they ask of the disk."""

from __future__ import annotations

import errno
from pathlib import Path

from store_samples import CONFIG, make_units, rows_of

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger

NUM_UNITS = 11
"""Five folders of two, and one that is not full."""
ROWS = sum(map(rows_of, make_units(NUM_UNITS)))
TOTAL = f"total.{NUM_UNITS}.claim"


class Watched(OsFiles):
    """Counts who looks through what is left in staging, and at sums."""

    num_sweeps = num_looks = num_read = 0

    def names(self, path: Path) -> list[str]:
        self.num_sweeps += path.name == "_staging"
        self.num_looks += path.name == "_sums"
        return super().names(path)

    def read(self, path: Path) -> bytes:
        self.num_read += path.parent.name == "_sums"
        return super().read(path)


class Full(Watched):
    """On a full disk, where nothing can be claimed."""

    def create(self, path: Path) -> int:
        if path.parent.name == "_sums":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().create(path)


def open_rank(out: Path, files: OsFiles | None = None, num_units: int = NUM_UNITS, beat_s: float = 0.1) -> Ledger:
    """A rank that has the plan."""
    ledger = Ledger(out, files=files, beat_s=beat_s, stale_beats=5)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    if isinstance(files, Watched):
        files.num_sweeps = 0
    return ledger


def names(out: Path) -> list[str]:
    """What stands in the folder of sums."""
    return [path.name for path in (out / "_sums").iterdir()]
