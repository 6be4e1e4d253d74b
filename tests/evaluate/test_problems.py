"""What is wrong with tables: told in words that name the thing, its value and the remedy."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_samples import compare, run, write_csv, write_parquet, write_run, written_rows

from geoloc_batch.errors import InputError, OutputError

GOOD = {"key": ["a", "b", "c", "d"], "lat": [48.0, 51.0, 50.0, 38.0], "lon": [2.0, 0.5, 14.0, -9.0]}


def changed(**columns: list[Any]) -> dict[str, list[Any]]:
    return {**GOOD, **columns}


def test_predictions_without_truth_are_left_out_and_counted(tmp_path: Path) -> None:
    truth = {name: values[:3] for name, values in GOOD.items()}
    found = compare(tmp_path, GOOD, truth)
    assert found.counts.predictions_without_truth == 1
    assert (found.metrics.rows, found.metrics.asked, found.metrics.coverage) == (3, 3, 100)
    assert found.warnings == ("1 of 4 predictions have no truth: left out",)


def test_true_places_without_a_prediction_lower_the_coverage(tmp_path: Path) -> None:
    found = compare(tmp_path, {name: values[1:] for name, values in GOOD.items()}, GOOD)
    assert found.counts.truth_without_prediction == 1
    assert (found.metrics.rows, found.metrics.asked, found.metrics.coverage) == (3, 4, 75)
    assert found.warnings == ("1 of 4 true places have no prediction: they lower the coverage",)
    first, second = written_rows(tmp_path)[:2]
    assert (first["key"], first["true_lat"], first["distance_km"], first["lat"]) == ("a", 48.0, None, None)
    assert (second["key"], second["distance_km"]) == ("b", 0.0)


@pytest.mark.parametrize("value", ["", "NaN", "nan", "NA"])
def test_a_truth_without_coordinates_is_left_out_and_not_asked(tmp_path: Path, value: str) -> None:
    found = compare(tmp_path, GOOD, changed(lat=[48.0, value, 50.0, value]))
    assert found.counts.truth_without_place == 2
    assert (found.metrics.rows, found.metrics.asked) == (2, 2)
    assert "2 rows (first: 'b', lat nan, lon 0.5) without lat or lon (or NaN): left out" in found.warnings[0]
    assert [row["key"] for row in written_rows(tmp_path)] == ["a", "c"]


def test_a_prediction_without_coordinates_is_not_predicted(tmp_path: Path) -> None:
    predicted = write_parquet(tmp_path / "p.parquet", changed(lon=[2.0, float("nan"), None, -9.0]))
    found = run(tmp_path, predicted, write_csv(tmp_path / "t.csv", GOOD))
    assert found.counts.predictions_without_place == 2
    assert (found.metrics.rows, found.metrics.asked, found.metrics.coverage) == (2, 4, 50)
    assert "2 rows (first: 'b', lat 51, lon nan) without lat or lon (or NaN): counted as not" in found.warnings[0]


@pytest.mark.parametrize(("column", "value"), [("lat", 90.5), ("lat", -91), ("lon", 180.01), ("lon", "inf")])
def test_a_place_that_is_none_on_earth_is_left_out(tmp_path: Path, column: str, value: Any) -> None:
    wrong = changed(**{column: [*GOOD[column][:2], value, GOOD[column][3]]})
    truth = compare(tmp_path, GOOD, wrong)
    assert (truth.counts.truth_out_of_range, truth.metrics.rows, truth.metrics.asked) == (1, 3, 3)
    assert "t.csv: 1 row ('c', lat " in truth.warnings[0]
    assert "with no place on Earth: left out" in truth.warnings[0]
    predicted = compare(tmp_path, wrong, GOOD)
    assert (predicted.counts.predictions_out_of_range, predicted.metrics.rows, predicted.metrics.asked) == (1, 3, 4)
    assert "with no place on Earth: counted as not predicted" in predicted.warnings[0]


def test_the_ends_of_the_ranges_are_places(tmp_path: Path) -> None:
    edges = changed(lat=[90, -90, 0, 0.0], lon=[0, 0, 180, -180])
    found = compare(tmp_path, edges, edges)
    assert (found.metrics.rows, found.metrics.mean_km) == (4, 0)
    assert not found.warnings


@pytest.mark.parametrize("side", ["truth", "predictions"])
def test_null_island_is_told_and_compared(tmp_path: Path, side: str) -> None:
    zeros = changed(lat=[48.0, 0, 50.0, "-0.0"], lon=[2.0, "0.0", 14.0, 0])
    found = compare(tmp_path, zeros, GOOD) if side == "predictions" else compare(tmp_path, GOOD, zeros)
    assert getattr(found.counts, f"{side}_at_null_island") == 2
    assert found.metrics.rows == 4
    assert "2 rows (first: 'b', lat 0, lon 0) at (0, 0), null island: compared" in found.warnings[0]


def scattered(count: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    lat, lon = rng.uniform(36, 70, count), rng.uniform(-10, 40, count)
    return {"key": [f"k{row}" for row in range(count)], "lat": lat.tolist(), "lon": lon.tolist()}


@pytest.mark.parametrize("side", ["truth", "predictions"])
def test_swapped_columns_are_told(tmp_path: Path, side: str) -> None:
    right = scattered(101, seed=1)
    near = {**right, "lat": [lat + 1 for lat in right["lat"]]}
    wrong = {"key": right["key"], "lat": right["lon"], "lon": right["lat"]}
    found = compare(tmp_path, near, wrong) if side == "truth" else compare(tmp_path, wrong, near)
    assert found.counts.is_swapped
    # Swapping either side brings the two together: the distances cannot tell which one it is.
    assert (
        "t.csv: lat and lon look swapped: 101 of 101 rows come closer by swapping them (median 1" in found.warnings[0]
    )
    assert "pass --lat-column and --lon-column the other way round, unless those of " in found.warnings[0]
    assert found.warnings[0].endswith("p.csv are wrong")
    assert not compare(tmp_path, near, right).counts.is_swapped


def test_the_remedy_for_a_swapped_truth_works(tmp_path: Path) -> None:
    right = scattered(20, seed=2)
    wrong = {"key": right["key"], "lat": right["lon"], "lon": right["lat"]}
    found = compare(tmp_path, right, wrong, lat_column="lon", lon_column="lat")
    assert found.metrics.mean_km == 0
    assert not found.warnings


def test_a_swap_that_leaves_the_earth_is_told_in_place_of_an_empty_comparison(tmp_path: Path) -> None:
    west = {"key": ["a", "b"], "lat": [34.05, 37.77], "lon": [-118.25, -122.42]}
    wrong = {"key": west["key"], "lat": west["lon"], "lon": west["lat"]}
    words = "lat and lon look swapped: 2 of 2 rows come closer by swapping them (median 0 km instead of out of range); "
    # What lies beyond the poles says which side it is.
    with pytest.raises(InputError, match=re.escape(f"t.csv: {words}pass --lat-column") + ".* the other way round$"):
        compare(tmp_path, west, wrong)
    with pytest.raises(InputError, match="nothing can be compared. .*" + re.escape(f"p.csv: {words}swap the columns")):
        compare(tmp_path, wrong, west)


def test_the_side_with_more_coordinates_beyond_the_poles_is_the_swapped_one(tmp_path: Path) -> None:
    # The first two rows come closer by swapping either side, the third only by swapping the predictions.
    right = {"key": ["a", "b", "c"], "lat": [50.0, 52.0, 34.05], "lon": [10.0, 13.0, -118.25]}
    wrong = {"key": right["key"], "lat": right["lon"], "lon": right["lat"]}
    assert "p.csv: lat and lon look swapped: 3 of 3" in compare(tmp_path, wrong, right).warnings[0]
    assert "t.csv: lat and lon look swapped: 3 of 3" in compare(tmp_path, right, wrong).warnings[0]


def test_a_mere_guesser_is_not_taken_for_swapped(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tables = [
            {"key": range(501), "lat": rng.uniform(-60, 60, 501), "lon": rng.uniform(-60, 60, 501)} for _ in range(2)
        ]
        assert not compare(tmp_path, *tables).counts.is_swapped


@pytest.mark.parametrize("side", ["truth", "predictions"])
def test_a_key_that_stands_twice_is_named(tmp_path: Path, side: str) -> None:
    twice = {"key": ["a", "b", "c", "b", "a"], "lat": [1, 2, 3, 4, 5], "lon": [1, 2, 3, 4, 5]}
    how = " with another lat or lon" if side == "truth" else ""
    words = f"the key 'b' stands twice{how}, in row 2 and in row 4; 2 rows repeat an earlier key{how}; keep one row"
    with pytest.raises(InputError, match=("t" if side == "truth" else "p") + r"\.csv: " + words):
        compare(tmp_path, *((GOOD, twice) if side == "truth" else (twice, GOOD)))


def test_a_truth_of_photos_is_one_of_locations_where_the_rows_of_each_agree(tmp_path: Path) -> None:
    truth = {
        "path": ["1", "2", "3", "4", "5", "6", "7"],
        "place": ["d", "a", "d", "b", "a", "c", "d"],
        "lat": [4, 1, 4, 2, 1, None, 4],
        "lon": [7, 7, 7, 7, 7, 7, 7],
        "cell": [None, 5, None, 6, 5, 7, None],
    }
    found = compare(tmp_path, GOOD, truth, key_column="place")
    once = {name: [values[row] for row in (0, 1, 3, 5)] for name, values in truth.items()}
    assert found.metrics == compare(tmp_path, GOOD, once, key_column="place").metrics
    assert (found.counts.truth, found.counts.truth_without_place, found.metrics.rows) == (4, 1, 3)
    assert any("3 rows say again what an earlier row of their key says" in warning for warning in found.warnings)
    for column, other in (("lat", None), ("lon", 7.5), ("cell", 4)):
        changed = {**truth, column: [*truth[column][:6], other]}
        with pytest.raises(InputError, match=r"'d' stands twice with another .* row 1 and in row 7; 1 rows repeat"):
            compare(tmp_path, GOOD, changed, key_column="place")


def test_keys_of_two_shards_that_agree_stay_two_where_both_tables_have_shards(tmp_path: Path) -> None:
    both = {"key": ["a", "a"], "shard": ["x", "y"], "lat": [1, 1], "lon": [1, 1]}
    assert compare(tmp_path, both, both).counts.truth == 2
    assert compare(tmp_path, {"key": ["a"], "lat": [1], "lon": [1]}, both).counts.truth == 1


def test_a_key_of_two_shards_needs_a_truth_that_says_which(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [3, 2])
    truth = write_csv(tmp_path / "t.csv", {"key": ["photos/002"], "lat": [50], "lon": [10]})
    words = (
        r"'photos/000' stands twice, in row 1 and in row 4 \(shards shards/00.tar and shards/01.tar\).*a column shard"
    )
    with pytest.raises(InputError, match=words):
        run(tmp_path, tmp_path / "pred", truth)


def test_a_key_that_stands_twice_in_one_shard_is_named_without_a_truth_too(tmp_path: Path) -> None:
    own = {"meta_lat": GOOD["lat"], "meta_lon": GOOD["lon"]}
    assert run(tmp_path, write_csv(tmp_path / "p.csv", {**GOOD, **own})).metrics.rows == 4
    with pytest.raises(InputError, match="the key 'a' stands twice, in row 1 and in row 3"):
        run(tmp_path, write_csv(tmp_path / "p.csv", {**GOOD, **own, "key": ["a", "b", "a", "c"]}))
    shards = {"key": ["a", "b", "a", "c"], "shard": ["x", "x", "y", "y"]}
    assert run(tmp_path, write_csv(tmp_path / "p.csv", {**GOOD, **own, **shards})).metrics.rows == 4


@pytest.mark.parametrize("keys", [["a", "", "c", "d"], ["a", None, "c", None]])
def test_a_row_without_a_key_is_an_error(tmp_path: Path, keys: list[str | None]) -> None:
    truth = write_parquet(tmp_path / "t.parquet", {**GOOD, "key": keys})
    with pytest.raises(InputError, match=rf"t.parquet: row 2 has no key \({keys.count(keys[1])} such rows\); fill"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)


def test_keys_that_never_meet_are_shown_side_by_side(tmp_path: Path) -> None:
    truth = changed(key=["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    with pytest.raises(InputError, match=r"p.csv has 'a', .*t.csv has 'a.jpg'. A key is .* without the last extension"):
        compare(tmp_path, GOOD, truth)
    shards = [write_csv(tmp_path / f"{side}.csv", {**GOOD, "shard": [f"{side}/0.tar"] * 4}) for side in "pt"]
    with pytest.raises(InputError, match=r"'a' of shard 'p/0.tar', .*'a' of shard 't/0.tar'"):
        run(tmp_path, *shards)
    assert not (tmp_path / "scores").exists()


def test_tables_that_leave_nothing_to_compare_say_why(tmp_path: Path) -> None:
    gaps = changed(lat=[None] * 4)
    with pytest.raises(
        InputError, match=r"no row has both a true and a predicted place. .*4 rows \(first: 'a', lat nan"
    ):
        compare(tmp_path, GOOD, gaps)
    with pytest.raises(InputError, match=r"4 rows .* without lat or lon .*: counted as not predicted"):
        compare(tmp_path, gaps, GOOD)
    empty: dict[str, list[Any]] = {"key": [], "lat": [], "lon": []}
    for tables, name in (((empty, GOOD), "p.csv"), ((GOOD, empty), "t.csv")):
        with pytest.raises(InputError, match=rf"{name} has no row; give a table with some"):
            compare(tmp_path, *tables)


def test_predictions_that_know_no_truth_ask_for_one(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"p.csv has no column meta_lat that could serve as the truth; give it with --tr"
    ):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD))
    other = {"meta_latitude": GOOD["lat"], "meta_longitude": GOOD["lon"]}
    predicted = write_csv(tmp_path / "p.csv", {**GOOD, **other})
    assert run(tmp_path, predicted, lat_column="latitude", lon_column="longitude").metrics.rows == 4


def test_a_json_that_lacks_the_place_in_some_shards_leaves_those_out(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [3, 2])
    table = pa.table({"key": ["x"], "shard": ["s"], "lat": [1.0], "lon": [2.0]})
    write_parquet(tmp_path / "pred/predictions/predictions_000002.parquet", table)
    found = run(tmp_path, tmp_path / "pred")
    assert (found.metrics.rows, found.counts.truth_without_place, found.counts.predictions) == (5, 1, 6)


def test_warnings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="geoloc_batch"):
        found = compare(tmp_path, GOOD, {name: values[:2] for name, values in GOOD.items()})
    assert [record.getMessage() for record in caplog.records] == list(found.warnings)


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [3])
    with pytest.raises(OutputError, match=r"pred holds other files \(predictions, ...\); name a new folder"):
        run(tmp_path, "nowhere", out=str(tmp_path / "pred"))
