"""What the tests of the ledger share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import CONFIG, make_units

from geoloc_batch.store.ledger import Ledger


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Opens ledgers on one OUT; each thinks that it is a process of its own."""
    ledgers: list[Ledger] = []

    def open_one(num_units: int = 3, **options: Any) -> Ledger:
        ledger = Ledger(tmp_path / "out", **{"beat_s": 5.0, **options})
        ledger.open(CONFIG)
        ledger.adopt_plan(make_units(num_units))
        ledgers.append(ledger)
        return ledger

    yield open_one
    for ledger in ledgers:
        ledger.close()
