"""The one reader of stored embeddings: ours, or any folder in clip-retrieval's layout.

Shape letters: N rows, D features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.records import Sample, Unit
from geoloc_batch.store import metadata

NPY_NAME = re.compile(r"img_emb_(.*)\.npy")
IDENTITY = ("shard", "row")
KEY_COLUMNS = ("key", "image_path")
"""What names a photo: the first of them that is there."""
OWN_COLUMNS = (*KEY_COLUMNS, *IDENTITY, "emb_norm")


def plan_embeddings(folder: Path | str) -> list[Unit]:
    """One unit for each embedding pair of a folder, in the order of their numbers.

    Args:
        folder: holds img_emb/ and metadata/.

    Raises:
        InputError: there are no pairs, or an .npy has no Parquet beside it.
    """
    folder = Path(folder)
    found = [path for path in (folder / "img_emb").glob("*.npy") if NPY_NAME.fullmatch(path.name)]
    if not found:
        raise InputError(
            f"{folder} holds no embeddings: img_emb/img_emb_*.npy is what `geoloc embed` and clip-retrieval write"
        )
    for npy in found:
        if not metadata_path(npy).is_file():
            raise InputError(
                f"{npy} has no {metadata_path(npy)} beside it; run the command that writes them again to its end"
            )
    return [
        Unit(index=index, kind="embeddings", source=str(npy), num_bytes=npy.stat().st_size)
        for index, npy in enumerate(sorted(found, key=lambda npy: (len(npy.name), npy.name)))
    ]


def metadata_path(npy: Path) -> Path:
    """The Parquet that goes with an .npy."""
    match = NPY_NAME.fullmatch(npy.name)
    if match is None:
        raise InputError(f"{npy} is not named img_emb_*.npy, so its metadata cannot be found; rename it")
    return npy.parent.parent / "metadata" / f"metadata_{match[1]}.parquet"


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """An embedding pair. Rows are read from the file when they are asked for."""

    npy: Path
    num_rows: int
    num_features: int
    table: pa.Table
    """The metadata, [N]."""
    norm_N: NDArray[np.float32]
    """Lengths of the features before they were normalised."""
    offset: int
    """Where the rows begin in the file."""
    dtype: np.dtype[np.floating]
    has_identity: bool
    """The columns shard and row are ours: text and integers, none null, each pair once."""

    @property
    def row_bytes(self) -> int:
        """Of one row in the .npy."""
        return self.num_features * self.dtype.itemsize

    def stored(self, start: int = 0, stop: int | None = None) -> NDArray[np.floating]:
        """[stop - start, D] rows as they stand in the file, in its dtype.

        Raises:
            InputError: the file has become shorter since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        count = max(0, stop - start) * self.num_features
        # Read, never mapped: a mapped file that somebody truncates kills the process.
        position = self.offset + start * self.row_bytes
        rows = np.fromfile(self.npy, dtype=self.dtype, count=count, offset=position)
        if len(rows) != count:
            raise InputError(f"{self.npy} has become shorter while it was read; write it again")
        return rows.reshape(-1, self.num_features)

    def restored(self, row_ND: NDArray[np.floating], start: int = 0) -> NDArray[np.float32]:
        """[N, D] features as the encoder gave them, of N stored rows from `start` on: rows times their lengths."""
        return row_ND.astype(np.float32) * self.norm_N[start : start + len(row_ND), None]

    def features(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """[stop - start, D] `restored` of what is `stored`; InputError as there."""
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        return self.restored(self.stored(start, stop), start)

    @property
    def features_ND(self) -> NDArray[np.float32]:  # noqa: N802
        """[N, D] all of them."""
        return self.features()

    def features_at(self, row_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, D] as `features`, of rows in any order; rows that follow one another in the file are read together."""
        order = np.argsort(row_N, kind="stable")
        ascending = row_N[order]
        borders = np.flatnonzero(np.diff(ascending) != 1) + 1
        found = np.empty((len(row_N), self.num_features), dtype=np.float32)
        for part in np.split(np.arange(len(row_N)), borders) if len(row_N) else ():
            found[order[part]] = self.features(int(ascending[part[0]]), int(ascending[part[-1]]) + 1)
        return found

    def samples(self, unit: Unit, start: int = 0, stop: int | None = None) -> list[Sample]:
        """Who the rows are, in their order in the file.

        Without our columns the shard is the .npy and the row its position in it; columns of other tools that have the
        names of ours are metadata then.
        """
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        return self._samples(unit.shard, self.table.slice(start, stop - start), range(start, stop), unit)

    def samples_at(self, unit: Unit, row_N: NDArray[np.int64], table: pa.Table | None = None) -> list[Sample]:
        """As `samples`, of rows in any order; `unit` is of the whole folder.

        Args:
            unit: what they are read for.
            row_N: which.
            table: their metadata, where these were taken before.
        """
        shard = str(Path(unit.shard) / self.npy.parent.name / self.npy.name)
        return self._samples(shard, self.table.take(row_N) if table is None else table, row_N.tolist(), unit)

    def _samples(self, shard: str, table: pa.Table, positions: Sequence[int], unit: Unit) -> list[Sample]:
        names = table.column_names
        rows = table["row"].to_pylist() if self.has_identity else list(positions)
        shards = table["shard"].to_pylist() if self.has_identity else [shard] * len(rows)
        name_column = next((name for name in KEY_COLUMNS if name in names), None)
        named = table[name_column].to_pylist() if name_column else rows
        keys = [key_text(value, row) for value, row in zip(named, rows, strict=True)]
        drop = OWN_COLUMNS if self.has_identity else set(OWN_COLUMNS) - set(IDENTITY)
        metas = metadata.restore(table, drop)
        return [Sample(unit, *of_row) for of_row in zip(shards, rows, keys, metas, strict=True)]

    def chunks(self, unit: Unit, size: int = 4096) -> Iterator[tuple[NDArray[np.float32], list[Sample]]]:
        """The rows in order, `size` at a time: ([n, D], n samples)."""
        for start in range(0, self.num_rows, size):
            yield self.features(start, start + size), self.samples(unit, start, start + size)


def read_features(npy: Path | str, *, normalised: bool = False) -> StoredFeatures:
    """Open an embedding pair.

    Args:
        npy: the features; the metadata are found by its name.
        normalised: take rows without emb_norm as they are, of length 1: right only for heads that were trained so.

    Raises:
        InputError: a file is missing, damaged or of another form, the two do not fit, or emb_norm is missing.
    """
    npy = Path(npy)
    parquet = metadata_path(npy)
    shape, dtype, offset = read_header(npy)
    try:
        table = pq.ParquetFile(parquet).read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{parquet} cannot be read: {error}; write the embeddings again") from error
    if table.num_rows != shape[0]:
        raise InputError(f"{npy} has {shape[0]} rows and {parquet} {table.num_rows}; write the embeddings again")
    doubled = {name for name in table.column_names if table.column_names.count(name) > 1}
    if doubled:
        raise InputError(f"{parquet} has several columns named {min(doubled)}; rename them")
    if "emb_norm" in table.column_names:
        norm_N = _read_norms(parquet, table["emb_norm"])
    elif normalised:
        norm_N = np.ones(shape[0], dtype=np.float32)
    else:
        raise InputError(
            f"{parquet} has no column emb_norm, so the features before normalisation are lost and a head made for them "
            f"would answer wrongly; write the embeddings again with `geoloc embed`, or pass normalised=True for a head "
            f"that was trained on features of length 1"
        )
    return StoredFeatures(npy, shape[0], shape[1], table, norm_N, offset, dtype, has_identity(table))


def _read_norms(parquet: Path, column: pa.ChunkedArray) -> NDArray[np.float32]:
    """[N]; nulls become NaN, which makes their rows, and no others, error rows."""
    if not pa.types.is_floating(column.type) and not pa.types.is_integer(column.type):
        raise InputError(
            f"emb_norm in {parquet} is to be the length of each feature, and holds {column.type}; write the embeddings "
            f"again with `geoloc embed`, or rename the column if it means something else"
        )
    return np.asarray(column.to_numpy(), dtype=np.float32)


def has_identity(table: pa.Table) -> bool:
    """Whether the columns shard and row are ours: text and integers, none null, each pair once."""
    if not set(IDENTITY) <= set(table.column_names):
        return False
    shard, row = table["shard"], table["row"]
    if not (pa.types.is_string(shard.type) or pa.types.is_large_string(shard.type)):
        return False
    # Unsigned 64 bit numbers need not fit into ours.
    if not pa.types.is_integer(row.type) or row.type == pa.uint64() or shard.null_count or row.null_count:
        return False
    return bool(table.select(list(IDENTITY)).group_by(list(IDENTITY)).aggregate([]).num_rows == table.num_rows)


def key_text(value: object, row: int) -> str:
    """A key as text; what has none is named by its row."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(row if value is None else value)


def read_header(npy: Path) -> tuple[tuple[int, int], np.dtype[np.floating], int]:
    """Shape, dtype and position of the rows in an .npy; InputError where it is damaged or no matrix of floats."""
    try:
        with open(npy, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            offset = file.tell()
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:
        raise InputError(f"{npy} cannot be read: {error}; write the embeddings again") from error
    if len(shape) != 2 or is_fortran or dtype.kind != "f":
        raise InputError(f"{npy} holds {dtype} {shape}; embeddings are a row of floats for each photo, in C order")
    if size < offset + shape[0] * shape[1] * dtype.itemsize:
        raise InputError(f"{npy} is cut off: {size} bytes for {shape[0]} rows; write the embeddings again")
    return (shape[0], shape[1]), dtype, offset
