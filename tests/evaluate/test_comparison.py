"""Predictions against the truth, end to end: what comes out of real files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED_DATA
from evaluation_samples import (
    compare,
    run,
    write_csv,
    write_either,
    write_parquet,
    write_run,
    written_metrics,
    written_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.errors import ConfigError, InputError, PartitionError
from geoloc_batch.evaluate.evaluation import format_table
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM

DEGREE_KM = EARTH_RADIUS_KM * math.pi / 180
# Three photos: on the spot, a degree off, ten degrees off.
PREDICTED = {"key": ["a", "b", "c"], "lat": [48.0, 51.0, 50.0], "lon": [2.0, 0.0, 14.0]}
TRUE = {"key": ["b", "c", "a"], "lat": [50.0, 40.0, 48.0], "lon": [0.0, 14.0, 2.0]}


@pytest.mark.parametrize("predictions", ["p.csv", "p.parquet"])
@pytest.mark.parametrize("truth", ["t.csv", "t.parquet"])
def test_rows_are_joined_by_key_whatever_their_order_and_format(tmp_path: Path, predictions: str, truth: str) -> None:
    found = run(tmp_path, write_either(tmp_path / predictions, PREDICTED), write_either(tmp_path / truth, TRUE))
    rows = written_rows(tmp_path)
    assert [row["key"] for row in rows] == ["b", "c", "a"]
    assert [row["distance_km"] for row in rows] == pytest.approx([DEGREE_KM, 10 * DEGREE_KM, 0.0])
    assert [row["geoscore"] for row in rows] == pytest.approx(
        [5000 * math.exp(-d / 1492.7) for d in (DEGREE_KM, 10 * DEGREE_KM, 0)]
    )
    assert (rows[1]["lat"], rows[1]["lon"], rows[1]["true_lat"], rows[1]["true_lon"]) == (50.0, 14.0, 40.0, 14.0)
    assert found.metrics.median_km == pytest.approx(DEGREE_KM)
    assert found.metrics.mean_km == pytest.approx(11 * DEGREE_KM / 3)
    assert {band.threshold_km: round(band.percent, 1) for band in found.metrics.bands} == {
        1: 33.3, 25: 33.3, 200: 66.7, 750: 66.7, 2500: 100.0,
    }  # fmt: skip
    assert found.metrics.coverage == 100
    assert not found.warnings


def test_the_fifty_golden_predictions_of_osv5m(tmp_path: Path) -> None:
    golden = SHARED_DATA / "golden" / "osv5m_select.csv"
    if not golden.is_file():
        pytest.skip(f"real data is absent: {golden}")
    with golden.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    predicted = {"key": "id", "lat": "pred_lat", "lon": "pred_lon"}
    write_csv(tmp_path / "p.csv", {ours: [row[theirs] for row in rows] for ours, theirs in predicted.items()})
    # Their own file is the truth, its columns named by flags.
    columns = {"key_column": "id", "lat_column": "true_lat", "lon_column": "true_lon"}
    found = run(tmp_path, tmp_path / "p.csv", golden, **columns)
    distance = np.array([float(row["distance"]) for row in rows])
    written = written_rows(tmp_path)
    assert [row["key"] for row in written] == [row["id"] for row in rows]
    np.testing.assert_allclose([row["distance_km"] for row in written], distance, rtol=1e-9)
    np.testing.assert_allclose([row["geoscore"] for row in written], [float(row["score"]) for row in rows], rtol=1e-9)
    assert found.metrics.rows == 50
    assert found.metrics.median_km == pytest.approx(np.median(distance), rel=1e-9)
    assert {band.threshold_km: band.percent for band in found.metrics.bands} == {
        threshold: 2.0 * (distance < threshold).sum() for threshold in (1, 25, 200, 750, 2500)
    }
    assert not found.warnings


def test_metrics_json_holds_every_figure_of_the_last_line_and_the_warnings(tmp_path: Path) -> None:
    found = compare(tmp_path, PREDICTED, {**TRUE, "lat": [50.0, None, 48.0]}, thresholds=(112.0, 5.0), strict=True)
    written = written_metrics(tmp_path)
    assert written.pop("kind") == "geoloc evaluation"
    assert written.pop("schema_version") == 1
    assert written.pop("warnings") == list(found.warnings)
    assert len(found.warnings) == 2
    assert written == json.loads(json.dumps(found.by_name()))
    assert written["within_112_km"] == 100.0
    assert written["within_5_km"] == 50.0
    assert written["comparison"] == "<"
    assert written["top_1"] is None
    assert (tmp_path / "scores" / "metrics.md").read_text(encoding="utf-8") == format_table(found) + "\n"


def test_the_table_reads_like_the_published_one(tmp_path: Path) -> None:
    predicted = {**PREDICTED, "topk_cell": ["[7 1 2 3 4]", "[1 2 3 4 7]", "[7 1 2 3 4]"]}
    lines = format_table(compare(tmp_path, predicted, {**TRUE, "cell": [7, 8, 7]})).splitlines()
    assert lines[:5] == [
        "| metric              |    value |",
        "|---------------------|---------:|",
        "| top-1 cell accuracy |   33.3 % |",
        "| top-5 cell accuracy |   66.7 % |",
        "| median error        | 111.2 km |",
    ]
    assert "| within 25 km        |   33.3 % |" in lines
    assert "| balscore            |     52.9 |" in lines
    assert "| coverage            |  100.0 % |" in lines
    assert lines[-1].startswith("3 of 3 rows; within: distance <= threshold, on a ball of 6371 km")


def test_a_threshold_that_a_distance_meets_exactly_is_within_unless_strict(tmp_path: Path) -> None:
    exact = compare(tmp_path, PREDICTED, TRUE).metrics.median_km
    loose = compare(tmp_path, PREDICTED, TRUE, thresholds=(exact,)).metrics
    strict = compare(tmp_path, PREDICTED, TRUE, thresholds=(exact,), strict=True).metrics
    for found, percent in ((loose, 200 / 3), (strict, 100 / 3)):
        assert {band.threshold_km: band.percent for band in found.bands}[exact] == pytest.approx(percent)


def test_top_1_and_top_5_by_the_cells_that_the_truth_states(tmp_path: Path) -> None:
    lists = [[7, 1, 2, 3, 4, 5], [1, 2, 3, 4, 7, 5], [1, 2, 3, 4, 5, 7]]
    predicted = write_parquet(tmp_path / "p.parquet", {**PREDICTED, "topk_cell": pa.array(lists, pa.list_(pa.int32()))})
    found = run(tmp_path, predicted, write_csv(tmp_path / "t.csv", {**TRUE, "cell": [7, 7, 7]}))
    assert (found.metrics.top_1, found.metrics.top_5) == pytest.approx((100 / 3, 200 / 3))
    assert [(row["key"], row["true_cell"], row["cell_rank"]) for row in written_rows(tmp_path)] == [
        ("b", 7, 5), ("c", 7, 6), ("a", 7, 1),
    ]  # fmt: skip


def test_rows_without_a_known_cell_do_not_count_for_top_1(tmp_path: Path) -> None:
    found = compare(tmp_path, {**PREDICTED, "cell": [7, 8, 9]}, {**TRUE, "cell": [8, "", 3]})
    assert (found.metrics.top_1, found.metrics.top_5, found.metrics.cell_rows) == (50.0, None, 2)
    assert found.metrics.rows == 3
    assert [row["cell_rank"] for row in written_rows(tmp_path)] == [1, None, 0]


def cells_file(path: Path) -> Path:
    centroids = np.array([[48.0, 2.0], [50.0, 0.0], [40.0, 14.0], [52.0, 0.0]])
    Partition(ids=np.array([3, 5, 8, 11]), centroids_deg=centroids).save(path)
    return path


def test_top_1_by_the_cells_that_the_true_places_lie_in(tmp_path: Path) -> None:
    cells = cells_file(tmp_path / "cells.json")
    found = compare(tmp_path, {**PREDICTED, "cell": [3, 11, 8]}, {**TRUE, "cell": [0, 0, 0]}, cells=str(cells))
    assert found.metrics.top_1 == pytest.approx(200 / 3)
    # The truth's own column is not read where --cells is given.
    assert [row["true_cell"] for row in written_rows(tmp_path)] == [5, 8, 3]
    assert written_metrics(tmp_path)["cells_file"] == str(cells)


def test_true_places_in_no_cell_take_the_nearest_and_are_told(tmp_path: Path) -> None:
    quadtree = SHARED_DATA / "partitions" / "osv5m_quadtree_10_1000.csv"
    if not quadtree.is_file():
        pytest.skip(f"real data is absent: {quadtree}")
    points = np.array([[48.86, 2.35], [-89.0, 30.0], [52.52, 13.4]])
    ids = load_partition(quadtree).assign(points[:, 0], points[:, 1])
    places = {"key": ["paris", "south pole", "berlin"], "lat": points[:, 0], "lon": points[:, 1]}
    found = compare(tmp_path, {**places, "cell": [ids[0], ids[1], ids[0]]}, places, cells=str(quadtree))
    assert found.metrics.top_1 == pytest.approx(200 / 3)
    assert len(found.warnings) == 1
    assert "1 of 3 points lie in no cell" in found.warnings[0]


def test_cells_of_another_partition_are_refused(tmp_path: Path) -> None:
    cells = str(cells_file(tmp_path / "cells.json"))
    with pytest.raises(PartitionError, match=r"has no cell 4, which .*p.csv predicts \(2 such cells\); give the cells"):
        compare(tmp_path, {**PREDICTED, "cell": [9, 4, 3]}, TRUE, cells=cells)
    with pytest.raises(PartitionError, match="has no cell 12,"):
        compare(tmp_path, {**PREDICTED, "cell": [3, 5, 8], "topk_cell": ["3 5", "5 12", "8 3"]}, TRUE, cells=cells)
    with pytest.raises(ConfigError, match="needs predictions with a column cell or topk_cell"):
        compare(tmp_path, PREDICTED, TRUE, cells=cells)
    assert not (tmp_path / "scores").exists()


def test_keys_that_repeat_across_shards_are_told_apart_by_the_truths_shards(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [4, 7, 2])
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "pred/predictions").iterdir())])
    truth = table.select(["key", "shard", "meta_lat", "meta_lon"]).rename_columns(["key", "shard", "lat", "lon"])
    found = run(tmp_path, tmp_path / "pred", write_parquet(tmp_path / "t.parquet", truth.take([12, 0, 5, 4])))
    assert found.metrics.rows == 4
    assert found.metrics.median_km == pytest.approx(0.5 * DEGREE_KM)
    assert found.metrics.mean_km == pytest.approx(0.5 * DEGREE_KM)
    assert [(row["shard"], row["key"]) for row in written_rows(tmp_path)] == [
        ("shards/02.tar", "photos/001"),
        ("shards/00.tar", "photos/000"),
        ("shards/01.tar", "photos/001"),
        ("shards/01.tar", "photos/000"),
    ]


def test_a_split_of_the_truth_is_compared_alone(tmp_path: Path) -> None:
    predictions = {"key": ["a", "b", "c"], "lat": [50, 51, 52], "lon": [10, 10, 10]}
    truth = {
        "key": ["a", "b", "c", "d"],
        "lat": [50, 50, 52, 1],
        "lon": [10] * 4,
        "split": ["test", "test", None, "val"],
    }
    found = compare(tmp_path, predictions, truth, split="test")
    assert (found.metrics.rows, found.metrics.asked) == (2, 2)
    assert found.metrics.median_km == pytest.approx(111.195 / 2, abs=0.01)
    assert compare(tmp_path, predictions, truth).metrics.asked == 4
    with pytest.raises(InputError, match=r"--split dev: .* holds test, val; name one of them"):
        compare(tmp_path, predictions, truth, split="dev")
    with pytest.raises(ConfigError, match="name its file with --truth"):
        run(tmp_path, tmp_path / "p.csv", split="test")


@pytest.mark.parametrize("given_as", ["pred", "pred/predictions"])
def test_without_a_truth_the_photos_own_json_is_the_truth(tmp_path: Path, given_as: str) -> None:
    write_run(tmp_path / "pred", [4, 7, 2], errors=[0, 3])
    found = run(tmp_path, tmp_path / given_as)
    assert found.metrics.rows == 13
    assert found.metrics.median_km == pytest.approx(0.5 * DEGREE_KM)
    # What the run could not predict was asked for, too.
    assert found.metrics.asked == 16
    assert found.metrics.coverage == pytest.approx(100 * 13 / 16)
    assert "3 photos gave an error row" in found.warnings[0]
    assert found.truth.startswith("meta_lat and meta_lon of ")
    assert len(written_rows(tmp_path)) == 13


def test_each_head_has_an_evaluation_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [5], "north", seed=1)
    write_run(tmp_path / "pred", [5], "south", seed=2, errors=[1])
    with pytest.raises(ConfigError, match="the predictions of 2 heads; choose one: --head north, --head south"):
        run(tmp_path, tmp_path / "pred")
    rows = {}
    for source, head in (("pred", "north"), ("pred", "south"), ("pred/south", ""), ("pred/south/predictions", "")):
        found = run(tmp_path, tmp_path / source, head=head)
        assert found.metrics.asked == 6 or source == "pred/south"
        rows[source, head] = written_rows(tmp_path)
    assert rows["pred", "north"] != rows["pred", "south"]
    assert rows["pred/south", ""] == rows["pred", "south"] == rows["pred/south/predictions", ""]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_order_of_either_table_changes_no_figure(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("order")
    count = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(count)
    columns = {"key": [f"k{row}" for row in range(count)], "lat": rng.uniform(-90, 90, count), "cell": range(count)}
    tables = [{**columns, "lon": rng.uniform(-180, 180, count)} for _ in range(2)]
    orders = [data.draw(st.permutations(range(count))) for _ in range(2)]
    shuffled = [
        {name: [values[row] for row in order] for name, values in table.items()}
        for table, order in zip(tables, orders, strict=True)
    ]
    plain, moved = compare(folder, *tables), compare(folder, *shuffled)
    assert moved.metrics == plain.metrics
    assert [row["key"] for row in written_rows(folder)] == shuffled[1]["key"]
