"""Embeddings are read back as they were written, by us or by another tool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_features, make_located, make_samples, make_units, run_rank, write_pair

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit
from geoloc_batch.store import tables
from geoloc_batch.store.features import plan_embeddings, read_features

UNIT = make_units(1)[0]
# float16 rows of length 1: half a unit in the last place of the largest value, over the row.
FEATURE_TOLERANCE = 1e-3


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


FOREIGN_IDENTITIES: dict[str, tuple[pa.Array, pa.Array]] = {
    "equal rows": (pa.array(["s"] * 4), pa.array([5] * 4)),
    "rows as text": (pa.array(["s"] * 4), pa.array(["0", "1", "2", "3"])),
    "fractions": (pa.array(["s"] * 4), pa.array([0.0, 1.0, 2.0, 3.5])),
    "shards as numbers": (pa.array([0, 1, 2, 3]), pa.array([0, 1, 2, 3])),
    "shards as bytes": (pa.array([b"a", b"b", b"c", b"\xff"]), pa.array([0, 1, 2, 3])),
    "no shards": (pa.nulls(4), pa.array([0, 1, 2, 3])),
    "a shard missing": (pa.array(["s", None, "s", "s"]), pa.array([0, 1, 2, 3])),
    "a row missing": (pa.array(["s"] * 4), pa.array([0, 1, None, 3])),
    "huge rows": (pa.array(["s"] * 4), pa.array([0, 1, 2, 2**64 - 1], pa.uint64())),
}


def write_foreign(folder: Path, **columns: pa.Array) -> Path:
    npy, parquet = (folder / path for path in tables.embedding_paths(0))
    npy.parent.mkdir()
    parquet.parent.mkdir()
    np.save(npy, make_features(4).astype(np.float16))
    pq.write_table(pa.table(columns), parquet)
    return npy


@pytest.mark.parametrize("what", FOREIGN_IDENTITIES)
def test_columns_of_other_tools_with_the_names_of_ours_are_metadata_and_the_position_counts(
    tmp_path: Path, what: str
) -> None:
    shard, row = FOREIGN_IDENTITIES[what]
    npy = write_foreign(tmp_path, image_path=pa.array(list("abcd")), shard=shard, row=row, emb_norm=pa.array([7.0] * 4))
    (unit,) = plan_embeddings(tmp_path)

    samples = read_features(npy).samples(unit)
    tables.write_predictions(tmp_path / "p.part", samples, make_located(4))

    table = pq.ParquetFile(tmp_path / "p.part").read()
    assert table["key"].to_pylist() == list("abcd")
    assert table["shard"].to_pylist() == [str(npy)] * 4
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    kept = [str(value) if isinstance(value, bytes) else value for value in shard.to_pylist()]
    assert table["meta_shard"].to_pylist() == kept
    assert "meta_row" in table.column_names


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_rows_of_several_shards_in_any_order_keep_their_names_and_their_order(
    tmp_path: Path, kind: pa.DataType
) -> None:
    shards, rows = ["b.tar", "a.tar", "b.tar", "a.tar"], [7, 7, 3, 0]
    write_foreign(
        tmp_path, key=pa.array(list("wxyz")), shard=pa.array(shards, kind), row=pa.array(rows, pa.int32()),
        emb_norm=pa.array([7.0] * 4),
    )  # fmt: skip
    (unit,) = plan_embeddings(tmp_path)

    samples = read_features(unit.source).samples(unit)
    tables.write_predictions(tmp_path / "p.part", samples, make_located(4))

    table = pq.ParquetFile(tmp_path / "p.part").read()
    assert table["shard"].to_pylist() == shards
    assert table["row"].to_pylist() == rows
    assert table["key"].to_pylist() == list("wxyz")


def test_keys_of_other_tools_become_text(tmp_path: Path) -> None:
    npy = write_foreign(
        tmp_path, image_path=pa.array([b"a", b"\xff", None, b"d"]), emb_norm=pa.array([7.0, None, 7, 7])
    )
    (unit,) = plan_embeddings(tmp_path)
    stored = read_features(npy)

    assert [sample.key for sample in stored.samples(unit)] == ["a", "\\xff", "2", "d"]
    assert np.isnan(stored.features_ND).any(axis=1).tolist() == [False, True, False, False]


def test_lengths_that_are_no_numbers_and_columns_that_stand_twice_are_refused_by_name(tmp_path: Path) -> None:
    npy = write_foreign(tmp_path, emb_norm=pa.array(["7"] * 4))
    parquet = tmp_path / "metadata/metadata_000000.parquet"
    with pytest.raises(InputError, match=r"emb_norm in .*metadata_000000\.parquet .* holds string"):
        read_features(npy)
    pq.write_table(pa.Table.from_arrays([pa.array([7.0] * 4)] * 2, ["emb_norm", "emb_norm"]), parquet)
    with pytest.raises(InputError, match="several columns named emb_norm"):
        read_features(npy)


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
