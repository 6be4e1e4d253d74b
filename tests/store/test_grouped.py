"""Predictions with a row for each location: verify counts the photos behind them, and knows what may stand twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import CONFIG, make_features, make_located, make_samples, work

from geoloc_batch.geo.located import Views
from geoloc_batch.records import RowError, Sample, Unit, UnitError
from geoloc_batch.store import tables
from geoloc_batch.store.files import digest
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.scattered import find_scattered
from geoloc_batch.store.schedule import Schedule
from geoloc_batch.store.verify import verify

VIEWS = [3, 1, 4]


def shards(count: int = 2) -> list[Unit]:
    return [Unit(index=number, kind="shard", source=f"{number}.tar", num_bytes=9) for number in range(count)]


def buckets() -> list[Unit]:
    ranges = [(0, 3), (3, 6), (6, 6)]
    return [
        Unit(index=number, kind="locations", source="emb", start=start, stop=stop, num_bytes=9)
        for number, (start, stop) in enumerate(ranges)
    ]


def run(out: Path, units: list[Unit], *, names: str = "{unit}-{n}", embeddings: bool = False, tree: str = "") -> None:
    """Three locations a unit, of eight photos, and an error row; a unit of no locations has two error rows."""

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        unit = execution.unit
        first = 9 * unit.index if unit.kind == "locations" else 0
        photos = [dataclasses.replace(sample, row=first + sample.row) for sample in make_samples(unit, sum(VIEWS))]
        errors = [RowError("bad", unit.source, first + sum(VIEWS), "group", "no place", retryable=False)]
        if unit.start == unit.stop:
            photos, errors = [], [*errors, dataclasses.replace(errors[0], row=first)]
        paths = [tables.errors_path(unit.index)]
        tables.write_errors(execution.stage(paths[0]), errors)
        if photos and embeddings:
            paths += tables.embedding_paths(unit.index)
            npy, parquet = map(execution.stage, paths[-2:])
            tables.write_embeddings(npy, parquet, photos, make_features(len(photos)))
        if photos:
            firsts = np.cumsum([0, *VIEWS[:-1]])
            locations = [
                Sample(unit, photos[row].shard, photos[row].row, names.format(unit=unit.index, n=n), b"{}")
                for n, row in enumerate(firsts)
            ]
            views = Views(num_views=np.array(VIEWS, np.int32), view_km=np.array([1.5, 0, 2.5], np.float32))
            paths.append(tables.predictions_path(unit.index, tree))
            tables.write_predictions(execution.stage(paths[-1]), locations, make_located(3), views)
        rows, num_errors = 3 if photos else 0, len(errors)
        counts = UnitCounts(
            samples=len(photos) + num_errors, rows=rows, errors=num_errors, unit_error=None, warnings=()
        )
        return paths, counts

    ledger = Ledger(out)
    ledger.open(CONFIG)
    ledger.adopt_plan(units)
    list(work(ledger, write))
    ledger.close()


def replace_column(out: Path, unit: int, name: str, values: list[int]) -> None:
    """As if another program had written the table and its marker."""
    path = out / tables.predictions_path(unit)
    table = pq.ParquetFile(path).read()
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
    marker = out / "_done" / "000" / f"{unit:06d}.json"
    fields = json.loads(marker.read_text())
    for file in fields["files"]:
        if file["path"] == tables.predictions_path(unit):
            file["size"], file["sha256"] = digest(path)
    marker.write_text(json.dumps(fields))


@pytest.mark.parametrize("embeddings", [False, True])
def test_samples_are_the_photos_behind_the_rows_and_the_error_rows(tmp_path: Path, embeddings: bool) -> None:
    run(tmp_path, shards(), embeddings=embeddings)
    found = verify(tmp_path)
    assert found.ok, found.problems
    assert (found.samples, found.rows, found.errors) == (18, 6, 2)
    table = tables.read_tables(tmp_path / "predictions")
    assert table.column_names[:6] == ["key", "shard", "row", "num_views", "view_km", "lat"]
    assert table["num_views"].to_pylist() == VIEWS * 2
    assert table["view_km"].to_pylist() == [1.5, 0, 2.5] * 2


def test_units_of_locations_and_the_rows_without_one_are_counted_too(tmp_path: Path) -> None:
    run(tmp_path, buckets())
    found = verify(tmp_path)
    assert found.ok, found.problems
    assert (found.units, found.samples, found.rows, found.errors) == (3, 20, 6, 4)


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_view_more_or_less_is_found(tmp_path: Path, embeddings: bool) -> None:
    run(tmp_path, shards(), embeddings=embeddings)
    replace_column(tmp_path, 1, "num_views", [3, 2, 4])
    (problem,) = verify(tmp_path).problems
    expected = "its files hold [3, 8, 9] and 1" if embeddings else "saw 9 photos and has 3 rows of 9 photos + 1 error"
    assert expected in problem
    assert "geoloc retry" in problem


def test_a_location_twice_in_a_unit_or_in_the_units_of_one_folder_is_a_double(tmp_path: Path) -> None:
    run(tmp_path / "unit", shards(), names="same{unit}")
    found = verify(tmp_path / "unit")
    assert found.duplicates == 4
    assert "unit 0 (0.tar): 2 locations stand more than once" in found.problems[0]
    run(tmp_path / "folder", buckets(), names="{n}")
    found = verify(tmp_path / "folder")
    assert found.duplicates == 3
    assert "emb: 3 locations stand more than once" in found.problems[0]


def test_a_photo_behind_two_units_of_one_folder_is_a_double(tmp_path: Path) -> None:
    run(tmp_path, buckets())
    replace_column(tmp_path, 1, "row", [9, 0, 13])
    found = verify(tmp_path)
    assert found.duplicates == 1
    assert "emb: emb: 1 photos stand more than once" in found.problems[0]


def test_a_location_of_two_shards_is_no_double_and_is_found_as_scattered(tmp_path: Path) -> None:
    run(tmp_path, shards(3), names="place{n}", tree="a")
    assert verify(tmp_path).ok
    found = find_scattered(tmp_path, shards(3), "a")
    assert found is not None
    assert (found.count, found.first, found.shards) == (3, "place0", ("0.tar", "1.tar", "2.tar"))
    assert find_scattered(tmp_path, shards(1), "a") is None
    assert find_scattered(tmp_path, shards(3), "elsewhere") is None
    assert find_scattered(tmp_path, shards(5), "a") == found, "units that are not done count for nothing"


def test_units_of_locations_come_in_their_order_and_shards_largest_first() -> None:
    even = [dataclasses.replace(unit, num_bytes=size) for unit, size in zip(buckets(), (7, 9, 0), strict=True)]
    for units, order in ((even, [0, 1, 2]), ([dataclasses.replace(unit, kind="shard") for unit in even], [1, 2, 0])):
        schedule = Schedule(units)
        assert [unit.index for unit in iter(schedule.next_fresh, None)] == order


def test_a_retry_that_loses_photos_of_a_location_is_worse_though_it_has_as_many_rows() -> None:
    whole = UnitCounts(samples=9, rows=3, errors=1, unit_error=None, warnings=())
    thinner = UnitCounts(samples=7, rows=3, errors=0, unit_error=None, warnings=())
    mended = UnitCounts(samples=9, rows=3, errors=0, unit_error=None, warnings=())
    cut = dataclasses.replace(whole, unit_error=UnitError("0.tar", "broke off", 5, None, retryable=True))
    assert not thinner.is_better_than(whole)
    assert mended.is_better_than(whole)
    assert whole.is_better_than(cut)
