"""The samples' json as columns: types, names, and the way back."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.store import metadata
from geoloc_batch.store.features import OWN_COLUMNS

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
JSONS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", "key", "json", "meta_key", "row", ""]), inner, max_size=4)
    ),
    max_leaves=8,
)
METAS = st.one_of(JSONS.map(lambda value: json.dumps(value).encode()), st.binary(max_size=12), st.just(b""))


def of(*values: Any, is_prefixed: bool = False) -> dict[str, pa.Array]:
    return metadata.columns([json.dumps(value).encode() for value in values], is_prefixed=is_prefixed)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 2], pa.int64(), [1, 2]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([1, True], pa.string(), ["1", "true"]),
        ([1, "x", 2.5], pa.string(), ["1", "x", "2.5"]),
        ([7.0, "7.0", 1e16, -0.0, float("nan"), float("inf")], pa.string(),
         ["7", "7.0", "10000000000000000", "0", None, "Infinity"]),
        ([2**53, 0.5], pa.float64(), [2.0**53, 0.5]),
        ([2**53 + 1, 0.5], pa.string(), ["9007199254740993", "0.5"]),
        ([2**63, 1], pa.string(), [str(2**63), "1"]),
        ([-(2**63), 2**63 - 1], pa.int64(), [-(2**63), 2**63 - 1]),
        ([None, None], pa.string(), [None, None]),
        ([[1, {"b": 2}], "x"], pa.string(), ['[1, {"b": 2}]', "x"]),
        ([{}], pa.string(), ["{}"]),
    ],
)  # fmt: skip
def test_a_column_has_the_narrowest_type_that_holds_all_its_values(
    values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    column = of(*({"a": value} for value in values))["a"]

    assert column.type == kind
    assert column.to_pylist() == expected


def test_objects_are_flattened_with_dots_and_absent_members_are_null() -> None:
    columns = of({"a": {"b": {"c": 1}}, "z": 1}, {"a": {"b": {"d": "x"}}})

    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "a.b.c": [1, None],
        "a.b.d": [None, "x"],
        "z": [1, None],
    }
    assert list(columns) == sorted(columns)


@pytest.mark.parametrize("raw", [b"{", b"[1, 2]", b"3", b"\xff", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000])
def test_a_json_that_is_no_object_keeps_its_text(raw: bytes) -> None:
    columns = metadata.columns([raw, b'{"a": 1}', b""], is_prefixed=False)

    assert columns["json"].to_pylist() == [raw.decode(errors="backslashreplace"), None, None]
    assert columns["a"].to_pylist() == [None, 1, None]


def test_reserved_names_are_prefixed_and_stay_apart() -> None:
    value = {"key": 1, "meta_key": 2, "json": 3, "row": 4, "url": 5}

    assert {name: column[0].as_py() for name, column in of(value).items()} == {
        "meta_key": 1,
        "meta_meta_key": 2,
        "meta_json": 3,
        "meta_row": 4,
        "url": 5,
    }
    assert {name: column[0].as_py() for name, column in of(value, is_prefixed=True).items()} == {
        "meta_key": 1,
        "meta_meta_key": 2,
        "meta_meta_json": 3,
        "meta_row": 4,
        "meta_url": 5,
    }


def test_members_that_are_data_do_not_make_a_column_each() -> None:
    metas = [json.dumps({f"id{row}": row}).encode() for row in range(metadata.MAX_COLUMNS + 1)]

    columns = metadata.columns(metas, is_prefixed=False)

    assert list(columns) == ["json"]
    assert columns["json"].to_pylist() == [meta.decode() for meta in metas]


def test_half_of_a_surrogate_pair_is_spelt_out() -> None:
    columns = metadata.columns([rb'{"a\ud800": "\udfff"}'], is_prefixed=False)

    assert columns["a\\ud800"].to_pylist() == ["\\udfff"]


@settings(max_examples=150, deadline=None)
@given(st.lists(METAS, min_size=1, max_size=5), st.booleans())
def test_any_jsons_make_valid_columns_and_survive_the_way_through_embeddings(
    metas: list[bytes], is_prefixed: bool
) -> None:
    first = metadata.columns(metas, is_prefixed=False)
    stored = pa.table({"key": ["k"] * len(metas), "row": list(range(len(metas))), **first})
    stored.validate(full=True)

    restored = metadata.restore(stored, OWN_COLUMNS)

    # Predicting from embeddings writes the same columns as predicting from shards.
    again = metadata.columns(restored, is_prefixed=is_prefixed)
    direct = metadata.columns(metas, is_prefixed=is_prefixed)
    assert [(name, column.type) for name, column in again.items()] == [
        (name, column.type) for name, column in direct.items()
    ]
    for name, column in direct.items():
        assert str(again[name].to_pylist()) == str(column.to_pylist())


def agreed(*values: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(metadata.agreed([json.dumps(value).encode() for value in values]))
    return found


def test_a_location_has_the_members_on_which_its_views_agree() -> None:
    views = [{"lat": 1.5, "heading": h, "a": {"b": 1}, "tags": [1, 2], "who": None} for h in (0, 90)]
    assert agreed(*views) == {"lat": 1.5, "heading": None, "a.b": 1, "tags": "[1, 2]", "who": None}
    assert agreed({"a": 1, "b": 2}, {"a": 1}) == {"a": 1, "b": None}
    assert agreed({"a": 1}, {"a": True}, {"a": 1}) == {"a": None}
    assert agreed({"a": 1}, {"a": 1.0, "b": 0}) == {"a": 1, "b": None}


def test_a_single_view_and_views_that_are_alike_keep_their_json_as_it_is() -> None:
    assert metadata.agreed([b"{broken"]) == b"{broken"
    assert metadata.agreed([b'{"a": [1]}'] * 3) == b'{"a": [1]}'
    assert json.loads(metadata.agreed([b"", b'{"a": 1}', b"{broken"])) == {"a": None}


@given(st.lists(METAS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_what_views_agree_on_is_in_each_of_them(metas: list[bytes]) -> None:
    flats = [metadata.flatten(meta) or {} for meta in metas]
    for name, value in (metadata.flatten(metadata.agreed(metas)) or {}).items():
        assert value is None or value != value or all(flat[name] == value for flat in flats)
