"""CSV and Parquet tables that list photos, or hold them. Read by the row and by small batches: memory stays flat."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from geoloc_batch.errors import InputError
from geoloc_batch.stream.packing.config import PackConfig
from geoloc_batch.stream.packing.meta import portable_key, split_extension
from geoloc_batch.stream.packing.sources import Photo, file_obstacle

_IMAGE_COLUMNS = ("image", "bytes", "image_bytes")
_ROWS_WITH_PHOTOS, _ROWS_OF_NAMES = 32, 4096

# No leading zeros and no plus sign: "007" is a name, not a number.
_INT = re.compile(r"-?(0|[1-9]\d{0,17})")
_FLOAT = re.compile(r"-?(0|[1-9]\d*)?(\.\d*)?([eE][+-]?\d{1,3})?")
_Kind = Literal["int", "float", "bool", "text"]


def table_photo(table: Path, where: str, row: dict[str, Any], path: object, key: object, data: bytes | None) -> Photo:
    """A photo from one row.

    Args:
        table: the table's file; relative paths start at its folder.
        where: names the row in messages.
        row: the columns for the photo's json.
        path: what the path column has, None without one.
        key: what the key column has, None without one.
        data: the photo's bytes where the table holds them.
    Raises:
        InputError: the key is empty.
    """
    path_text = "" if path is None else str(path)
    meta = dict(row)
    if key is not None:
        name = portable_key(str(key))
        if not name:
            raise InputError(
                f"{where}: the key {str(key)!r} names nothing; fill the column, or choose one by --key-column"
            )
        # What had to be changed for the tar's sake stays findable.
        meta.update({"original_key": str(key)} if name != str(key) else {})
    else:
        name = portable_key(split_extension(_below(table.parent, path_text.replace("\\", "/")))[0])
    file = None
    if data is None and path_text:
        file = table.parent / path_text
        if "\\" in path_text and file_obstacle(file):
            file = table.parent / path_text.replace("\\", "/")
    return Photo(where=where, path=path_text, key=name, file=file, data=data, meta=meta)


def _below(folder: Path, path: str) -> str:
    """An absolute path below the table's folder counts from there."""
    try:
        return Path(path).relative_to(folder.absolute()).as_posix() if path.startswith("/") else path
    except ValueError:
        return path


class CsvTable:
    """A CSV (comma or semicolon, told by its header) or TSV with a column of paths.

    A column is of numbers, or of true and false, if all its values are; else it is text, so that "007" stays "007".
    """

    def __init__(self, table: Path, config: PackConfig) -> None:
        self.table = table
        self.config = config
        self.ignored: Counter[str] = Counter()

    def photos(self, *, content: bool) -> Iterator[Photo]:
        """The table's rows in order."""
        key_column = _key_column(self.table, self.columns, self.config)
        kinds = self.kinds if content else {}
        for line, row in self._rows():
            meta = {name: _typed(row[name], kinds[name]) for name in kinds if name not in (self._path, key_column)}
            key = row.get(key_column, "") if key_column else None
            where = f"{self.table}, line {line}"
            yield table_photo(self.table, where, meta, row.get(self._path, ""), key, None)

    @cached_property
    def columns(self) -> list[str]:
        """The header.

        Raises:
            InputError: it is empty, names a column twice, or lacks the column of paths.
        """
        with self._reader() as reader:
            columns: list[str] = next(reader, [])
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise InputError(f"{self.table} has two columns named {twice!r}; rename one")
        if self._path not in columns:
            raise _no_photos(self.table, columns, self._path)
        return columns

    @cached_property
    def kinds(self) -> dict[str, _Kind]:
        """What each column's values are, by looking at all of them."""
        open_kinds: dict[str, list[_Kind]] = {name: ["int", "float", "bool"] for name in self.columns}
        for _, row in self._rows():
            for name, kinds in open_kinds.items():
                if kinds and row.get(name):
                    kinds[:] = [kind for kind in kinds if _is_kind(row[name], kind)]
        return {name: (kinds[0] if kinds else "text") for name, kinds in open_kinds.items()}

    @property
    def _path(self) -> str:
        return self.config.path_column

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        columns = self.columns
        with self._reader() as reader:
            next(reader, None)
            for values in reader:
                if len(values) > len(columns):
                    found = f"{len(values)} values for {len(columns)} columns"
                    raise InputError(
                        f"{self.table}, line {reader.line_num} has {found}; quote what holds the separator"
                    )
                # A blank line is no row.
                if values:
                    missing = [""] * (len(columns) - len(values))
                    yield reader.line_num, dict(zip(columns, [*values, *missing], strict=True))

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        try:
            with self.table.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                file.seek(0)
                separator = max(",;\t", key=header.count)
                yield csv.reader(file, delimiter=separator, strict=True)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.table} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        except csv.Error as error:
            raise InputError(f"{self.table} cannot be read as CSV: {error}") from None
        except OSError as error:
            raise InputError(f"{self.table} cannot be read: {error.strerror}") from None


def _is_kind(text: str, kind: _Kind) -> bool:
    if kind == "bool":
        return text.lower() in ("true", "false")
    if text.lower() == "nan":
        return True
    if kind == "int":
        return _INT.fullmatch(text) is not None
    return any(digit.isdigit() for digit in text) and _FLOAT.fullmatch(text) is not None


def _typed(text: str, kind: _Kind) -> bool | int | float | str | None:
    if not text or (kind in ("int", "float") and text.lower() == "nan"):
        return None
    if kind == "bool":
        return text.lower() == "true"
    return int(text) if kind == "int" else float(text) if kind == "float" else text


class ParquetTable:
    """A Parquet with a column of paths, of image bytes, or of Hugging Face's struct {bytes, path}.

    Other binary columns do not go into the json; `ignored` names them.
    """

    def __init__(self, table: Path, config: PackConfig) -> None:
        self.table = table
        self.config = config
        self.ignored: Counter[str] = Counter()

    def photos(self, *, content: bool) -> Iterator[Photo]:
        """The table's rows in order."""
        columns, image = self.columns
        key_column = _key_column(self.table, list(columns), self.config)
        path_column = self.config.path_column if self.config.path_column in columns else ""
        binary = [name for name, kind in columns.items() if "binary" in kind and name != image]
        self.ignored = Counter({f"column {name}": 1 for name in binary})
        names = [name for name in (path_column, key_column) if name]
        wanted = [name for name in columns if name not in binary] if content else [*names, *self._path_leaf(image)]
        for row_number, row in self._rows(wanted, _ROWS_WITH_PHOTOS if content and image else _ROWS_OF_NAMES):
            data, image_path = _image_parts(row.pop(image, None)) if image else (None, None)
            path = row.pop(path_column, None) if path_column else None
            path = image_path if path is None else path
            key = row.pop(key_column) if key_column else None
            key = "" if key_column and key is None else key
            if image and not content:
                # The bytes are not looked at yet: whether they are there shows when the row is read.
                data = b""
            yield table_photo(self.table, f"{self.table}, row {row_number}", row, path, key, data)

    @cached_property
    def columns(self) -> tuple[dict[str, str], str]:
        """(columns and their types, the column with the photos or "").

        Raises:
            InputError: a column that was asked for is not there, or none tells where the photos are.
        """
        with self._file() as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
        given = self.config.image_column
        if given and "binary" not in columns.get(given, ""):
            raise InputError(f"{self.table} has no column {given!r} of image bytes; it has {_listed(columns)}")
        image = given or next((name for name in _IMAGE_COLUMNS if "binary" in columns.get(name, "")), "")
        if not image and self.config.path_column not in columns:
            raise _no_photos(self.table, list(columns), self.config.path_column)
        return columns, image

    def _path_leaf(self, image: str) -> list[str]:
        """The struct's path can be read without its bytes."""
        kind = self.columns[0].get(image, "")
        return [f"{image}.path"] if kind.startswith("struct<") and "path: string" in kind else []

    def _rows(self, columns: list[str], batch_rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
        row_number = 0
        with self._file() as file:
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                rows = _whole_microseconds(batch).to_pylist() if columns else [{} for _ in range(batch.num_rows)]
                for row in rows:
                    yield row_number, row
                    row_number += 1

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Column chunks are read in pieces of 1 MB: a row group of photos may be larger than the memory.
            with pq.ParquetFile(self.table, buffer_size=1 << 20, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{self.table} cannot be read as Parquet: {error}") from None


def _image_parts(value: Any) -> tuple[bytes | None, str | None]:
    """(bytes, path) of a cell of the image column."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


def _whole_microseconds(batch: Any) -> Any:
    """Python's own times end at microseconds: finer ones are cut there."""
    import pyarrow as pa

    for position, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            column = batch.column(position).cast(pa.timestamp("us", field.type.tz), safe=False)
        elif pa.types.is_duration(field.type) and field.type.unit == "ns":
            column = batch.column(position).cast(pa.duration("us"), safe=False)
        else:
            continue
        batch = batch.set_column(position, field.name, column)
    return batch


def _key_column(table: Path, columns: list[str], config: PackConfig) -> str:
    if config.key_column and config.key_column not in columns:
        raise InputError(f"{table} has no column {config.key_column!r} for --key-column; it has {_listed(columns)}")
    return config.key_column or ("key" if "key" in columns else "")


def _no_photos(table: Path, columns: list[str], path_column: str) -> InputError:
    wanted = f"no column {path_column!r}, nor one of image bytes"
    return InputError(f"{table} has {wanted}; it has {_listed(columns)}: choose with --path-column or --image-column")


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "no columns"
