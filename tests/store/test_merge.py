"""merge puts the tables of all units together, streamed, and holds them against the markers by the way."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_samples import (
    CONFIG,
    NUM_FINISHED,
    make_features,
    make_located,
    make_samples,
    make_units,
    rows_of,
    run_rank,
    staging_rows,
    take,
    write_unit,
)

import geoloc_batch
from geoloc_batch.errors import OutputError
from geoloc_batch.geo.located import Views
from geoloc_batch.store import merge_output, tables
from geoloc_batch.store.features import plan_embeddings, read_features
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.tables import read_tables

pytestmark = pytest.mark.usefixtures("quick_disk")


def with_metas(out: Path, metas: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """A run of one unit for each list of jsons."""

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        unit = execution.unit
        jsons = metas[unit.index]
        samples = [
            dataclasses.replace(sample, meta=json.dumps(meta).encode())
            for sample, meta in zip(make_samples(unit, len(jsons)), jsons, strict=True)
        ]
        path = tables.predictions_path(unit.index)
        tables.write_predictions(execution.stage(path), samples, make_located(len(jsons)))
        return [path], UnitCounts(samples=len(jsons), rows=len(jsons), errors=0, unit_error=None, warnings=())

    run_rank(out, len(metas), write)


def test_all_predictions_stand_in_one_file_in_the_order_of_their_units(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "all.parquet"
    merged = geoloc_batch.merge(out, out=target)

    rows = sum(rows_of(unit) for unit in make_units(NUM_FINISHED))
    assert (merged.units, merged.rows, merged.files, merged.undone) == (NUM_FINISHED, rows, 1, 0)
    assert merged.bytes == target.stat().st_size
    assert pq.read_table(target).equals(read_tables(out / "predictions"))
    assert os.listdir(target.parent) == ["all.parquet"]


def test_row_groups_have_one_size_with_statistics_and_a_folder_has_parts(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_output, "ROW_GROUP_ROWS", 3)
    monkeypatch.setattr(merge_output, "PART_ROWS", 7)
    rows = sum(rows_of(unit) for unit in make_units(NUM_FINISHED))

    geoloc_batch.merge(out, out=tmp_path / "all.parquet")
    (tmp_path / "folder").mkdir()
    geoloc_batch.merge(out, out=tmp_path / "folder")

    about = pq.read_metadata(tmp_path / "all.parquet")
    sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    assert sizes == [3] * (rows // 3) + [rows % 3] * (rows % 3 > 0)
    assert all(
        about.row_group(0).column(number).statistics.has_min_max
        for number in range(about.num_columns)
        if about.schema.column(number).max_repetition_level == 0
    )
    parts = sorted((tmp_path / "folder" / "predictions").iterdir())
    assert [path.name for path in parts] == [f"predictions_{number:06d}.parquet" for number in range(-(-rows // 6))]
    assert read_tables(tmp_path / "folder" / "predictions").equals(read_tables(out / "predictions"))
    # Beside one .npy stands one Parquet.
    assert geoloc_batch.merge(out, out=tmp_path / "pair", embeddings=True).files == 2


def test_numbers_of_both_kinds_become_doubles_and_text_only_where_a_digit_would_be_lost(tmp_path: Path) -> None:
    metas = [
        {"height": 3, "id": 2**53 + 1, "place": 7, "seldom": 5},
        {"height": 2.5, "id": 0.5, "place": "Oslo", "seldom": None},
        {"height": 4, "id": 8, "place": True},
    ]
    with_metas(tmp_path / "out", [[meta] for meta in metas])

    geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet")

    table = pq.read_table(tmp_path / "all.parquet")
    assert table.equals(read_tables(tmp_path / "out" / "predictions"))
    assert table["meta_height"].to_pylist() == [3.0, 2.5, 4.0]
    assert table["meta_id"].to_pylist() == [str(2**53 + 1), "0.5", "8"]
    assert table["meta_place"].to_pylist() == ["7", "Oslo", "true"]
    # A unit in which nothing has a value leaves the numbers of the others what they are.
    assert table["meta_seldom"].to_pylist() == [5, None, None]


def test_embeddings_become_one_pair_that_is_read_like_any_other(out: Path, tmp_path: Path) -> None:
    merged = geoloc_batch.merge(out, out=tmp_path / "all", embeddings=True)

    (unit,) = plan_embeddings(tmp_path / "all")
    stored = read_features(unit.source)
    pairs = [read_features(pair.source) for pair in plan_embeddings(out)]
    assert (merged.files, merged.rows) == (2, stored.num_rows)
    np.testing.assert_array_equal(stored.stored(), np.concatenate([pair.stored() for pair in pairs]))
    np.testing.assert_array_equal(stored.features(), np.concatenate([pair.features() for pair in pairs]))
    assert stored.stored().dtype == np.float16
    assert stored.table["image_path"].to_pylist() == [key for pair in pairs for key in pair.table["key"].to_pylist()]
    assert np.load(unit.source).shape == (stored.num_rows, stored.num_features)


def test_without_predictions_the_metadata_are_merged(tmp_path: Path) -> None:
    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        unit, paths = execution.unit, tables.embedding_paths(execution.unit.index)
        npy, parquet = map(execution.stage, paths)
        tables.write_embeddings(npy, parquet, make_samples(unit, 3), make_features(3, seed=unit.index))
        return list(paths), UnitCounts(samples=3, rows=3, errors=0, unit_error=None, warnings=())

    run_rank(tmp_path / "out", 2, write)
    geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet").equals(read_tables(tmp_path / "out" / "metadata"))


def test_several_heads_get_a_folder_each(tmp_path: Path) -> None:
    heads = ("one", "two")

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        paths = [tables.predictions_path(execution.unit.index, head) for head in heads]
        for seed, path in enumerate(paths):
            located = make_located(2, seed=seed)
            tables.write_predictions(execution.stage(path), make_samples(execution.unit, 2), located)
        return paths, UnitCounts(samples=2, rows=2, errors=0, unit_error=None, warnings=())

    run_rank(tmp_path / "out", 3, write)

    with pytest.raises(OutputError, match=r"is one file, and .* 2 heads; name a folder"):
        geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet")
    assert geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all").rows == 6
    for head in heads:
        merged = read_tables(tmp_path / "all" / head / "predictions")
        assert merged.equals(read_tables(tmp_path / "out" / head / "predictions"))
    assert sorted(os.listdir(tmp_path)) == ["all", "out"]


def test_grouped_predictions_keep_what_is_behind_them(tmp_path: Path) -> None:
    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        """Two locations of four photos, and in the last unit four photos of none."""
        unit = execution.unit
        paths = [*tables.embedding_paths(unit.index)]
        samples = make_samples(unit, 4)
        tables.write_embeddings(*map(execution.stage, paths), samples, make_features(4))
        views = Views(num_views=np.array([3, 1], np.int32), view_km=np.array([1.5, 0], np.float32))
        if unit.index < 2:
            paths.append(tables.predictions_path(unit.index))
            tables.write_predictions(execution.stage(paths[-1]), [samples[0], samples[3]], make_located(2), views)
        rows = 2 if unit.index < 2 else 0
        return paths, UnitCounts(samples=4, rows=rows, errors=0, unit_error=None, warnings=())

    run_rank(tmp_path / "out", 3, write)
    geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet")
    assert table["num_views"].to_pylist() == [3, 1, 3, 1]
    assert table["view_km"].to_pylist() == [1.5, 0, 1.5, 0]
    assert geoloc_batch.merge(tmp_path / "out", out=tmp_path / "pairs", embeddings=True).rows == 12


def test_a_run_that_is_not_complete_is_merged_only_if_that_is_wanted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "out")
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(3))
    execution = take(ledger)
    ledger.commit(execution, *write_unit(execution))
    ledger.close()

    with pytest.raises(OutputError, match=r"2 of the 3 units .* not done.*--partial"):
        geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet")
    merged = geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet", partial=True)
    assert (merged.units, merged.undone, merged.rows) == (1, 2, rows_of(execution.unit))


def test_units_without_a_good_row_are_no_hindrance_and_a_run_of_them_is_refused(tmp_path: Path) -> None:
    run_rank(tmp_path / "out", 2, lambda execution: staging_rows(2 * (execution.unit.index == 1), 1)(execution))
    assert geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all.parquet").rows == 2
    run_rank(tmp_path / "none", 2, staging_rows(0, 1))
    with pytest.raises(OutputError, match="holds no predictions or embeddings"):
        geoloc_batch.merge(tmp_path / "none", out=tmp_path / "none.parquet")
    with pytest.raises(OutputError, match="holds no embeddings"):
        geoloc_batch.merge(tmp_path / "out", out=tmp_path / "pairs", embeddings=True)
