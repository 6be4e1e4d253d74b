"""What the tests of the ledger share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import end_samples
import pytest
from store_samples import CONFIG, NUM_FINISHED, WORKER, crowd, make_units, run_rank, staging_rows

from geoloc_batch.store import some, sums
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of NUM_FINISHED units that is complete: to be looked at, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_rank(out, NUM_FINISHED, worker=WORKER)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is brought to the disk: for tests whose processes end and whose machine does not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def retryable(tmp_path: Path) -> Path:
    """Three done units, each with four rows, two errors that may be mended, and a unit error of that kind."""
    run_rank(tmp_path / "out", 3, staging_rows(4, 2, is_cut=True))
    return tmp_path / "out"


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch, quick_disk: None) -> None:
    """So few units are a long plan; no folder is too young to be added up, and nobody rests."""
    crowd(monkeypatch)
    monkeypatch.setattr(sums, "LOOK_S", 0.0)
    monkeypatch.setattr(sums, "YOUNG_S", -3600.0)
    monkeypatch.setattr(some, "LONGEST_REST_S", 0.0)


@pytest.fixture
def ended(tmp_path: Path, few_are_many: None) -> Path:
    """A long plan of which all is done; a dead rank has left something."""
    out = tmp_path / "out"
    run_rank(out, end_samples.NUM_UNITS)
    (out / "_staging" / "000003.dead").mkdir()
    (out / "_staging" / "000003.dead" / "000003.npy").touch()
    return out
