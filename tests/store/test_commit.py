"""Commits in one process: what stands after a failure, and what is summed up."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from store_samples import CONFIG, make_units, take, tree, with_steps, work, write_unit

from geoloc_batch.records import UnitError
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger, UnitCounts


def test_staged_names_end_like_no_result(opened: Any) -> None:
    ledger = opened(1)
    execution = take(ledger)
    write_unit(execution)

    assert list(execution.staging.iterdir())
    assert not [path for path in execution.staging.rglob("*") if path.suffix in (".npy", ".parquet")]


def test_a_commit_that_fails_after_its_marker_keeps_its_files_when_it_is_abandoned(tmp_path: Path) -> None:
    def fail_at_the_first_move(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "rename" and failures:
            raise failures.pop()

    failures = [OSError(errno.EIO, "the disk fails")]
    ledger = Ledger(tmp_path / "out", files=with_steps(fail_at_the_first_move))
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(1))
    execution = take(ledger)
    outputs, counts = write_unit(execution)

    with pytest.raises(OSError, match="the disk fails"):
        ledger.commit(execution, outputs, counts)
    ledger.abandon(execution)

    assert sorted(tree(ledger.out)) == sorted(outputs)
    assert ledger.acquire() is None
    ledger.close()


def test_a_full_disk_at_the_commit_publishes_nothing_and_the_unit_is_free_again(tmp_path: Path) -> None:
    def fail_at_sync(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "sync" and failures and arguments[0].suffix == ".part":
            raise failures.pop()

    failures = [OSError(errno.ENOSPC, "no space left")]
    ledger = Ledger(tmp_path / "out", files=with_steps(fail_at_sync))
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(1))
    execution = take(ledger)

    with pytest.raises(OSError, match="no space left"):
        ledger.commit(execution, *write_unit(execution))
    ledger.abandon(execution)

    assert tree(ledger.out) == {}
    assert len(list(work(ledger))) == 1
    ledger.close()


def test_a_link_that_reports_failure_after_it_was_made_is_still_a_win(tmp_path: Path) -> None:
    class LyingFiles(OsFiles):
        def link(self, source: Path, target: Path) -> None:
            os.link(source, target)
            raise FileExistsError(errno.EEXIST, "said the server to the second try")

    ledger = Ledger(tmp_path / "out", files=LyingFiles())
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(1))
    execution = take(ledger)

    assert ledger.commit(execution, *write_unit(execution)) is True
    ledger.close()


def test_a_missing_output_is_an_error_and_not_a_lost_race(opened: Any) -> None:
    ledger = opened(1)
    execution = take(ledger)

    with pytest.raises(FileNotFoundError):
        ledger.commit(
            execution,
            ["img_emb/img_emb_000000.npy"],
            UnitCounts(samples=0, rows=0, errors=0, unit_error=None, warnings=()),
        )


def test_totals_sum_over_the_markers(opened: Any) -> None:
    ledger = opened(3)
    damage = UnitError("shards/00002.tar", "cut in a header", 512, 100, retryable=False)
    for execution in [take(ledger), take(ledger)]:
        outputs, counts = write_unit(execution)
        if execution.unit.index == 2:
            counts = UnitCounts(samples=counts.samples, rows=counts.rows, errors=1, unit_error=damage, warnings=("w",))
        ledger.commit(execution, outputs, counts)

    totals = opened(3).totals()

    assert (totals.units, totals.done, totals.units_failed) == (3, 2, 1)
    assert (totals.samples, totals.rows, totals.errors) == (5 + 4, 4 + 3, 2)


def test_many_units_are_not_asked_for_one_by_one(tmp_path: Path) -> None:
    class CountingFiles(OsFiles):
        stats = 0

        def stat(self, path: Path) -> Any:
            self.stats += 1
            return super().stat(path)

    first = Ledger(tmp_path / "out")
    first.open(CONFIG)
    first.adopt_plan(make_units(2500))
    (first.out / "_done/000").mkdir(parents=True)
    for unit in range(1000):
        (first.out / f"_done/000/{unit:06d}.json").write_text("{}")
    files = CountingFiles()
    second = Ledger(tmp_path / "out", files=files)
    second.open(CONFIG)
    second.adopt_plan(make_units(2500))
    before = files.stats

    assert take(second).unit.index >= 1000
    assert before < 50
    assert files.stats - before < 5
    first.close()
    second.close()
