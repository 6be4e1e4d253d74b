"""Sums that cannot be read, written or removed, or are none: they cost no figure, and no rank waits for them."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from store_samples import CONFIG, crowd, is_retryable, make_units, rows_of, run_rank

from geoloc_batch.store import adding, sums
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger

UNITS = make_units(11)
"""Five folders of two, and one that is not full."""
EXPECTED = Totals(
    units=len(UNITS),
    done=len(UNITS),
    units_failed=0,
    samples=sum(rows_of(unit) + 1 for unit in UNITS),
    rows=sum(map(rows_of, UNITS)),
    errors=len(UNITS),
)


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None) -> Path:
    """A run that is complete, and that nobody has added up."""
    crowd(monkeypatch)
    # Sums are looked for at once, and no folder is too young for one to be believed later.
    monkeypatch.setattr(sums, "LOOK_S", 0.0)
    monkeypatch.setattr(sums, "YOUNG_S", -3600.0)
    run_rank(tmp_path / "out", len(UNITS))
    # A claim was made there, and given back.
    (tmp_path / "out" / "_sums").rmdir()
    return tmp_path / "out"


def opened(out: Path, files: OsFiles | None = None) -> Ledger:
    ledger = Ledger(out, files=files)
    ledger.open(CONFIG)
    ledger.adopt_plan(UNITS)
    return ledger


def totals(out: Path, files: OsFiles | None = None) -> Totals:
    ledger = opened(out, files)
    found = ledger.totals()
    ledger.close()
    return found


def names(out: Path) -> list[str]:
    return os.listdir(out / "_sums")


class Denied(OsFiles):
    """Sums are there, and this user may not do one thing with them."""

    def __init__(self, step: str) -> None:
        self._step = step

    def _refuse(self, step: str, path: Path) -> None:
        if step == self._step and "_sums" in (path.name, path.parent.name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def names(self, path: Path) -> list[str]:
        self._refuse("names", path)
        return super().names(path)

    def read(self, path: Path) -> bytes:
        self._refuse("read", path)
        return super().read(path)

    def remove(self, path: Path) -> None:
        self._refuse("remove", path)
        super().remove(path)

    def touch(self, path: Path) -> None:
        self._refuse("touch", path)
        super().touch(path)


@pytest.mark.parametrize("step", ["names", "read", "remove", "touch"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_sums_that_this_user_may_not_read_or_change_cost_no_figure(done: Path, step: str, is_damaged: bool) -> None:
    totals(done)
    if is_damaged:
        for name in names(done):
            (done / "_sums" / name).write_bytes(b"{")
    assert totals(done, Denied(step)) == EXPECTED


@pytest.mark.parametrize(
    "damage",
    [
        b"[" * 100_000,
        b'{"layout": 1, "units": 2, "done": 1, "units_failed": 0, "samples": 3, "rows": 3, "errors": 0}',
    ],
    ids=["deep", "of a folder that is not full"],
)
def test_what_is_no_sum_of_a_full_folder_is_not_taken_for_one(done: Path, damage: bytes) -> None:
    totals(done)
    for name in names(done):
        (done / "_sums" / name).write_bytes(damage)
    assert totals(done) == EXPECTED


def test_a_folder_or_a_file_in_the_place_of_sums_costs_no_figure(done: Path) -> None:
    totals(done)
    for name in names(done):
        (done / "_sums" / name).unlink()
        (done / "_sums" / name).mkdir()
    assert totals(done) == EXPECTED
    for name in names(done):
        path = done / "_sums" / name
        path.rmdir() if path.is_dir() else path.unlink()
    (done / "_sums").rmdir()
    (done / "_sums").touch()
    assert totals(done) == EXPECTED


def test_a_claim_whose_folder_cannot_be_looked_at_is_given_back(done: Path) -> None:
    class Stale(OsFiles):
        has_claimed = False

        def create(self, path: Path) -> int:
            self.has_claimed |= path.suffix == ".claim" and path.stem.isdecimal()
            return super().create(path)

        def touch(self, path: Path) -> None:
            if self.has_claimed and path.name.startswith("clock."):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            super().touch(path)

    files = Stale()
    ledger = opened(done, files)
    assert ledger.totals() == EXPECTED
    ledger.close()
    assert not [name for name in names(done) if name.endswith(".claim")]


def test_a_rank_that_goes_on_to_a_retry_gives_its_claim_back(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(done)
    assert ledger._adding is not None
    ledger._done.look_all(range(len(UNITS)))
    monkeypatch.setattr(adding, "SPELL_S", 1e-6)
    ledger._adding.go_on(may_begin=True)
    assert [name for name in names(done) if name.endswith(".claim")]
    ledger.adopt_retries(is_retryable)
    assert not [name for name in names(done) if name.endswith(".claim")]
    ledger.close()


@pytest.mark.parametrize("is_stopped_at_once", [False, True])
def test_a_rank_that_is_asked_to_end_waits_for_no_other(done: Path, is_stopped_at_once: bool) -> None:
    claims = [done / "_sums" / name for name in ("1.claim", f"total.{len(UNITS)}.claim")]
    claims[0].parent.mkdir()
    for claim in claims:
        claim.touch()
    ledger, stop, found = opened(done), threading.Event(), list[Totals]()
    if is_stopped_at_once:
        stop.set()
    thread = threading.Thread(target=lambda: found.append(ledger.totals(in_haste=stop.is_set)), daemon=True)
    thread.start()
    if not is_stopped_at_once:
        thread.join(1)
        assert thread.is_alive()
        stop.set()
    thread.join(10)
    assert found == [EXPECTED]
    # They are still in the hands of whoever has claimed them.
    assert all(claim.exists() for claim in claims)
    ledger.close()
