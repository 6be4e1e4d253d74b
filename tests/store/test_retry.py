"""Retries on real files: what is better takes the place of what stood, whole; everything else changes nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from store_samples import (
    CONFIG,
    Write,
    assert_clean,
    is_retryable,
    make_units,
    marker_of,
    retry_rank,
    run_rank,
    staging_rows,
    take,
    tree,
    work,
    write_unit,
)

from geoloc_batch.errors import InputError
from geoloc_batch.store import tables
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.status import status
from geoloc_batch.store.verify import verify

NUM_UNITS = 3
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def out(retryable: Path) -> Path:
    return retryable


def test_a_better_retry_replaces_rows_counts_and_files(out: Path, tmp_path: Path) -> None:
    run_rank(tmp_path / "fresh", NUM_UNITS, staging_rows(6))
    assert status(out).retryable == NUM_UNITS

    assert retry_rank(out, staging_rows(6), choose=is_retryable) == [Goal(2, 1), Goal(1, 1), Goal(0, 1)]

    # Nothing is left of what stood: no table of errors either.
    assert tree(out) == tree(tmp_path / "fresh")
    assert marker_of(out, 2, 1).obsolete == ("errors/errors_000002.parquet",)
    found = verify(out)
    assert (found.samples, found.rows, found.errors) == (18, 18, 0)
    assert (status(out).retryable, status(out).rows, status(out).unit_errors) == (0, 18, 0)
    assert_clean(out)
    assert retry_rank(out, staging_rows(6), choose=is_retryable) == []


@pytest.mark.parametrize(
    "write",
    [
        staging_rows(4, 2, is_cut=True, seed=1),
        staging_rows(3, 0),
        staging_rows(0, 1, is_cut=True),
        staging_rows(4, 3, is_cut=True, seed=1),
    ],
    ids=["equal", "fewer-rows", "unreadable", "more-errors"],
)
def test_a_retry_that_gives_nothing_better_changes_nothing_and_is_noted(out: Path, write: Write) -> None:
    before = tree(out)

    assert retry_rank(out, write, choose=is_retryable) == [Goal(2, 1), Goal(1, 1), Goal(0, 1)]

    assert tree(out) == before
    first, retried = marker_of(out, 2), marker_of(out, 2, 1)
    assert (retried.kept, retried.files, retried.counts) == (True, first.files, first.counts)
    assert_clean(out)
    # What has failed twice may work the third time.
    assert retry_rank(out, staging_rows(6), choose=is_retryable) == [Goal(2, 2), Goal(1, 2), Goal(0, 2)]
    assert verify(out).rows == 18


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_whole_unit_is_not_replaced_by_more_rows_of_one_that_broke_off(out: Path, is_cut: bool) -> None:
    retry_rank(out, staging_rows(4, 2), forced=(0,))
    before = tree(out)

    retry_rank(out, staging_rows(5, 1, is_cut=is_cut), choose=lambda counts: counts.unit_error is None)

    assert marker_of(out, 0, 2).kept is is_cut
    assert (tree(out) == before) is is_cut


def test_a_named_unit_is_replaced_by_what_is_equal_or_less(out: Path) -> None:
    before = tree(out)

    assert retry_rank(out, staging_rows(4, 2, is_cut=True, seed=1), forced=(1,)) == [Goal(1, 1)]

    changed = {path for path in before if tree(out)[path] != before[path]}
    assert changed == {"predictions/predictions_000001.parquet"}
    assert_clean(out)
    # Its photo that kills was taken out of the shard.
    assert retry_rank(out, staging_rows(3), forced=(1,)) == [Goal(1, 2)]
    assert marker_of(out, 1, 2).counts.rows == 3
    assert_clean(out)


def test_a_named_unit_that_cannot_be_read_now_stays(out: Path) -> None:
    before = tree(out)

    assert retry_rank(out, staging_rows(0, is_cut=True), forced=(1, 2)) == [Goal(2, 1), Goal(1, 1)]

    assert tree(out) == before
    assert marker_of(out, 1, 1).kept
    assert_clean(out)


def test_a_retry_may_leave_no_file_at_all_where_only_errors_stood(tmp_path: Path) -> None:
    run_rank(tmp_path / "out", NUM_UNITS, staging_rows(0, 2))
    assert len(tree(tmp_path / "out")) == NUM_UNITS

    retry_rank(tmp_path / "out", staging_rows(0), forced=(0, 1, 2))

    assert tree(tmp_path / "out") == {}
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("write", [staging_rows(0), staging_rows(0, 5)], ids=["no photo", "no good photo"])
def test_a_named_unit_with_rows_is_not_replaced_by_nothing(out: Path, write: Write) -> None:
    before = tree(out)

    retry_rank(out, write, forced=(0, 1, 2))

    assert tree(out) == before
    assert marker_of(out, 1, 1).kept


def test_a_named_unit_that_lost_rows_says_so_in_its_marker(out: Path) -> None:
    retry_rank(out, staging_rows(1), forced=(1,))

    (warning,) = marker_of(out, 1, 1).counts.warnings
    assert warning.endswith("rows before its retry and has 1 now")


def test_two_ranks_that_retry_at_once_execute_each_unit_once(out: Path) -> None:
    ranks = [Ledger(out) for _ in range(2)]
    for rank in ranks:
        rank.open(CONFIG)
        assert len(rank.adopt_retries(is_retryable)) == NUM_UNITS
    goals = []
    hands = [take(ranks[0]), take(ranks[1])]
    for rank, execution in zip(ranks, hands, strict=True):
        assert rank.commit(execution, *staging_rows(6)(execution))
        goals.append(execution.goal)
    for rank in ranks:
        goals += [execution.goal for execution in work(rank, staging_rows(6))]

    assert sorted(goals) == [Goal(0, 1), Goal(1, 1), Goal(2, 1)]
    assert [rank.totals().rows for rank in ranks] == [18, 18]
    for rank in ranks:
        rank.close()
    assert_clean(out)


def test_a_run_beside_a_retry_counts_what_stands_at_last(out: Path) -> None:
    retry_rank(out, staging_rows(6), forced=(0,))
    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(NUM_UNITS + 1))
    assert [execution.goal for execution in work(ledger)] == [Goal(3)]

    assert ledger.totals().rows == 6 + 4 + 4 + 5
    ledger.close()
    assert_clean(out)


def test_a_unit_that_is_not_done_or_not_there_cannot_be_retried(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(2))
    execution = take(ledger)
    ledger.commit(execution, *staging_rows(1)(execution))
    undone = 1 - execution.unit.index

    for unit, why in [(undone, "it is not done yet; run its command again"), (2, "there is none"), (-1, "there is no")]:
        with pytest.raises(InputError, match=f"unit {unit} of .* cannot be retried: {why}"):
            ledger.adopt_retries(lambda counts: False, (execution.unit.index, unit))
    ledger.close()
    assert status(tmp_path).done == 1


def test_status_tells_of_a_retry_that_runs(out: Path) -> None:
    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_retries(is_retryable)
    execution = take(ledger)

    found = status(out)
    assert (found.done, found.running, found.waiting, found.retryable) == (NUM_UNITS, 1, 0, NUM_UNITS)
    assert verify(out).ok
    ledger.commit(execution, *staging_rows(6)(execution))
    found = status(out)
    assert (found.done, found.running, found.retryable, found.rows) == (NUM_UNITS, 0, NUM_UNITS - 1, 14)
    ledger.close()


def test_without_hard_links_a_retry_is_published_by_renaming_a_folder(tmp_path: Path) -> None:
    class NoLinks(OsFiles):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "no hard links here")

    out = tmp_path / "out"
    run_rank(out, 2, staging_rows(4, 2), files=NoLinks())

    assert retry_rank(out, staging_rows(6), choose=is_retryable, files=NoLinks()) == [Goal(1, 1), Goal(0, 1)]
    assert retry_rank(out, staging_rows(6), forced=(1,), files=NoLinks()) == [Goal(1, 2)]

    assert (out / "_done/000/000001r2.json/000001r2.json").is_file()
    assert (verify(out).rows, sorted(tree(out))) == (12, [tables.predictions_path(unit) for unit in range(2)])
    assert_clean(out)


def test_a_resumed_retry_gives_the_bytes_of_an_undisturbed_run(out: Path, tmp_path: Path) -> None:
    run_rank(tmp_path / "alone", NUM_UNITS)
    first = Ledger(out)
    first.open(CONFIG)
    first.adopt_retries(is_retryable)
    execution = take(first)
    first.commit(execution, *write_unit(execution))
    take(first)
    first.close()

    assert retry_rank(out, choose=is_retryable) == [Goal(1, 1), Goal(0, 1)]
    assert {path: data for path, data in tree(out).items() if "000002" in path} == {
        path: data for path, data in tree(tmp_path / "alone").items() if "000002" in path
    }
    assert_clean(out)
