"""Retries that are cut off, that kill, or whose files and markers somebody has removed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from store_samples import (
    CONFIG,
    age,
    assert_clean,
    is_retryable,
    make_units,
    marker_of,
    retry_rank,
    run_rank,
    staging_rows,
    take,
    tree,
    with_steps,
)

from geoloc_batch.errors import OutputError
from geoloc_batch.store import tables
from geoloc_batch.store.files import FileStat, OsFiles
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.status import status
from geoloc_batch.store.verify import verify

NUM_UNITS = 3
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def out(retryable: Path) -> Path:
    return retryable


class Patient(OsFiles):
    """Time goes by at once."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


class Killed(BaseException):
    """A process that ends between two steps."""


def killed_after_the_marker(out: Path, at: int) -> bool:
    """A retry of unit 2 that ends before its `at`-th step behind the link of its marker; False where it got through."""
    left = -1

    def at_step(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == "link" and arguments[1].name == "000002r1.json":
            left = at
        elif left > 0 and (left := left - 1) == 0:
            raise Killed

    ledger = Ledger(out, files=with_steps(at_step))
    ledger.open(CONFIG)
    ledger.adopt_retries(lambda counts: False, (2,))
    execution = take(ledger)
    try:
        ledger.commit(execution, *staging_rows(6)(execution))
    except Killed:
        is_killed = True
    else:
        is_killed = False
    left = -1
    ledger._leases.close()
    return is_killed


def test_a_retry_cut_off_after_its_marker_is_rolled_forward_by_the_next_start(out: Path, tmp_path: Path) -> None:
    cut_off, at, told = tmp_path / "cut off", 1, set()
    while True:
        shutil.rmtree(cut_off, ignore_errors=True)
        shutil.copytree(out, cut_off)
        is_killed = killed_after_the_marker(cut_off, at)
        told.update(problem.replace(str(cut_off), "OUT") for problem in verify(cut_off).problems)
        ledger = Ledger(cut_off)
        ledger.open(CONFIG)
        ledger.close()
        files = tree(cut_off)
        assert "errors/errors_000002.parquet" not in files
        assert files["predictions/predictions_000001.parquet"] == tree(out)["predictions/predictions_000001.parquet"]
        assert verify(cut_off).problems == []
        assert not list((cut_off / "_staging").glob("0*"))
        if not is_killed:
            break
        at += 1

    # Sync, move, move out, two syncs, three or more removals.
    assert at > 8
    assert sorted(told) == [
        "OUT/errors/errors_000002.parquet belongs to no committed unit; run the same command again",
        "OUT/predictions/predictions_000002.parquet is not what was committed (size or checksum); run the same "
        "command again",
    ]


def leave_dead_executions(out: Path, goal: Goal) -> None:
    for slot in (1, 2, 3):
        (out / "_leases" / f"{goal.label}.{slot}").write_text("")
        age(out, f"{goal.label}.{slot}", 1000)


def test_three_retries_that_died_keep_what_stood_and_the_next_may_succeed(out: Path) -> None:
    leave_dead_executions(out, Goal(2, 1))
    before = tree(out)

    assert retry_rank(out, staging_rows(6), forced=(2,)) == []

    assert tree(out) == before
    assert (marker_of(out, 2, 1).kept, marker_of(out, 2, 1).quarantined) == (True, False)
    assert_clean(out)
    assert retry_rank(out, staging_rows(6), forced=(2,)) == [Goal(2, 2)]
    assert marker_of(out, 2, 2).counts.rows == 6
    assert_clean(out)


def test_a_unit_in_quarantine_is_retried(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_rank(out, 0)
    leave_dead_executions(out, Goal(1))
    run_rank(out, 2)
    assert (status(out).quarantined, status(out).retryable) == (1, 1)

    # First its shard is gone, then a part of it can be read.
    retry_rank(out, staging_rows(0, is_cut=True), choose=is_retryable)
    assert (marker_of(out, 1, 1).quarantined, status(out).quarantined) == (True, 1)
    retry_rank(out, staging_rows(2, is_cut=True), choose=is_retryable)

    assert (status(out).quarantined, status(out).rows) == (0, 4)
    assert_clean(out)


@pytest.mark.parametrize("lost", ["000002.json", "000002r1.json"])
def test_a_marker_that_was_removed_below_a_later_one_is_told_and_mended(out: Path, lost: str) -> None:
    retry_rank(out, staging_rows(5, 1), forced=(2,))
    retry_rank(out, staging_rows(6), forced=(2,))
    whole = tree(out)
    (out / "_done/000" / lost).unlink()

    (problem,) = verify(out).problems
    assert (
        f"is the marker of a retry, and {lost} before it has gone; put that back as it was, or remove every" in problem
    )
    assert status(out).rows == 14

    if lost == "000002.json":
        # Done anew as if it had never been, its files would be moved over those that stand.
        with pytest.raises(OutputError, match=r"000002r1.json is the marker of a retry, and 000002.json before it"):
            run_rank(out, NUM_UNITS, staging_rows(1))
        assert tree(out) == whole
    for path in (out / "_done/000").glob("000002*"):
        path.unlink()
    run_rank(out, NUM_UNITS, staging_rows(6))
    assert tree(out) == whole
    assert_clean(out)


def test_a_broken_marker_of_a_retry_is_told_with_what_mends_it(out: Path) -> None:
    retry_rank(out, staging_rows(6), forced=(2,))
    whole = tree(out)
    (out / "_done/000/000002r1.json").write_text("{")

    with pytest.raises(
        OutputError, match=rf"000002r1.json is not a marker .* remove it and geoloc retry {out} --unit 2$"
    ):
        retry_rank(out, staging_rows(6), forced=(2,))
    assert "remove it and geoloc retry" in verify(out).problems[0]
    (out / "_done/000/000002r1.json").unlink()
    assert not verify(out).ok

    assert retry_rank(out, staging_rows(6), forced=(2,)) == [Goal(2, 1)]
    assert tree(out) == whole
    assert_clean(out)


def test_a_broken_first_marker_below_a_retry_hinders_nobody(out: Path) -> None:
    retry_rank(out, staging_rows(6), forced=(2,))
    (out / "_done/000/000002.json").write_text("{")

    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(NUM_UNITS))
    assert ledger.acquire() is None
    assert ledger.totals().rows == 14
    ledger.close()
    assert (status(out).rows, verify(out).problems) == (14, [])


def test_a_folder_of_results_that_somebody_removed_is_made_again(out: Path) -> None:
    shutil.rmtree(out / "errors")

    # One is kept, one has no errors any more: neither stumbles over the folder that is not there.
    retry_rank(out, staging_rows(4, 2, is_cut=True), choose=is_retryable)
    retry_rank(out, staging_rows(6), forced=(0, 1))
    assert verify(out).missing == 1
    assert retry_rank(out, staging_rows(4, 2), forced=(2,)) == [Goal(2, 2)]
    assert_clean(out)


def test_a_staged_file_that_was_lost_before_its_move_is_made_again(out: Path) -> None:
    assert killed_after_the_marker(out, 2)
    (staging,) = (out / "_staging").glob("000002r1.*")
    (staging / "predictions%2Fpredictions_000002.parquet.part").unlink()

    with pytest.raises(OutputError, match=f"remove {staging}, then geoloc retry {out} --unit 2 makes it again"):
        run_rank(out, NUM_UNITS, files=Patient())
    shutil.rmtree(staging)

    assert retry_rank(out, staging_rows(6), forced=(2,)) == [Goal(2, 2)]
    # Its retry was cut off before the table of errors was moved out.
    (problem,) = verify(out).problems
    assert problem.endswith("errors_000002.parquet belongs to no committed unit; remove it")


def test_a_move_of_another_machine_that_shows_late_is_no_loss(out: Path) -> None:
    """Over NFS a name may lead to the file that was replaced for as long as the cache lasts."""
    assert killed_after_the_marker(out, 2)
    (staging,) = (out / "_staging").glob("000002r1.*")
    moved = out / tables.predictions_path(2)
    old = moved.stat()

    class Cached(Patient):
        def rename(self, source: Path, target: Path) -> None:
            # The other one is faster, by a hair.
            if target == moved and source.exists():
                os.rename(source, target)
                raise FileNotFoundError(errno.ENOENT, "no such file")
            super().rename(source, target)

        def stat(self, path: Path) -> FileStat | None:
            if path == moved and self.slept_s < 60:
                return FileStat(old.st_size, old.st_mtime_ns, False)
            return super().stat(path)

    ledger = Ledger(out, files=Cached())
    ledger.open(CONFIG)
    ledger.close()

    assert not staging.exists()
    assert verify(out).problems == []
