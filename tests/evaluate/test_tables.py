"""Reading tables of places: formats, columns, kinds."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from evaluation_samples import run, write_csv, write_either, write_parquet, write_run, written_rows

from geoloc_batch.errors import ConfigError, InputError

GOOD = {"key": ["007", "NA", "é/x y"], "lat": [48.0, 51.0, 50.0], "lon": [2.0, 0.5, 14.0]}


def test_keys_stay_as_they_are_written(tmp_path: Path) -> None:
    for keys in (["007", "NA", "é/x y"], ["007", "010", "1e3"], ["true", "NULL", "2020-01-01"]):
        named = {**GOOD, "key": keys}
        run(tmp_path, write_csv(tmp_path / "p.csv", named), write_parquet(tmp_path / "t.parquet", named))
        assert [row["key"] for row in written_rows(tmp_path)] == keys


def test_whole_numbers_serve_as_keys(tmp_path: Path) -> None:
    numbers = {**GOOD, "key": [7, 123456789012345, -3]}
    predicted = write_csv(tmp_path / "p.csv", numbers)
    assert run(tmp_path, predicted, write_parquet(tmp_path / "t.parquet", numbers)).metrics.rows == 3
    fractions = write_parquet(tmp_path / "f.parquet", {**GOOD, "key": [7.0, 1.0, 2.0]})
    with pytest.raises(InputError, match=r"f.parquet: column 'key' holds double.*keys are text or whole numbers; mend"):
        run(tmp_path, predicted, fractions)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_serves_as_a_key(tmp_path: Path, kind: pa.DataType) -> None:
    columns: dict[str, Any] = {**GOOD, "key": pa.array(GOOD["key"]).cast(kind)}
    truth = write_parquet(tmp_path / "t.parquet", columns)
    assert run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth).metrics.mean_km == 0


@pytest.mark.parametrize("kind", [pa.float32(), pa.int16(), pa.decimal128(9, 4), pa.string()])
def test_every_kind_of_number_serves_as_degrees(tmp_path: Path, kind: pa.DataType) -> None:
    whole = {**GOOD, "lat": [48, 51, 50], "lon": [2, 0, 14]}
    columns: dict[str, Any] = {**whole, "lat": pa.array([48, 51, 50], pa.int16()).cast(kind)}
    truth = write_parquet(tmp_path / "t.parquet", columns)
    assert run(tmp_path, write_csv(tmp_path / "p.csv", whole), truth).metrics.mean_km == 0


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_csv_with_any_common_separator_is_read(tmp_path: Path, delimiter: str, ending: str) -> None:
    truth = write_csv(tmp_path / "t.csv", {**GOOD, "note": ["a", "", "b"]}, delimiter)
    truth.write_bytes(b"\xef\xbb\xbf" + truth.read_bytes().replace(b"\n", ending.encode()))
    assert run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth).metrics.mean_km == 0


def test_a_compressed_csv_is_read(tmp_path: Path) -> None:
    truth = tmp_path / "t.csv.gz"
    truth.write_bytes(gzip.compress(write_csv(tmp_path / "t.csv", GOOD).read_bytes()))
    assert run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth).metrics.mean_km == 0


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"id": 0, "lat": 1, "lon": 2},
            r"no column 'key'; did you mean 'id'\? Then pass --key-column id. It has id, lat",
        ),
        ({"key": 0, "latitude": 1, "lon": 2}, r"no column 'lat'; did you mean 'latitude'\? Then pass --lat-column lat"),
        ({"key": 0, "lat": 1, "lng": 2}, r"no column 'lon'; did you mean 'lng'\? Then pass --lon-column lng"),
        ({"key": 0, "Lat": 1, "lon": 2}, r"no column 'lat'; did you mean 'Lat'\?"),
        ({"key": 0, "lta": 1, "lon": 2}, r"no column 'lat'; did you mean 'lta'\?"),
        ({"key": 0, "quux": 1, "lon": 2}, r"no column 'lat'; it has key, quux, lon"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_missing_column_is_named_with_the_nearest_one(
    tmp_path: Path, columns: dict[str, int], words: str, form: str
) -> None:
    values = [GOOD["key"], GOOD["lat"], GOOD["lon"]]
    renamed = {name: values[place] for name, place in columns.items()}
    truth = tmp_path / f"t.{form}"
    (write_csv if form == "csv" else write_parquet)(truth, renamed)
    with pytest.raises(InputError, match=rf"t.{form} has {words}"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)


def test_a_missing_column_of_predictions_is_to_be_renamed(tmp_path: Path) -> None:
    predicted = {"key": GOOD["key"], "pred_lat": GOOD["lat"], "lon": GOOD["lon"]}
    with pytest.raises(InputError, match=r"p.csv has no column 'lat'; did you mean 'pred_lat'\? Then rename it"):
        run(tmp_path, write_csv(tmp_path / "p.csv", predicted), write_csv(tmp_path / "t.csv", GOOD))


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    truth = tmp_path / "t.csv"
    truth.write_text("key,lat,lon,lat\na,1,2,3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"t.csv has two columns 'lat'; rename one"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"key,lat,lon\na,here,2\n", "invalid value 'here'"),
        (b"key;lat;lon\na;48,5;2\n", "invalid value '48,5'"),
        (b"key,lat,lon\na,1,2,3\n", "Expected 3 columns, got 4"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "neither Parquet nor a CSV in UTF-8"),
        (b"PAR1 and no more", "cannot be read: "),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, text: bytes, words: str) -> None:
    truth = tmp_path / "t.csv"
    truth.write_bytes(text)
    with pytest.raises(InputError, match=rf"t\.csv.*{words}"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)


def test_text_where_degrees_are_due_is_named(tmp_path: Path) -> None:
    truth = write_parquet(tmp_path / "t.parquet", {**GOOD, "lon": ["2", "east", "14"]})
    with pytest.raises(InputError, match=r"column 'lon' holds string, which is not all degrees: .*'east'"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)


@pytest.mark.parametrize("spelt", ["[7, 8, 9, 10, 11]", "[ 7  8  9 10 11]", "7;8;9;10;11", "7 8 9 10 11"])
def test_lists_of_cells_are_read_as_a_csv_spells_them(tmp_path: Path, spelt: str) -> None:
    predicted = write_csv(tmp_path / "p.csv", {**GOOD, "topk_cell": [f'"{spelt}"', '"[8, 7, 1, 2, 3]"', ""]})
    found = run(tmp_path, predicted, write_csv(tmp_path / "t.csv", {**GOOD, "cell": [11, 8, 3]}))
    assert (found.metrics.top_1, found.metrics.top_5) == pytest.approx((100 / 3, 200 / 3))
    assert [row["cell_rank"] for row in written_rows(tmp_path)] == [5, 1, 0]


def test_cells_with_gaps_are_read_as_pandas_writes_them(tmp_path: Path) -> None:
    truth = write_parquet(tmp_path / "t.parquet", {**GOOD, "cell": [7.0, float("nan"), 3.0]})
    found = run(tmp_path, write_csv(tmp_path / "p.csv", {**GOOD, "cell": ["7.0", "", "4.0"]}), truth)
    assert (found.metrics.top_1, found.metrics.cell_rows) == (50, 2)
    halves = write_parquet(tmp_path / "t.parquet", {**GOOD, "cell": [7.5, 1.0, 3.0]})
    with pytest.raises(InputError, match="column 'cell' holds double, which is not all ids of cells"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), halves)


def test_sources_that_are_none_say_what_to_name(tmp_path: Path) -> None:
    good = write_csv(tmp_path / "t.csv", GOOD)
    with pytest.raises(InputError, match="nowhere is no file or folder that could be read as predictions"):
        run(tmp_path, tmp_path / "nowhere", good)
    with pytest.raises(InputError, match=r"gone.csv is no file or folder that could be read as --truth"):
        run(tmp_path, good, tmp_path / "gone.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no predictions/"):
        run(tmp_path, tmp_path / "empty", good)
    with pytest.raises(InputError, match=r"empty is a folder without .parquet"):
        run(tmp_path, good, tmp_path / "empty")
    (tmp_path / "empty" / "img_emb").mkdir()
    with pytest.raises(InputError, match="holds embeddings; predict from them: geoloc predict --from-embeddings"):
        run(tmp_path, tmp_path / "empty", good)


def test_a_head_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "pred", [2], "north")
    # The only head needs no flag.
    assert run(tmp_path, tmp_path / "pred").metrics.rows == 2
    with pytest.raises(ConfigError, match=r"--head nort: .*; did you mean north\?"):
        run(tmp_path, tmp_path / "pred", head="nort")
    with pytest.raises(ConfigError, match=r"--head x: .*; choose one: --head north"):
        run(tmp_path, tmp_path / "pred", head="x")
    with pytest.raises(ConfigError, match=r"--head north: .* no named head; leave it out"):
        run(tmp_path, tmp_path / "pred/north/predictions", head="north")
    with pytest.raises(ConfigError, match=r"p.csv is a file; leave it out"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), head="north")


def test_a_truth_may_be_a_folder_of_parquet(tmp_path: Path) -> None:
    for row, name in enumerate(("a", "b", "c")):
        part = {column: [values[row]] for column, values in GOOD.items()}
        write_parquet(tmp_path / "truth" / f"{name}.parquet", {**part, "cell": [1]} if row else part)
    found = run(tmp_path, write_csv(tmp_path / "p.csv", {**GOOD, "cell": [1, 1, 2]}), tmp_path / "truth")
    assert (found.metrics.rows, found.metrics.cell_rows, found.metrics.top_1) == (3, 2, 50)


def test_one_file_may_be_both_the_predictions_and_the_truth(tmp_path: Path) -> None:
    good = write_csv(tmp_path / "p.csv", GOOD)
    found = run(tmp_path, good, good)
    assert (found.metrics.rows, found.metrics.median_km) == (len(GOOD["key"]), 0)


@pytest.mark.parametrize("name", ["shard", "cell"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_serves_as_the_key_serves_as_nothing_else(tmp_path: Path, name: str, suffix: str) -> None:
    truth = {name: GOOD["key"], "lat": GOOD["lat"], "lon": GOOD["lon"]}
    predicted = {**GOOD, "shard": ["0.tar"] * len(GOOD["key"]), "cell": [1] * len(GOOD["key"])}
    sides = write_either(tmp_path / f"p{suffix}", predicted), write_either(tmp_path / f"t{suffix}", truth)
    assert run(tmp_path, *sides, key_column=name).metrics.rows == len(GOOD["key"])


@pytest.mark.parametrize("name", ["lat", "cell"])
def test_true_and_false_are_neither_degrees_nor_cells(tmp_path: Path, name: str) -> None:
    flags = [row % 2 == 0 for row in range(len(GOOD["key"]))]
    truth = write_parquet(tmp_path / "t.parquet", {**GOOD, name: flags})
    with pytest.raises(InputError, match=f"column '{name}' holds bool, .*true and false are no numbers"):
        run(tmp_path, write_csv(tmp_path / "p.csv", GOOD), truth)
