"""At the end of a long plan one rank clears up after the dead and adds up, and the others wait for it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from end_samples import NUM_UNITS, ROWS, TOTAL, Full, Watched, names, open_rank
from store_samples import CONFIG, make_units, run_rank, take, write_unit

from geoloc_batch.store import adding
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.ledger import Ledger

pytestmark = pytest.mark.usefixtures("few_are_many")


def test_one_clears_up_and_adds_up_and_the_others_wait_for_it(ended: Path) -> None:
    files = [Watched() for _ in range(4)]
    ranks = [open_rank(ended, port) for port in files]
    assert ranks[0].acquire() is None
    assert not list((ended / "_staging").iterdir())
    for _ in range(3):
        assert [rank.acquire() for rank in ranks[1:]] == ["wait"] * 3
    # Meanwhile they add up the folders.
    assert sorted(name[:3] for name in names(ended) if name.endswith(".json")) == ["000", "001", "002", "003", "004"]
    assert ranks[0].totals().rows == ROWS
    for rank in ranks[1:]:
        assert rank.acquire() is None
        assert rank.totals().rows == ROWS
    assert [port.num_sweeps for port in files] == [1, 0, 0, 0]
    assert [port.num_read for port in files] == [5, 1, 1, 1]
    for rank in ranks:
        rank.close()
    assert not [name for name in names(ended) if name.endswith(".claim")]


def test_only_who_has_cleared_up_writes_the_sum_over_all(ended: Path) -> None:
    clearing, other = open_rank(ended), open_rank(ended)
    assert clearing.acquire() is None
    assert other.acquire() == "wait"
    # It was stopped, say.
    assert other.totals().rows == ROWS
    assert not [name for name in names(ended) if name.startswith("total") and name != TOTAL]
    other.close()
    assert TOTAL in names(ended)
    assert clearing.totals().rows == ROWS
    assert [name for name in names(ended) if name.startswith("total") and name != TOTAL]
    clearing.close()


def test_as_many_units_as_are_many_are_cleared_up_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "MANY_FOLDERS", 5)
    run_rank(tmp_path / "out", 10)
    ranks = [open_rank(tmp_path / "out", num_units=10) for _ in range(2)]
    assert [rank.acquire() for rank in ranks] == [None, "wait"]
    for rank in ranks:
        rank.close()


def test_the_sum_of_as_many_other_units_is_not_taken_for_ours(ended: Path) -> None:
    other = Ledger(ended)
    other.open(CONFIG)
    other.adopt_plan(make_units(NUM_UNITS + 1)[1:])
    first = open_rank(ended)
    assert first.acquire() is None
    assert first.totals().rows == ROWS
    held = take(other)
    assert held.unit.index == NUM_UNITS
    assert other.totals().done == NUM_UNITS - 1
    for rank in (first, other):
        rank.close()


def test_the_sum_of_an_earlier_call_is_not_that_of_a_later_one(ended: Path) -> None:
    ledger = open_rank(ended)
    ledger.adopt_plan(make_units(NUM_UNITS + 1)[1:])
    first = open_rank(ended)
    assert first.acquire() is None
    assert first.totals().rows == ROWS
    ledger._done.learn(now=True)
    assert take(ledger).unit.index == NUM_UNITS
    assert ledger.totals().done == NUM_UNITS - 1
    for rank in (first, ledger):
        rank.close()


def test_who_has_added_up_a_folder_goes_on_with_the_next_though_it_rests(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "SPELL_S", 1e-6)
    first, other = open_rank(ended), open_rank(ended)
    assert first.acquire() is None
    assert other.acquire() == "wait"
    monkeypatch.setattr(other._search, "is_time", lambda: False)
    for _ in range(10):
        assert other.acquire() == "wait"
    assert len([name for name in names(ended) if name.endswith(".json")]) == 5
    for rank in (first, other):
        rank.close()


def test_no_sum_over_all_is_written_where_clearing_up_has_failed(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Commits, *arguments: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    ledger = open_rank(ended)
    with monkeypatch.context() as broken:
        broken.setattr(Commits, "sweep", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="Stale"):
                ledger.acquire()
        with pytest.raises(OSError, match="Stale"):
            ledger.totals()
        assert ledger._adding is not None
        assert ledger._adding.totals(range(NUM_UNITS)).rows == ROWS
    assert not ledger.is_through
    assert not [name for name in names(ended) if name.startswith("total")]
    ledger.close()


def test_on_a_full_disk_each_clears_up_by_itself(ended: Path) -> None:
    files = [Full(), Full()]
    ranks = [open_rank(ended, port) for port in files]
    assert [rank.acquire() for rank in ranks] == [None, None]
    assert [port.num_sweeps for port in files] == [1, 1]
    assert [rank.totals().rows for rank in ranks] == [ROWS, ROWS]
    for rank in ranks:
        rank.close()


def test_who_finds_work_leaves_the_folder_that_it_was_adding_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "SPELL_S", 1e-6)
    out = tmp_path / "out"
    busy, idle = open_rank(out), open_rank(out)
    held = [take(busy), take(busy)]
    while not (out / "_sums").exists() or not [name for name in names(out) if name.endswith(".claim")]:
        execution = idle.acquire()
        assert execution is not None
        if execution != "wait":
            idle.commit(execution, *write_unit(execution))
    busy.abandon(held[0])
    while (execution := idle.acquire()) == "wait":
        pass
    assert execution is not None
    assert not [name for name in names(out) if name.endswith(".claim")]
    for rank in (busy, idle):
        rank.close()
