"""Which shards a retry opens: those that were planned, wherever they are now."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_samples import (
    CONFIG,
    assert_clean,
    is_retryable,
    marker_of,
    staging_rows,
    work,
)

from geoloc_batch.records import Unit
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.pin import PACKED

pytestmark = pytest.mark.usefixtures("quick_disk")


def plan(out: Path, *units: Unit) -> None:
    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_plan(units)
    list(work(ledger, staging_rows(4, 1)))
    ledger.close()


def retries(out: Path) -> tuple[list[Unit], list[str]]:
    ledger = Ledger(out)
    ledger.open(CONFIG)
    units = ledger.adopt_retries(is_retryable)
    list(work(ledger, staging_rows(5)))
    ledger.close()
    return units, ledger.warnings


def test_a_retry_from_another_folder_opens_the_same_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.tar").write_bytes(b"a")
    monkeypatch.chdir(tmp_path / "here")
    plan(tmp_path / "out", Unit(index=0, kind="shard", source="a.tar", num_bytes=1))
    monkeypatch.chdir(tmp_path)

    ((unit,), warnings) = retries(tmp_path / "out")

    assert (unit.source, unit.shard, warnings) == (str(tmp_path / "here/a.tar"), "a.tar", [])
    assert marker_of(tmp_path / "out", 0, 1).source == "a.tar"
    assert_clean(tmp_path / "out")


def test_shards_that_moved_with_the_folder_are_opened_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = Path("old") / PACKED
    shards.mkdir(parents=True)
    (shards / "a.tar").write_bytes(b"a")
    plan(tmp_path / "old", Unit(index=0, kind="shard", source=str(shards / "a.tar"), num_bytes=1))
    (tmp_path / "old").rename(tmp_path / "new")

    ((unit,), warnings) = retries(tmp_path / "new")

    assert (unit.source, unit.shard) == (str(tmp_path / "new" / PACKED / "a.tar"), str(shards / "a.tar"))
    assert warnings == []
    assert_clean(tmp_path / "new")


def test_a_shard_that_was_replaced_is_retried_with_its_new_size(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"short")
    plan(tmp_path / "out", Unit(index=0, kind="shard", source=str(shard), num_bytes=5))
    shard.write_bytes(b"longer")

    ((unit,), _) = retries(tmp_path / "out")

    assert unit.num_bytes == 6


@pytest.mark.parametrize("size", [1000, 1001])
def test_ranges_of_a_tar_that_has_another_size_are_left_out(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "big.tar"
    shard.write_bytes(bytes(1000))
    halves = [
        Unit(index=n, kind="shard", source=str(shard), num_bytes=500, start=500 * n, stop=500 if n == 0 else None)
        for n in range(2)
    ]
    plan(tmp_path / "out", *halves, Unit(index=2, kind="shard", source="pipe:curl a", num_bytes=0))
    shard.write_bytes(bytes(size))

    units, warnings = retries(tmp_path / "out")

    assert [unit.index for unit in units] == ([0, 1, 2] if size == 1000 else [2])
    assert warnings == [
        f"unit {unit} is left out: {shard} was planned in ranges, and has another size now; put the old file back, or "
        f"take another --out"
        for unit in ([] if size == 1000 else [0, 1])
    ]
