"""What a merge writes: beside its target first, whole and on the disk, then under its name in one move."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import NO_LINK_ERRNOS, OsFiles
from geoloc_batch.store.pin import refuse_object_store
from geoloc_batch.store.tables import SCHEMA_VERSION

ROW_GROUP_ROWS = 1 << 17
PART_ROWS = 10_000_000
"""Rows of one file of a folder."""
FILE_SUFFIX = ".parquet"

log = logging.getLogger("geoloc_batch")


def refuse_target(target: Path, run: Path, *, embeddings: bool) -> None:
    """Raise OutputError where a merge cannot go to `target`, before anything is read."""
    refuse_object_store(target)
    if embeddings and target.suffix:
        raise OutputError(
            f"--out {target}: --embeddings writes an .npy and the Parquet that goes with it; name a folder for both"
        )
    if not embeddings and target.suffix in (".npy", ".csv", ".json"):
        raise OutputError(f"--out {target}: what is merged is Parquet; name a file that ends in .parquet, or a folder")
    if target.is_dir() and (target.suffix == FILE_SUFFIX or any(target.iterdir())):
        raise OutputError(f"--out {target} is a folder that holds something; name another, or remove it")
    if target.exists() and not target.is_dir():
        raise OutputError(f"--out {target} is there already; name another, or remove it")
    here = target.absolute().resolve()
    if here == run.resolve() or run.resolve() in here.parents:
        raise OutputError(
            f"--out {target} lies in {run}, where nothing may stand but what the run has made; name a place outside"
        )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Where to write what becomes `target`: a path beside it, moved there at the end, removed after an error.

    Raises:
        OutputError: something has come to stand at the target meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.part"):
        log.warning("%s is what another merge writes, or has left where it was cut off: then remove it", left)
    part = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        yield part
        _sync(part)
        _move(part, target)
        OsFiles().sync_folder(target.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def _sync(part: Path) -> None:
    for path in (part, *part.rglob("*")) if part.is_dir() else (part,):
        OsFiles().sync_folder(path) if path.is_dir() else OsFiles().sync(path)


def _move(part: Path, target: Path) -> None:
    try:
        if part.is_dir():
            # Over nothing, or over an empty folder.
            os.rename(part, target)
            return
        try:
            os.link(part, target)
        except OSError as error:
            if error.errno not in NO_LINK_ERRNOS or target.exists():
                raise
            os.rename(part, target)
    except OSError as error:
        if not target.exists():
            raise
        raise OutputError(f"--out {target} has come to be there meanwhile; name another") from error


class TableWriter:
    """Writes tables one after the other, in row groups of one size, whatever the sizes of the tables.

    Args:
        path: the Parquet, or the first of several: then "_000000" in its name is counted up.
        schema: of every table.
        is_one: all in one file, however many rows come.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, is_one: bool) -> None:
        self.paths: list[Path] = []
        self.rows = 0
        self._path = path
        self._schema = schema.with_metadata({"schema_version": json.dumps(SCHEMA_VERSION)})
        self._is_one = is_one
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_part = 0

    def write(self, table: pa.Table) -> None:
        """Add the rows of a table."""
        self._waiting.append(table)
        self._num_waiting += len(table)
        self.rows += len(table)
        while self._num_waiting >= ROW_GROUP_ROWS:
            self._write_group(ROW_GROUP_ROWS)

    def finish(self) -> None:
        """Write what is left. A file is there even without a row."""
        if self._num_waiting or not self.paths:
            self._write_group(self._num_waiting)
        self._close_part()

    def close(self) -> None:
        """Let go of a file that is not finished: it is whole only after `finish`."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._close_part()

    def _write_group(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table()
        rest = table.slice(rows)
        self._waiting, self._num_waiting = ([rest] if len(rest) else []), len(rest)
        if self._writer is not None and not self._is_one and self._rows_in_part + rows > PART_ROWS:
            self._close_part()
        if self._writer is None:
            self.paths.append(self._path.with_name(self._path.name.replace("_000000", f"_{len(self.paths):06d}")))
            self.paths[-1].parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self.paths[-1],
                self._schema,
                version="2.6",
                compression="zstd",
                compression_level=3,
                use_dictionary=True,
                write_statistics=True,
                data_page_version="1.0",
            )
        self._writer.write_table(table.slice(0, rows), row_group_size=ROW_GROUP_ROWS)
        self._rows_in_part += rows

    def _close_part(self) -> None:
        writer, self._writer, self._rows_in_part = self._writer, None, 0
        if writer is not None:
            writer.close()
