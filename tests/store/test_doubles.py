"""verify finds what stands twice, and tells what a retry mends from what it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from store_samples import CONFIG, make_located, make_samples, make_units, work

from geoloc_batch.records import Sample, Unit
from geoloc_batch.store import tables
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.verify import verify


def run_units(
    out: Path,
    units: list[Unit],
    keys: Callable[[Unit, int], tuple[int, str]],
    shard: Callable[[Unit], str] = lambda unit: unit.source,
) -> None:
    """Four predictions a unit, with chosen rows, keys and names of their shard."""

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        samples = [
            Sample(execution.unit, shard(execution.unit), *keys(execution.unit, number), sample.meta)
            for number, sample in enumerate(make_samples(execution.unit, 4))
        ]
        path = tables.predictions_path(execution.unit.index, "europe")
        other = tables.predictions_path(execution.unit.index, "world")
        for name in (path, other):
            tables.write_predictions(execution.stage(name), samples, make_located(4))
        return [path, other], UnitCounts(samples=4, rows=4, errors=0, unit_error=None, warnings=())

    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_plan(units)
    list(work(ledger, write))
    ledger.close()


def ranges() -> list[Unit]:
    return [
        Unit(index=number, kind="shard", source="big.tar", start=number * 512, first_row=number * 4)
        for number in range(2)
    ]


def test_ranges_of_one_shard_and_several_heads_are_counted_once(tmp_path: Path) -> None:
    run_units(tmp_path, ranges(), lambda unit, n: (unit.first_row + n, f"k{unit.first_row + n}"))

    found = verify(tmp_path)
    assert found.ok
    assert (found.samples, found.rows) == (8, 8)


def test_a_photo_in_two_units_is_a_duplicate(tmp_path: Path) -> None:
    run_units(tmp_path, ranges(), lambda unit, n: (3 * unit.index + n, f"k{unit.index}{n}"))

    found = verify(tmp_path)
    assert found.duplicates == 1
    assert "big.tar: 1 photos stand more than once" in found.problems[0]


def test_a_photo_in_two_units_is_a_duplicate_though_they_spell_their_shard_differently(tmp_path: Path) -> None:
    run_units(
        tmp_path, ranges(), lambda unit, n: (3 * unit.index + n, f"k{unit.index}{n}"), lambda unit: str(unit.index)
    )

    assert verify(tmp_path).duplicates == 1


def pairs(*folders: str) -> list[Unit]:
    """Two embedding pairs of each folder."""
    names = [f"{folder}/img_emb/img_emb_{number}.npy" for folder in folders for number in range(2)]
    return [Unit(index=index, kind="embeddings", source=name) for index, name in enumerate(names)]


def test_an_embedding_pair_may_name_its_photos_as_it_likes(tmp_path: Path) -> None:
    run_units(tmp_path / "keys", pairs("e"), lambda unit, n: (n, f"{unit.index}{n}"), lambda unit: "train")
    # Without keys, and with rows that count from 0 in each pair.
    run_units(tmp_path / "rows", pairs("e"), lambda unit, n: (n, str(n)), lambda unit: "train")
    # Without a shard and a row: each pair is its own shard.
    run_units(tmp_path / "none", pairs("e", "f"), lambda unit, n: (n, f"k{n}"))

    for name in ("keys", "rows", "none"):
        assert verify(tmp_path / name).ok


@pytest.mark.parametrize("key", ["k{}", "{}"])
def test_a_photo_in_two_embedding_pairs_is_a_duplicate_that_no_retry_mends(tmp_path: Path, key: str) -> None:
    # The first folder's second pair has one photo that the second folder's does not have.
    run_units(
        tmp_path,
        pairs("e", "moved"),
        lambda unit, n: (9 if (unit.index, n) == (1, 0) else n, key.format(n)),
        lambda unit: f"s/{unit.index % 2}.tar",
    )

    found = verify(tmp_path)
    assert (found.rows, found.duplicates) == (16, 7)
    (problem,) = found.problems
    assert problem.startswith(
        "7 photos, of 2 shards, stand in more than one embedding pair, those of s/0.tar in unit 0"
    )
    assert "unit 0 (e/img_emb/img_emb_0.npy) and unit 2 (moved/img_emb/img_emb_0.npy)" in problem
    assert "take another --out" in problem
    assert "geoloc retry" not in problem


def test_a_photo_twice_in_one_embedding_pair_is_made_again_by_a_retry(tmp_path: Path) -> None:
    run_units(tmp_path, pairs("e"), lambda unit, n: (min(n, 2), f"k{n}"), lambda unit: f"{unit.index}.tar")

    found = verify(tmp_path)
    assert found.duplicates == 2
    assert [problem.partition("; ")[2] for problem in found.problems] == [
        f"geoloc retry {tmp_path} --unit {number} makes it again" for number in range(2)
    ]


def test_a_key_twice_in_one_shard_is_a_duplicate_and_across_shards_it_is_not(tmp_path: Path) -> None:
    run_units(tmp_path / "one", ranges(), lambda unit, n: (unit.first_row + n, f"k{n}"))
    run_units(tmp_path / "two", make_units(2), lambda unit, n: (n, f"k{n}"))

    assert verify(tmp_path / "one").duplicates == 4
    assert verify(tmp_path / "two").ok
