"""Merge: the tables of all units as one, streamed: no more is in memory than two row groups.

First the markers and the footers of the files are read: what there is, and which type each column has in all of them
together. Then the files are, each from its first byte to its last, so that their checksums are held against the markers
by the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import OutputError
from geoloc_batch.store.columns import Columns, conform, look_at_file
from geoloc_batch.store.config import MergeConfig
from geoloc_batch.store.features import read_header
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import reached_goals
from geoloc_batch.store.marker import Marker
from geoloc_batch.store.merge_output import FILE_SUFFIX, TableWriter, refuse_target, written_beside
from geoloc_batch.store.merge_source import METADATA, PREDICTIONS, Source, folder_of, matrices_of, tables_of
from geoloc_batch.store.pin import config_hash, read_config
from geoloc_batch.store.plan import read_plan
from geoloc_batch.store.standing import read_many
from geoloc_batch.store.tables import embedding_paths, predictions_path
from geoloc_batch.store.verification import TABLE_ERRORS


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What a merge ends with."""

    units: int
    """Whose results were merged, those without a row included."""
    undone: int
    """Units that are not done, and so are missing; 0 but with --partial."""
    unit_errors: int
    """Of `units`: those that could not be read to their end."""
    rows: int
    """Of each head, where there are several."""
    files: int
    """How many were written, the .npy included."""
    bytes: int
    """Of these files."""
    seconds: float
    out: str


@dataclass(slots=True)
class _Tree:
    """The tables of one folder of the run."""

    columns: Columns = field(default_factory=Columns)
    rows: int = 0


@dataclass(frozen=True, slots=True)
class _Footers:
    """What the files of a unit say of themselves."""

    has_unit_error: bool
    tables: list[tuple[str, pa.Schema, set[str], set[str], int]]
    """Folder, schema, empty and wide columns (see Columns.add), rows."""
    matrices: list[tuple[tuple[int, str], int]]
    """Width and dtype, rows."""


@dataclass(slots=True)
class _Found:
    """What there is to merge."""

    unit_errors: int = 0
    trees: dict[str, _Tree] = field(default_factory=dict)
    """By their folders, relative to OUT."""
    matrices: set[tuple[int, str]] = field(default_factory=set)
    """Widths and dtypes of the embeddings: they must be of one kind."""
    rows: int = 0
    """Of the embeddings."""


def merge(config: MergeConfig) -> Merged:
    """Merge the predictions of a run, or its embeddings; where there are no predictions, the embeddings' metadata.

    Raises:
        OutputError: the folder is none of ours, not complete (without `partial`), damaged, or holds nothing of the
            kind; or the target is there already, or cannot be.
    """
    began_s = time.monotonic()
    out, target = Path(config.run), Path(config.out)
    run_hash = config_hash(read_config(out))
    refuse_target(target, out, embeddings=config.embeddings)
    plan, _ = read_plan(out)
    reached = reached_goals(out, range(len(plan)), OsFiles().names)
    undone = len(plan) - len(reached)
    if undone and not config.partial:
        raise OutputError(
            f"{undone} of the {len(plan)} units of {out} are not done, so something would be missing: run its command "
            f"again to its end, or pass --partial for what is there (`geoloc status {out}` tells more)"
        )
    source = Source(out, plan, [reached[unit] for unit in sorted(reached)], run_hash)
    found = _look(source, config)
    with written_beside(target) as part:
        written, rows = _write(source, found, part, config)
        num_bytes = sum(path.stat().st_size for path in written)
    return Merged(
        units=len(reached),
        undone=undone,
        unit_errors=found.unit_errors,
        rows=rows,
        files=len(written),
        bytes=num_bytes,
        seconds=round(time.monotonic() - began_s, 3),
        out=str(target),
    )


def _look(source: Source, config: MergeConfig) -> _Found:
    """The first pass: markers and footers."""
    found = _Found()
    read = partial(_footers, source, embeddings=config.embeddings)
    for footers in read_many(read, source.markers()):
        found.unit_errors += footers.has_unit_error
        for folder, schema, empty, wide, rows in footers.tables:
            tree = found.trees.setdefault(folder, _Tree())
            tree.columns.add(schema, empty, wide)
            tree.rows += rows
        for kind, rows in footers.matrices:
            found.matrices.add(kind)
            found.rows += rows
    if len(found.matrices) > 1:
        raise OutputError(f"the embeddings of {source.out} are of several kinds: {found.matrices}; geoloc verify it")
    # A unit without a location may have metadata alone.
    found.trees = {name: tree for name, tree in found.trees.items() if name.endswith(PREDICTIONS)} or found.trees
    if not found.trees:
        what = "embeddings" if config.embeddings else "predictions or embeddings"
        raise OutputError(f"{source.out} holds no {what}: of its {len(source.goals)} done units none has such a row")
    if len(found.trees) > 1 and config.out.endswith(FILE_SUFFIX):
        raise OutputError(
            f"--out {config.out} is one file, and {source.out} has the predictions of {len(found.trees)} heads; name a "
            f"folder, which gets a folder for each head"
        )
    return found


def _footers(source: Source, marker: Marker, *, embeddings: bool) -> _Footers:
    footers = _Footers(marker.counts.unit_error is not None, [], [])
    for record in tables_of(marker, embeddings=embeddings):
        with source.open(marker, record) as file:
            try:
                table = pq.ParquetFile(file)
                about = table.schema_arrow.remove_metadata(), *look_at_file(table), table.metadata.num_rows
            except TABLE_ERRORS as error:
                raise source.changed(marker, record, error) from error
        footers.tables.append((folder_of(record), *about))
    for record in matrices_of(marker) if embeddings else ():
        source.open(marker, record).close()
        try:
            shape, dtype, _ = read_header(source.out / record.path)
        except TABLE_ERRORS as error:
            raise source.changed(marker, record, error) from error
        footers.matrices.append(((shape[1], dtype.str), shape[0]))
    return footers


def _write(source: Source, found: _Found, part: Path, config: MergeConfig) -> tuple[list[Path], int]:
    """The second pass: the files written, and the rows of each tree."""
    written: list[Path] = []
    is_file = config.out.endswith(FILE_SUFFIX)
    if not is_file:
        part.mkdir()
    for folder, tree in sorted(found.trees.items()):
        name = embedding_paths(0)[1] if folder == METADATA else predictions_path(0, folder.rpartition("/")[0])
        # The rows of one .npy have one Parquet.
        is_one = is_file or config.embeddings
        with closing(TableWriter(part if is_file else part / name, tree.columns.schema(), is_one=is_one)) as writer:
            for table in _read_tree(source, folder, tree, embeddings=config.embeddings):
                writer.write(table)
            writer.finish()
        if writer.rows != tree.rows:
            raise OutputError(
                f"the files of {source.out} have changed while they were read; run the same command again"
            )
        written += writer.paths
    rows = max(tree.rows for tree in found.trees.values())
    if config.embeddings:
        if found.rows != rows:
            raise OutputError(f"{source.out} has {found.rows} embeddings and {rows} rows of metadata; geoloc verify it")
        written.append(part / embedding_paths(0)[0])
        _write_matrix(source, found, written[-1])
    return written, rows


def _read_tree(source: Source, folder: str, tree: _Tree, *, embeddings: bool) -> Iterator[pa.Table]:
    """The rows of one folder's files, a row group at a time, all with the same columns."""
    schema = tree.columns.schema()
    with closing(source.markers()) as markers:
        for marker in markers:
            for record in tables_of(marker, embeddings=embeddings):
                if folder_of(record) != folder:
                    continue
                with source.open(marker, record) as file:
                    source.pass_on(marker, record, file)
                    try:
                        table = pq.ParquetFile(file)
                        for group in range(table.num_row_groups):
                            yield conform(table.read_row_group(group), schema)
                    except TABLE_ERRORS as error:
                        raise source.changed(marker, record, error) from error


def _write_matrix(source: Source, found: _Found, path: Path) -> None:
    """All embeddings as one .npy: the rows are copied as bytes."""
    ((width, dtype),) = found.matrices
    path.parent.mkdir(parents=True)
    with open(path, "wb") as target, closing(source.markers()) as markers:
        header = {"descr": dtype, "fortran_order": False, "shape": (found.rows, width)}
        np.lib.format.write_array_header_1_0(target, header)
        start = target.tell()
        for marker in markers:
            for record in matrices_of(marker):
                skip = read_header(source.out / record.path)[2]

                def take(block: bytes) -> None:
                    nonlocal skip
                    target.write(block[skip:])
                    skip = max(0, skip - len(block))

                with source.open(marker, record) as file:
                    source.pass_on(marker, record, file, take)
        if target.tell() - start != found.rows * width * np.dtype(dtype).itemsize:
            raise OutputError(
                f"the files of {source.out} have changed while they were read; run the same command again"
            )
