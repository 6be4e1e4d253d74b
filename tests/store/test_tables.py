"""What the files of a unit hold, and that other tools read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_located, make_samples, make_units, run_rank

from geoloc_batch.errors import InputError
from geoloc_batch.records import RowError, Sample, Unit
from geoloc_batch.store import tables
from geoloc_batch.store.features import plan_embeddings, read_features

UNIT = make_units(1)[0]
# float16 rows of length 1: half a unit in the last place of the largest value, over the row.
FEATURE_TOLERANCE = 1e-3


def write_pair(folder: Path, samples: list[Sample], features_ND: np.ndarray, index: int = 0) -> Path:
    npy, parquet = (folder / path for path in tables.embedding_paths(index))
    npy.parent.mkdir(exist_ok=True)
    parquet.parent.mkdir(exist_ok=True)
    tables.write_embeddings(npy, parquet, samples, features_ND)
    return npy


def make_features(rows: int, width: int = 17, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, width)) * 13).astype(np.float32)


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


def test_features_come_back_with_their_lengths_and_their_samples(tmp_path: Path) -> None:
    samples, features_ND = make_samples(UNIT, 13), make_features(13)
    samples = [dataclasses.replace(sample, row=sample.row * 3) for sample in samples]
    write_pair(tmp_path, samples, features_ND, index=4)
    (unit,) = plan_embeddings(tmp_path)
    stored = read_features(unit.source)

    chunks = list(stored.chunks(unit, 5))

    assert [len(features) for features, _ in chunks] == [5, 5, 3]
    read_ND = np.concatenate([features for features, _ in chunks])
    assert read_ND.dtype == np.float32
    np.testing.assert_array_equal(read_ND, stored.features_ND)
    error_N = np.linalg.norm(read_ND - features_ND, axis=1) / np.linalg.norm(features_ND, axis=1)
    assert error_N.max() < FEATURE_TOLERANCE
    read = [sample for _, of_chunk in chunks for sample in of_chunk]
    assert [(s.unit, s.shard, s.row, s.key) for s in read] == [(unit, s.shard, s.row, s.key) for s in samples]
    assert [json.loads(sample.meta)["place.name"] for sample in read] == ["é"] * 13


def test_an_output_of_embed_is_planned_in_the_order_of_its_units(tmp_path: Path) -> None:
    run_rank(tmp_path, 3)

    units = plan_embeddings(tmp_path)

    assert [(unit.index, unit.kind, Path(unit.source).name) for unit in units] == [
        (index, "embeddings", f"img_emb_{index:06d}.npy") for index in range(3)
    ]
    assert units[0].num_bytes == Path(units[0].source).stat().st_size


def test_a_folder_of_clip_retrieval_is_read_when_its_rows_are_said_to_be_normalised(tmp_path: Path) -> None:
    rows_ND = make_features(4)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    for number in (0, 2, 10):
        (tmp_path / "img_emb").mkdir(exist_ok=True)
        (tmp_path / "metadata").mkdir(exist_ok=True)
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", rows_ND.astype(np.float16))
        table = pa.table({"image_path": ["a", "b", "c", "d"], "caption": ["x", None, "y", "z"]})
        pq.write_table(table, tmp_path / f"metadata/metadata_{number}.parquet")

    units = plan_embeddings(tmp_path)
    assert [Path(unit.source).name for unit in units] == ["img_emb_0.npy", "img_emb_2.npy", "img_emb_10.npy"]
    with pytest.raises(InputError, match="emb_norm"):
        read_features(units[0].source)
    stored = read_features(units[0].source, normalised=True)

    np.testing.assert_allclose(stored.features(1, 3), rows_ND[1:3], atol=FEATURE_TOLERANCE)
    samples = stored.samples(units[0], 1, 3)
    assert [(s.shard, s.row, s.key, json.loads(s.meta)) for s in samples] == [
        (units[0].source, 1, "b", {"caption": None}),
        (units[0].source, 2, "c", {"caption": "y"}),
    ]


def test_pairs_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    npy = write_pair(tmp_path, make_samples(UNIT, 4), make_features(4))
    parquet = tmp_path / "metadata/metadata_000000.parquet"
    whole = npy.read_bytes()

    npy.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="cut off"):
        read_features(npy)
    npy.write_bytes(b"no array")
    with pytest.raises(InputError, match=r"img_emb_000000\.npy cannot be read"):
        read_features(npy)
    np.save(npy, np.zeros((3, 17), np.float16))
    with pytest.raises(InputError, match=r"3 rows and .* 4"):
        read_features(npy)
    np.save(npy, np.zeros(3, np.float16))
    with pytest.raises(InputError, match="row of floats"):
        read_features(npy)
    npy.write_bytes(whole)
    parquet.write_bytes(parquet.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"metadata_000000\.parquet cannot be read"):
        read_features(npy)
    parquet.unlink()
    with pytest.raises(InputError, match="to its end"):
        plan_embeddings(tmp_path)
    with pytest.raises(InputError, match="holds no embeddings"):
        plan_embeddings(tmp_path / "nowhere")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    npy = write_pair(tmp_path, make_samples(UNIT, 100), make_features(100))
    stored = read_features(npy)
    npy.write_bytes(npy.read_bytes()[:2000])

    with pytest.raises(InputError, match="become shorter"):
        stored.features(50, 100)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_embedding_reader_gives_the_rows_in_the_order_of_the_metadata(tmp_path: Path) -> None:
    from embedding_reader import EmbeddingReader

    expected = []
    for index, rows in enumerate([5, 1, 8]):
        features_ND = make_features(rows, seed=index)
        unit = Unit(index=index, kind="shard", source=f"{index}.tar")
        write_pair(tmp_path, make_samples(unit, rows), features_ND, index)
        expected += [
            (unit.source, row, vector)
            for row, vector in enumerate(features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True))
        ]

    plain = EmbeddingReader(str(tmp_path / "img_emb"), file_format="npy")
    paired = EmbeddingReader(
        str(tmp_path / "img_emb"),
        file_format="parquet_npy",
        metadata_folder=str(tmp_path / "metadata"),
        meta_columns=["shard", "row"],
    )

    assert (plain.count, plain.dimension) == (14, 17)
    plain_rows = np.concatenate([rows for rows, _ in plain(batch_size=4, show_progress=False)])
    batches = list(paired(batch_size=4, show_progress=False))
    names = [pair for _, meta in batches for pair in zip(meta["shard"], meta["row"], strict=True)]
    assert names == [(shard, row) for shard, row, _ in expected]
    vectors = np.stack([vector for *_, vector in expected])
    np.testing.assert_allclose(plain_rows, vectors, atol=FEATURE_TOLERANCE)
    np.testing.assert_allclose(np.concatenate([rows for rows, _ in batches]), vectors, atol=FEATURE_TOLERANCE)
