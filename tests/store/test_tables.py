"""What the files of a unit hold, and that other tools read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_features, make_located, make_samples, make_units, write_pair

from geoloc_batch.errors import InputError
from geoloc_batch.records import RowError
from geoloc_batch.store import tables

UNIT = make_units(1)[0]
# float16 rows of length 1: half a unit in the last place of the largest value, over the row.
FEATURE_TOLERANCE = 1e-3


def test_names_are_those_of_the_layout() -> None:
    assert tables.embedding_paths(12) == ("img_emb/img_emb_000012.npy", "metadata/metadata_000012.parquet")
    assert tables.predictions_path(3) == "predictions/predictions_000003.parquet"
    assert tables.predictions_path(3, "europe") == "europe/predictions/predictions_000003.parquet"
    assert tables.errors_path(1_234_567) == "errors/errors_1234567.parquet"


@pytest.mark.parametrize("rows", [1, 63, tables.NORM_ROWS + 1])
def test_embeddings_are_normalised_rows_in_float16_beside_their_metadata(tmp_path: Path, rows: int) -> None:
    features_ND = make_features(rows)

    npy = write_pair(tmp_path, make_samples(UNIT, rows), features_ND)

    stored = np.load(npy)
    table = pq.read_table(tmp_path / "metadata/metadata_000000.parquet")
    assert (stored.dtype.str, stored.shape, stored.flags.c_contiguous) == ("<f2", (rows, 17), True)
    np.testing.assert_allclose(np.linalg.norm(stored.astype(np.float64), axis=1), 1, atol=FEATURE_TOLERANCE)
    np.testing.assert_allclose(table["emb_norm"].to_numpy(), np.linalg.norm(features_ND, axis=1), rtol=1e-6)
    assert table.column_names == ["image_path", "key", "shard", "row", "emb_norm", "number", "place.name"]
    assert table["image_path"].to_pylist() == table["key"].to_pylist() == [f"photo/{row:04d}" for row in range(rows)]
    assert table["number"].to_pylist() == table["row"].to_pylist() == list(range(rows))
    assert table.schema.metadata[b"schema_version"] == b"1"


def test_the_same_rows_give_the_same_bytes_whatever_their_neighbours(tmp_path: Path) -> None:
    samples, features_ND = make_samples(UNIT, 9), make_features(9)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()

    first = write_pair(tmp_path / "a", samples, features_ND)
    second = write_pair(tmp_path / "b", samples, np.asfortranarray(features_ND))
    alone = write_pair(tmp_path / "c", samples[4:5], features_ND[4:5])

    assert first.read_bytes() == second.read_bytes()
    metadata = "metadata/metadata_000000.parquet"
    assert (tmp_path / "a" / metadata).read_bytes() == (tmp_path / "b" / metadata).read_bytes()
    assert np.load(first)[4].tobytes() == np.load(alone)[0].tobytes()
    norms = [pq.read_table(tmp_path / name / metadata)["emb_norm"].to_pylist() for name in ("a", "c")]
    assert norms[0][4] == norms[1][0]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_without_a_direction_is_refused_by_name(tmp_path: Path, value: float) -> None:
    features_ND = make_features(5)
    features_ND[3] = value

    with pytest.raises(ValueError, match=r"photo/0003 in shards/00000\.tar"):
        write_pair(tmp_path, make_samples(UNIT, 5), features_ND)


def test_rows_out_of_order_are_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="sorted"):
        write_pair(tmp_path, make_samples(UNIT, 5)[::-1], make_features(5))


def test_predictions_have_the_schema_that_is_promised(tmp_path: Path) -> None:
    located = make_located(6, kept=4)

    tables.write_predictions(tmp_path / "p.part", make_samples(UNIT, 6), located)

    schema = pq.read_schema(tmp_path / "p.part")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("key", "string"),
        ("shard", "string"),
        ("row", "int64"),
        ("lat", "double"),
        ("lon", "double"),
        ("cell", "int32"),
        ("prob", "float"),
        ("topk_cell", "list<element: int32>"),
        ("topk_prob", "list<element: float>"),
        ("mean_lat", "double"),
        ("mean_lon", "double"),
        ("spread_km", "float"),
        ("entropy", "float"),
        ("meta_number", "int64"),
        ("meta_place.name", "string"),
    ]
    table = pq.ParquetFile(tmp_path / "p.part")
    assert table.schema_arrow.metadata[b"schema_version"] == b"1"
    column = table.metadata.row_group(0).column(3)
    assert (column.compression, column.statistics.min) == ("ZSTD", located.position_deg[:, 0].min())
    rows = table.read().to_pylist()
    assert [row["topk_cell"] for row in rows] == located.topk_cell.tolist()
    assert [row["cell"] for row in rows] == located.topk_cell[:, 0].tolist()
    assert [row["prob"] for row in rows] == located.topk_prob[:, 0].tolist()
    assert [row["lon"] for row in rows] == located.position_deg[:, 1].tolist()
    assert [row["mean_lat"] for row in rows] == located.mean_deg[:, 0].tolist()


def test_errors_are_read_as_they_were_written(tmp_path: Path) -> None:
    errors = [
        RowError("ok\udcff", "a.tar", 3, "decode", "cut off", True),
        RowError("b", "a.tar", 7, "read", "é", False),
    ]

    tables.write_errors(tmp_path / "e.part", errors)

    assert pq.ParquetFile(tmp_path / "e.part").read().to_pylist() == [
        {**dataclasses.asdict(errors[0]), "key": "ok\\udcff"},
        dataclasses.asdict(errors[1]),
    ]


def test_tables_whose_json_differs_in_type_are_read_as_one_without_losing_a_digit(tmp_path: Path) -> None:
    long_id = 2**53 + 1
    metas = [
        {"height": 3, "id": long_id, "place": 7, "same": 1, "first": True},
        {"height": 2.5, "id": 0.5, "place": "Oslo", "same": 2},
        {"height": 4, "id": 8, "place": True, "same": 3, "last": "z"},
    ]
    for index, meta in zip((2, 9, 1_000_000), metas, strict=True):
        samples = [dataclasses.replace(make_samples(UNIT, 1)[0], meta=json.dumps(meta).encode())]
        tables.write_predictions(tmp_path / Path(tables.predictions_path(index)).name, samples, make_located(1))
    # Arrow's own reader takes the types of the first file for those of all.
    with pytest.raises((pa.ArrowException, ValueError)):
        pq.read_table(tmp_path)

    table = tables.read_tables(tmp_path)

    assert table["meta_height"].to_pylist() == [3.0, 2.5, 4.0]
    assert table["meta_id"].to_pylist() == [str(long_id), "0.5", "8"]
    assert table["meta_place"].to_pylist() == ["7", "Oslo", "true"]
    assert table["meta_same"].to_pylist() == [1, 2, 3]
    assert table["meta_first"].to_pylist() == [True, None, None]
    assert table["meta_last"].to_pylist() == [None, None, "z"]
    assert table["row"].type == pa.int64()
    assert table["topk_cell"].type == pa.list_(pa.int32())


def test_a_folder_without_tables_or_with_a_harmed_one_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.parquet"):
        tables.read_tables(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="geoloc verify"):
        tables.read_tables(tmp_path)
