"""Photos that stand in several embedding pairs are refused, and such as only look so are not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_features, write_pair

from geoloc_batch.errors import InputError
from geoloc_batch.records import Sample, Unit
from geoloc_batch.store.doubled import refuse_doubled
from geoloc_batch.store.features import metadata_path

Photo = tuple[str, int, str]


def write(folder: Path, *pairs: Sequence[Photo]) -> list[Path]:
    """Pairs of photos by shard, row and key."""
    folder.mkdir(exist_ok=True)
    npys = []
    for index, photos in enumerate(pairs):
        unit = Unit(index=index, kind="embeddings", source="x")
        samples = [Sample(unit, *photo, b"") for photo in photos]
        npys.append(write_pair(folder, samples, make_features(len(samples), 3), index))
    return npys


def test_photos_of_two_pairs_are_counted_and_the_pairs_named(tmp_path: Path) -> None:
    npys = write(
        tmp_path,
        [("a", 0, "k0"), ("a", 1, "k1"), ("b", 0, "k0")],
        [("c", 0, "k0"), ("b", 5, "k5")],
        [("b", 0, "k0"), ("a", 1, "k1"), ("a", 2, "k2")],
        [("a", 1, "k1")],
    )
    with pytest.raises(InputError, match=r"2 photos, of 2 shards, .* those of a in .*000000.npy and .*000002.npy: two"):
        refuse_doubled(npys)
    refuse_doubled(npys[:2])
    refuse_doubled(npys, limit=5)
    with pytest.raises(InputError, match="1 photos, of 1 shards"):
        refuse_doubled(npys, limit=6)


def test_one_shard_in_two_pairs_and_equal_rows_of_other_keys_are_no_doubles(tmp_path: Path) -> None:
    refuse_doubled(write(tmp_path / "a", [("a", 0, "k0"), ("a", 1, "k1")], [("a", 2, "k2"), ("b", 0, "k0")]))
    refuse_doubled(write(tmp_path / "b", [("a", 0, "k0")], [("a", 0, "k1")]))


def test_rows_without_a_key_are_compared_between_folders_alone(tmp_path: Path) -> None:
    """Other tools count from 0 in each pair of a folder."""
    npys = write(tmp_path / "a", [("a", 0, "0"), ("a", 1, "1")], [("a", 0, "0"), ("a", 1, "1")])
    refuse_doubled(npys)
    for npy in npys:
        table = pq.read_table(metadata_path(npy))
        nulls = pa.nulls(2, pa.string())
        pq.write_table(table.drop_columns(["image_path"]).set_column(0, "key", nulls), metadata_path(npy))
    refuse_doubled(npys)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="2 photos, of 1 shards"):
        refuse_doubled([npys[0], tmp_path / "b" / "img_emb" / npys[0].name])


def test_pairs_that_do_not_tell_their_photos_apart_are_left_alone(tmp_path: Path) -> None:
    npys = write(tmp_path, [("a", 0, "k"), ("a", 0, "k")], [("a", 0, "k")], [("a", 1, "k")])
    refuse_doubled(npys)
    pq.write_table(pq.read_table(metadata_path(npys[2])).drop_columns(["row"]), metadata_path(npys[2]))
    refuse_doubled(npys)
    metadata_path(npys[1]).write_bytes(b"no table")
    with pytest.raises(InputError, match=r"metadata_000001\.parquet cannot be read"):
        refuse_doubled(npys)
