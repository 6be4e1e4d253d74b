"""Locations: the views of one place found wherever they stand, numbered, and cut into units."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import make_features, write_pair

from geoloc_batch.errors import InputError
from geoloc_batch.records import Sample, Unit
from geoloc_batch.store import locations, metadata
from geoloc_batch.store.features import metadata_path, plan_embeddings, read_features
from geoloc_batch.store.locations import Locations, index_locations, location_name, plan_locations

ABSENT = "absent"
WIDTH = 3


def write_pairs(folder: Path, *pairs: Sequence[Any], field: str = "place") -> list[Path]:
    """Embedding pairs whose photos have these values in a member of their json; ABSENT has no such member."""
    folder.mkdir(exist_ok=True)
    npys = []
    for index, values in enumerate(pairs):
        unit = Unit(index=index, kind="shard", source=f"{index}.tar")
        metas = [{"n": row} | ({} if value is ABSENT else {field: value}) for row, value in enumerate(values)]
        samples = [
            Sample(unit, unit.source, row, f"{index}/{row}", json.dumps(meta).encode())
            for row, meta in enumerate(metas)
        ]
        npys.append(write_pair(folder, samples, make_features(len(values), WIDTH, seed=index), index))
    return npys


def views_of(found: Locations) -> dict[str, list[tuple[int, int]]]:
    """(pair, row) of each view, by location."""
    views = list(zip(found.view_pair_V.tolist(), found.view_row_V.tolist(), strict=True))
    return {
        name: views[found.offset_L1[number] : found.offset_L1[number + 1]]
        for number, name in enumerate(found.names.to_pylist())
    }


def test_views_of_one_location_are_found_in_all_pairs_and_numbered_by_first_appearance(tmp_path: Path) -> None:
    npys = write_pairs(tmp_path, ["b", "a", "b"], ["a", ABSENT, "c", "b"], ["c"])
    found = index_locations(npys, "place")
    assert list(views_of(found).items()) == [
        ("b", [(0, 0), (0, 2), (1, 3)]),
        ("a", [(0, 1), (1, 0)]),
        ("c", [(1, 2), (2, 0)]),
    ]
    assert [rows.tolist() for rows in found.location_of] == [[0, 1, 0], [1, -1, 2, 0], [2]]
    assert (len(found), found.num_missing) == (3, 1)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (7, "7"), (7.0, "7"), ("7", "7"), (7.5, "7.5"), (True, "true"), ("x y", "x y"), (-3, "-3"),
        (1e16, "10000000000000000"), ("7.0", "7.0"), (float("inf"), "Infinity"),
        ("", None), (None, None), (float("nan"), None),
    ],
)  # fmt: skip
def test_a_location_is_named_alike_in_a_json_and_in_a_table(value: Any, name: str | None, tmp_path: Path) -> None:
    assert location_name(value) == name
    npys = write_pairs(tmp_path, [value, "7", "1.5"] if isinstance(value, str) else [value, 1.5], ["k"])
    if isinstance(value, bool):
        npys = write_pairs(tmp_path, [value], ["k"])
    assert (index_locations(npys, "place").names.to_pylist()[0] == name) == (name is not None)
    assert (index_locations(npys, "place").location_of[0][0] < 0) == (name is None)


NAMES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["", "7", "7.0", "x"])


SIMILAR = st.sampled_from([7, 7.0, "7", 10**16, 1e16, True])


@given(st.lists(NAMES, min_size=1, max_size=5), st.lists(SIMILAR, max_size=4))
@settings(deadline=None, max_examples=25)
def test_in_whatever_company_a_location_has_the_name_that_it_has_alone(values: list[Any], more: list[Any]) -> None:
    named = [location_name(value) for value in values + more]
    with tempfile.TemporaryDirectory() as folder:
        npys = write_pairs(Path(folder), values + more, ["sure"])
        found = index_locations(npys, "place")
    names = [None if number < 0 else found.names[number].as_py() for number in found.location_of[0].tolist()]
    assert names == named


def test_whole_and_broken_numbers_of_different_shards_name_one_location(tmp_path: Path) -> None:
    npys = write_pairs(tmp_path, [7, 8], [7, 2.5], ["7", "eight"])
    assert views_of(index_locations(npys, "place"))["7"] == [(0, 0), (1, 0), (2, 0)]


def test_a_nested_member_and_one_with_a_reserved_name_can_group(tmp_path: Path) -> None:
    nested = write_pairs(tmp_path / "a", [{"id": 1}, {"id": 2}, {"id": 1}])
    assert views_of(index_locations(nested, "place.id")) == {"1": [(0, 0), (0, 2)], "2": [(0, 1)]}
    reserved = write_pairs(tmp_path / "b", ["x", "x"], field="key")
    assert views_of(index_locations(reserved, "key")) == {"x": [(0, 0), (0, 1)]}


def test_a_json_that_is_kept_as_text_is_looked_into(tmp_path: Path) -> None:
    unit = Unit(index=0, kind="shard", source="0.tar")
    wide = [{"place": "p", **{f"m{n}": n for n in range(metadata.MAX_COLUMNS)}}, {"place": "q"}, {"place": "p"}]
    metas = [json.dumps(meta).encode() for meta in wide]
    samples = [Sample(unit, "0.tar", row, str(row), meta) for row, meta in enumerate([*metas, b"{no json", b""])]
    npy = write_pair(tmp_path, samples, make_features(5, WIDTH))
    assert pq.read_schema(metadata_path(npy)).names[-1] == "json"
    assert index_locations([npy], "place").location_of[0].tolist() == [0, 1, 0, -1, -1]


def test_a_field_that_no_photo_has_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    npys = write_pairs(tmp_path, ["a"], ["b"])
    with pytest.raises(InputError, match=r"has 'plaza' in its json.*there are n, place: name .* --group-by"):
        index_locations(npys, "plaza")
    with pytest.raises(InputError, match="no embeddings were given"):
        index_locations([], "place")
    metadata_path(npys[1]).write_bytes(b"no table")
    with pytest.raises(InputError, match=r"metadata_000001.parquet cannot be read"):
        index_locations(npys, "place")


def test_tables_of_other_tools_are_read_too(tmp_path: Path) -> None:
    npys = write_pairs(tmp_path, ["x", "y", "x"])
    table = pq.read_table(metadata_path(npys[0]))
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        changed = table.set_column(table.column_names.index("place"), "place", table["place"].cast(kind))
        pq.write_table(changed, metadata_path(npys[0]))
        assert views_of(index_locations(npys, "place")) == {"x": [(0, 0), (0, 2)], "y": [(0, 1)]}


def test_a_limit_takes_the_first_rows_alone(tmp_path: Path) -> None:
    npys = write_pairs(tmp_path, ["a", "b", "a"], ["b", "c", "a"])
    found = index_locations(npys, "place", limit=4)
    assert views_of(found) == {"a": [(0, 0), (0, 2)], "b": [(0, 1), (1, 0)]}
    assert sum(map(len, found.location_of)) == 4


def test_the_hash_is_that_of_field_pairs_and_members(tmp_path: Path) -> None:
    first = index_locations(write_pairs(tmp_path / "a", ["a", "b"], ["a"]), "place").sha256
    assert index_locations(write_pairs(tmp_path / "same", ["a", "b"], ["a"]), "place").sha256 == first
    others = [
        index_locations(write_pairs(tmp_path / "n", ["a", "c"], ["a"]), "place"),
        index_locations(write_pairs(tmp_path / "m", ["a", "b"], ["b"]), "place"),
        index_locations(write_pairs(tmp_path / "o", ["a", "b", "a"]), "place"),
        index_locations(write_pairs(tmp_path / "p", ["a", "b"], ["a", "a"]), "place"),
        index_locations(write_pairs(tmp_path / "q", ["a", "b"], ["a"], field="spot"), "spot"),
        index_locations(write_pairs(tmp_path / "r", ["a", "b"], ["a"])[:1], "place"),
    ]
    assert len({first, *(other.sha256 for other in others)}) == 1 + len(others)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.booleans())
@settings(deadline=None, max_examples=30)
def test_units_hold_whole_locations_each_once_and_about_as_many_views(counts: list[int], has_missing: bool) -> None:
    offset = np.cumsum([0, *counts])
    rows = np.repeat(np.arange(len(counts)), counts)
    found = Locations(
        npys=(Path("img_emb_0.npy"),),
        field="place",
        names=pa.array([str(n) for n in range(len(counts))]),
        location_of=(np.concatenate([rows, [-1] * has_missing]).astype(np.int64),),
        view_pair_V=np.zeros(len(rows), np.int32),
        view_row_V=np.arange(len(rows)),
        offset_L1=offset,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locations, "BUCKET_VIEWS", 10)
        units = plan_locations("emb", found, row_bytes=8)
    cut = [unit for unit in units if unit.start != unit.stop]
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [number for unit in cut for number in range(unit.start, unit.stop or 0)] == list(range(len(counts)))
    assert [unit.start for unit in units if unit not in cut] == [len(counts)] * has_missing
    for unit in cut:
        num_views = offset[unit.stop] - offset[unit.start]
        assert num_views <= 10
        assert unit.num_bytes == 8 * num_views
        assert unit == units[-1] or unit is cut[-1] or num_views + counts[unit.stop or 0] > 10


def test_a_location_with_more_views_than_a_unit_is_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "BUCKET_VIEWS", 2)
    found = index_locations(write_pairs(tmp_path, ["a", "b", "b", "b", "b", "c"]), "place")
    units = plan_locations("emb", found, row_bytes=6)
    assert [(unit.start, unit.stop, unit.num_bytes) for unit in units] == [(0, 1, 6), (1, 2, 24), (2, 3, 6)]


def test_rows_in_any_order_are_the_rows_one_by_one(tmp_path: Path) -> None:
    write_pairs(tmp_path, list(range(9)))
    (unit,) = plan_embeddings(tmp_path)
    stored = read_features(unit.source)
    rows = np.array([5, 6, 7, 0, 8, 3, 2, 2])
    np.testing.assert_array_equal(stored.features_at(rows), stored.features_ND[rows])
    folder = Unit(index=0, kind="locations", source=str(tmp_path))
    everyone = stored.samples(unit)
    for sample, row in zip(stored.samples_at(folder, rows), rows.tolist(), strict=True):
        expected = everyone[row]
        assert (sample.shard, sample.row, sample.key, sample.meta) == (
            expected.shard, expected.row, expected.key, expected.meta,
        )  # fmt: skip
    assert stored.features_at(np.empty(0, np.int64)).shape == (0, WIDTH)


def test_rows_without_our_columns_are_named_by_the_pair_wherever_they_are_read_from(tmp_path: Path) -> None:
    (npy,) = write_pairs(tmp_path, ["a", "b", "a"])
    pq.write_table(pq.read_table(metadata_path(npy)).drop_columns(["shard", "row"]), metadata_path(npy))
    (unit,) = plan_embeddings(tmp_path)
    stored = read_features(npy)
    folder = Unit(index=0, kind="locations", source=str(tmp_path))
    found = [(sample.shard, sample.row) for sample in stored.samples_at(folder, np.array([2, 0]))]
    assert found == [(sample.shard, sample.row) for sample in (stored.samples(unit)[2], stored.samples(unit)[0])]
