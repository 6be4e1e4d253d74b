"""One type for each column of many tables: from the tables, and from the statistics of their files alike."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.store import metadata
from geoloc_batch.store.columns import Columns, conform, look_at_file, look_at_table

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 7, 0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
)
METAS = st.lists(
    st.lists(st.dictionaries(st.sampled_from(["a", "b.c", "list"]), VALUES, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


def table_of(metas: Sequence[dict[str, Any]]) -> pa.Table:
    arrays = metadata.columns([json.dumps(meta).encode() for meta in metas], is_prefixed=True)
    topk = pa.array([[1, 2]] * len(metas), pa.list_(pa.int32()))
    return pa.table({"row": pa.array(range(len(metas)), pa.int64()), "topk_cell": topk, **arrays})


def on_disk(table: pa.Table, **options: Any) -> pq.ParquetFile:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2, **options)
    return pq.ParquetFile(io.BytesIO(sink.getvalue()))


def joined(tables: Iterable[pa.Table], look: Callable[[pa.Table], tuple[set[str], set[str]]]) -> pa.Table:
    tables, columns = list(tables), Columns()
    for table in tables:
        columns.add(table.schema, *look(table))
    return pa.concat_tables([conform(table, columns.schema()) for table in tables])


def as_arrow_would(tables: Sequence[pa.Table], name: str) -> pa.ChunkedArray:
    """One column as Arrow puts it together; as text where it will not."""
    parts = [table[name] if name in table.column_names else pa.nulls(table.num_rows) for table in tables]
    parts = [pa.nulls(len(part)) if part.null_count == len(part) else part for part in parts]
    try:
        return pa.concat_tables([pa.table({name: part}) for part in parts], promote_options="permissive")[name]
    except pa.ArrowException:
        return pa.chunked_array([part.cast(pa.string()).combine_chunks() for part in map(as_chunked, parts)])


def as_chunked(part: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return part if isinstance(part, pa.ChunkedArray) else pa.chunked_array([part])


@settings(max_examples=150, deadline=None)
@given(metas=METAS)
def test_columns_become_what_arrow_makes_of_them_and_text_where_it_refuses(metas: list[list[dict[str, Any]]]) -> None:
    tables = [table_of(part) for part in metas]
    found = joined(tables, look_at_table)
    for name in found.column_names:
        expected = as_arrow_would(tables, name)
        assert found[name].to_pylist() == expected.to_pylist()
        if expected.null_count < len(expected):
            assert found.schema.field(name).type == expected.type
    assert joined(tables, lambda table: look_at_file(on_disk(table))).equals(found)


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}, {"write_statistics": ["row"]}])
def test_what_a_file_does_not_tell_of_its_columns_is_read(options: dict[str, Any]) -> None:
    metas = [{"wide": 2**53 + 1, "none": None, "small": 2**53}, {"low": -(2**53) - 1}, {"small": -(2**53)}]
    told = {"meta_none"}, {"meta_wide", "meta_low"}
    assert look_at_file(on_disk(table_of(metas), **options)) == look_at_table(table_of(metas)) == told


def test_a_table_without_rows_says_nothing_of_its_columns() -> None:
    tables = [table_of([{"a": "x"}]).slice(0, 0), table_of([{"a": 1}])]
    assert joined(tables, look_at_table)["meta_a"].to_pylist() == [1]
    assert joined(tables, lambda table: look_at_file(on_disk(table)))["meta_a"].to_pylist() == [1]
