"""Columns: one type for each column of many tables.

The samples' json may give a column another type in every shard. Integers and doubles become doubles where no digit is
lost by it, all else that does not go together becomes text. A column without a single value says nothing of its type.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# Integers up to here are doubles as well.
MAX_EXACT = 2**53


class Columns:
    """Gathers the columns of tables, one table after the other, in the order in which they first come."""

    def __init__(self) -> None:
        self._first: dict[str, pa.DataType] = {}
        self._found: dict[str, pa.DataType] = {}
        self._wide: set[str] = set()

    def add(self, schema: pa.Schema, empty: Collection[str], wide: Collection[str]) -> None:
        """Note a table.

        Args:
            schema: of it.
            empty: its columns without a value.
            wide: its columns with an integer that a double need not hold.
        """
        for field in schema:
            self._first.setdefault(field.name, field.type)
            if field.name not in empty:
                self._found[field.name] = _common(self._found.get(field.name, field.type), field.type)
        self._wide.update(wide)

    def schema(self) -> pa.Schema:
        """Of all tables together."""
        return pa.schema([(name, self._type(name)) for name in self._first])

    def _type(self, name: str) -> pa.DataType:
        found = self._found.get(name, self._first[name])
        return pa.string() if pa.types.is_floating(found) and name in self._wide else found


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except pa.ArrowException:
        return pa.string()


def look_at_table(table: pa.Table) -> tuple[set[str], set[str]]:
    """The columns of a table that are empty, and those that are wide; see Columns.add."""
    empty = {name for name in table.column_names if table[name].null_count == table.num_rows}
    return empty, {field.name for field in table.schema if _is_wide(table, field)}


def _is_wide(table: pa.Table, field: pa.Field) -> bool:
    if not pa.types.is_integer(field.type) or field.type.bit_width < 64:
        return False
    found = pc.min_max(table[field.name]).as_py()
    return _exceeds(found["min"], found["max"])


def _exceeds(least: int | None, most: int | None) -> bool:
    return least is not None and most is not None and (least < -MAX_EXACT or most > MAX_EXACT)


def look_at_file(file: pq.ParquetFile) -> tuple[set[str], set[str]]:
    """As look_at_table, from a file's statistics; what they do not tell is read."""
    schema, about = file.schema_arrow, file.metadata
    names = set(schema.names)
    empty, wide, untold = set(names), set[str](), set[str]()
    for group in range(about.num_row_groups):
        chunks = about.row_group(group)
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            # Of a list the statistics are those of its members: a list that is there may have none.
            name = chunk.path_in_schema
            if name not in names:
                empty.discard(name.split(".")[0])
                continue
            told = chunk.statistics
            if told is None or not told.has_null_count:
                untold.add(name)
            elif told.null_count < chunks.num_rows:
                empty.discard(name)
                if chunk.physical_type == "INT64" and not told.has_min_max:
                    untold.add(name)
                elif chunk.physical_type == "INT64" and _exceeds(told.min, told.max):
                    wide.add(name)
    if untold:
        read = look_at_table(file.read(sorted(untold)))
        empty, wide = (empty - untold) | read[0], (wide - untold) | read[1]
    return empty, wide


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns of Columns.schema; those that it does not have are null.

    Raises:
        pa.ArrowException: it is none of the tables that the schema was made from.
    """
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
