"""Ranks that wait at the end for the one that clears up: for no dead one, not for ever, not when asked to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from end_samples import NUM_UNITS, ROWS, TOTAL, Watched, names, open_rank

from geoloc_batch.store import adding, some
from geoloc_batch.store import ledger as ledger_room
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.ledger import Ledger

pytestmark = pytest.mark.usefixtures("few_are_many")


def wait_for_the_end(rank: Ledger, seconds: float = 10.0) -> None:
    until_s = time.monotonic() + seconds
    while (found := rank.acquire()) is not None:
        assert found == "wait"
        assert time.monotonic() < until_s
        time.sleep(0.01)


def stop_beating(rank: Ledger) -> None:
    """As one does that is dead, or stands still."""
    assert rank._leases._stop_beating is not None
    rank._leases._stop_beating()


def test_another_takes_over_from_who_died_before_it_had_added_up(ended: Path) -> None:
    dead, files = open_rank(ended), Watched()
    assert dead.acquire() is None
    stop_beating(dead)
    other = open_rank(ended, files)
    began_s = time.monotonic()
    wait_for_the_end(other)
    assert time.monotonic() - began_s > 0.5
    assert files.num_sweeps == 1
    assert other.totals().rows == ROWS
    # It stood still, and was not dead.
    assert dead.totals().rows == ROWS
    for rank in (dead, other):
        rank.close()
    assert not [name for name in names(ended) if name.endswith(".claim")]


def test_another_takes_over_from_who_was_stopped_at_once(ended: Path) -> None:
    stopped, other = open_rank(ended), open_rank(ended)
    assert stopped.acquire() is None
    assert other.acquire() == "wait"
    stopped.close()
    wait_for_the_end(other, 1.0)
    assert other.totals().rows == ROWS
    other.close()


@pytest.mark.parametrize("step", ["clears up", "adds up"])
def test_who_takes_long_says_so_and_nobody_takes_over(ended: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    first, other = open_rank(ended), open_rank(ended)
    found: list[Any] = []
    sweep, totals_of = Commits.sweep, adding.totals_of

    def slowly() -> None:
        until_s = time.monotonic() + 1.5
        while time.monotonic() < until_s:
            found.append(other.acquire())
            time.sleep(0.05)

    def sweep_slowly(self: Commits, *arguments: Any) -> None:
        slowly()
        sweep(self, *arguments)

    def add_up_slowly(*arguments: Any) -> Totals:
        slowly()
        return totals_of(*arguments)

    if step == "clears up":
        monkeypatch.setattr(Commits, "sweep", sweep_slowly)
    assert first.acquire() is None
    if step == "adds up":
        monkeypatch.setattr(adding, "totals_of", add_up_slowly)
    assert first.totals().rows == ROWS
    # Three times as long as one may be silent.
    assert len(found) > 10
    assert set(found) == {"wait"}
    monkeypatch.undo()
    assert other.acquire() is None
    for rank in (first, other):
        rank.close()


def test_ranks_that_were_given_fewer_units_or_few_units_wait_for_nobody(
    ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_rank(ended)
    assert first.acquire() is None
    fewer = open_rank(ended, num_units=NUM_UNITS - 1)
    assert fewer.acquire() is None
    assert fewer.totals().done == NUM_UNITS - 1
    monkeypatch.setattr(adding, "MANY_FOLDERS", 7)
    ranks = [open_rank(ended), open_rank(ended)]
    assert [rank.acquire() for rank in ranks] == [None, None]
    assert [rank.totals().rows for rank in ranks] == [ROWS, ROWS]
    for rank in (first, fewer, *ranks):
        rank.close()


@pytest.mark.parametrize("claimed", [TOTAL, "1.claim"])
def test_nobody_waits_for_ever_for_who_makes_nothing_of_its_claim(
    ended: Path, monkeypatch: pytest.MonkeyPatch, claimed: str
) -> None:
    monkeypatch.setattr(adding, "PATIENCE_S", 0.5)
    monkeypatch.setattr(adding, "LONGEST_WAIT_S", 0.05)
    (ended / "_sums" / claimed).touch()
    ledger = open_rank(ended, beat_s=15.0)
    began_s = time.monotonic()
    wait_for_the_end(ledger)
    assert ledger.totals().rows == ROWS
    assert time.monotonic() - began_s > 0.5
    # Its owner is not dead for anybody.
    assert claimed in names(ended)
    ledger.close()


def test_a_new_sum_gives_new_patience(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "PATIENCE_S", 0.8)
    first, other = open_rank(ended), open_rank(ended)
    assert first.acquire() is None
    assert other._adding is not None
    monkeypatch.setattr(other._adding, "go_on", lambda *, may_begin: None)
    assert first._done.sums is not None
    for thousand in range(5):
        assert other.acquire() == "wait"
        first._done.sums.write(thousand, Totals(units=2, done=2, units_failed=0, samples=0, rows=0, errors=0))
        assert other.acquire() == "wait"
        time.sleep(0.4)
    assert other.acquire() == "wait"
    time.sleep(0.9)
    assert other.acquire() is None
    for rank in (first, other):
        rank.close()


def test_who_waits_for_the_end_looks_the_more_seldom_the_longer(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(some, "LONGEST_REST_S", 15.0)

    class Clocked(Watched):
        now_s = 0.0

        def monotonic(self) -> float:
            return self.now_s

    files = Clocked()
    first, other = open_rank(ended), open_rank(ended, files, beat_s=1e6)
    assert first.acquire() is None
    before = files.num_looks
    for _ in range(100):
        assert other.acquire() == "wait"
        files.now_s += 1.0
    assert files.num_looks - before < 60
    for rank in (first, other):
        rank.close()


def test_who_is_asked_to_end_while_another_clears_up_does_not_say_that_all_is_there(ended: Path) -> None:
    first, other = open_rank(ended), open_rank(ended)
    assert first.acquire() is None
    assert other.acquire() == "wait"
    assert other.totals(in_haste=lambda: True).rows == ROWS
    assert not other.is_through
    assert first.is_through
    first.totals()
    assert other.totals(in_haste=lambda: True).rows == ROWS
    assert other.is_through
    for rank in (first, other):
        rank.close()


def test_who_is_asked_to_end_after_the_last_commit_clears_up_where_no_other_does(ended: Path) -> None:
    ledger = open_rank(ended)
    assert ledger.totals(in_haste=lambda: True).rows == ROWS
    assert ledger.is_through
    assert not list((ended / "_staging").iterdir())
    ledger.close()


def test_all_that_is_done_when_it_is_stopped_is_counted_all_the_same(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_room, "MANY_UNITS", 5)
    ledger = open_rank(ended)
    assert ledger.totals(in_haste=lambda: True).rows == ROWS
    ledger.close()
