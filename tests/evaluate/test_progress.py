"""Runs that are not done: told beside the coverage, which knows of nothing that was never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import run, write_csv, write_run, written_metrics
from store_samples import take

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit, UnitError
from geoloc_batch.store.ledger import Ledger, UnitCounts
from geoloc_batch.store.tables import predictions_path

GOOD: dict[str, list[Any]] = {"key": ["a", "b"], "lat": [48.0, 51.0], "lon": [2.0, 0.5]}


def cut_off_run(out: Path, photos: Path) -> None:
    """OUT of a run of five units whose first two are done, the second with a unit error."""
    ledger = Ledger(out)
    ledger.open({"encoder": "tiny"})
    ledger.adopt_plan([Unit(index=i, kind="shard", source=f"{i}.tar", num_bytes=100 - i) for i in range(5)])
    for _ in range(2):
        execution = take(ledger)
        name = predictions_path(execution.unit.index)
        execution.stage(name).write_bytes((photos / name).read_bytes())
        damage = UnitError("1.tar", "broke off", 512, None, retryable=False) if execution.unit.index == 1 else None
        ledger.commit(
            execution,
            [name],
            UnitCounts(samples=3, rows=3, errors=0, unit_error=damage, warnings=(), retryable_errors=0),
        )
    ledger.close()


@pytest.mark.parametrize("given_as", ["pred", "pred/predictions"])
def test_a_run_that_is_not_done_is_told_beside_its_full_coverage(tmp_path: Path, given_as: str) -> None:
    write_run(tmp_path / "photos", [3, 3])
    cut_off_run(tmp_path / "pred", tmp_path / "photos")
    found = run(tmp_path, tmp_path / given_as)
    assert (found.metrics.coverage, found.counts.units_not_done, found.counts.unit_errors) == (100, 3, 1)
    assert [warning.split("pred: ")[-1] for warning in found.warnings] == [
        "3 of 5 units are not done, 1 has a unit error: coverage is of what was read; finish the run"
    ]
    written = written_metrics(tmp_path)
    assert (written["units_not_done"], written["unit_errors"], len(written["warnings"])) == (3, 1, 1)
    truth = write_csv(tmp_path / "t.csv", {"key": ["photos/001"], "shard": ["shards/01.tar"], "lat": [50], "lon": [10]})
    assert "and of what the truth names besides" in run(tmp_path, tmp_path / given_as, truth).warnings[-1]


def test_a_run_that_is_whole_and_predictions_of_no_run_say_nothing_of_units(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [3])
    counts = run(tmp_path, tmp_path / "pred").counts
    assert (counts.units_not_done, counts.unit_errors) == (0, 0)
    counts = run(tmp_path, tmp_path / "pred/predictions/predictions_000000.parquet").counts
    assert (counts.units_not_done, counts.unit_errors) == (None, None)
    (tmp_path / "pred" / "run.json").write_text("{}", encoding="utf-8")
    found = run(tmp_path, tmp_path / "pred")
    assert found.counts.units_not_done is None
    assert "how far the run is cannot be told" in found.warnings[0]


def test_a_run_without_predictions_yet_asks_for_its_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "pred")
    ledger.open({"encoder": "tiny"})
    ledger.adopt_plan([Unit(index=0, kind="shard", source="0.tar", num_bytes=9)])
    ledger.close()
    good = write_csv(tmp_path / "p.csv", GOOD)
    for flags in ({}, {"head": "north"}):
        with pytest.raises(InputError, match="pred holds no predictions yet: finish the run"):
            run(tmp_path, tmp_path / "pred", good, **flags)
    with pytest.raises(InputError, match=r"--truth .*pred holds no predictions yet: finish the run"):
        run(tmp_path, good, tmp_path / "pred")
    for head in ("north", "south"):
        write_run(tmp_path / "done", [3], head)
    with pytest.raises(InputError, match=r"give its predictions: .*done/north/predictions or .*/south/predictions"):
        run(tmp_path, good, tmp_path / "done")
