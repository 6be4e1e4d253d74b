"""The tables that units end up in: names, schemas and writers. The same rows give the same bytes.

Shape letters: N rows, D features.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.geo.located import Located, Views
from geoloc_batch.records import RowError, Sample
from geoloc_batch.store import metadata
from geoloc_batch.store.columns import Columns, conform, look_at_table

SCHEMA_VERSION = 1
# Rows of features that are widened to float64 at once.
NORM_ROWS = 4096
ROW_GROUP_ROWS = 1 << 16
NUM_VIEWS = "num_views"
"""The column of predictions that says how many photos a row stands for, where it stands for a location."""


def embedding_paths(index: int) -> tuple[str, str]:
    """Where a unit's features and their metadata go, relative to OUT."""
    return f"img_emb/img_emb_{index:06d}.npy", f"metadata/metadata_{index:06d}.parquet"


def predictions_path(index: int, tree: str = "") -> str:
    """Where a unit's predictions go, relative to OUT; `tree` is the folder of one of several heads."""
    path = f"predictions/predictions_{index:06d}.parquet"
    return f"{tree}/{path}" if tree else path


def errors_path(index: int) -> str:
    """Where a unit's error rows go, relative to OUT."""
    return f"errors/errors_{index:06d}.parquet"


def write_embeddings(npy: Path, parquet: Path, samples: Sequence[Sample], features_ND: NDArray[np.float32]) -> None:
    """Write a unit's features, normalised, and their metadata, row by row beside each other.

    Args:
        npy: gets float16 [N, D], rows of length 1.
        parquet: gets image_path, key, shard, row, emb_norm (the length before) and the samples' json.
        samples: N of them, ordered by row.
        features_ND: [N, D] float, as the encoder's tap gives them.

    Raises:
        ValueError: a row is zero or not finite; such a photo is an error row.
    """
    _check_order(samples)
    if features_ND.ndim != 2 or len(features_ND) != len(samples):
        raise ValueError(f"{len(samples)} samples do not go with features of shape {features_ND.shape}")
    rows_ND = np.empty(features_ND.shape, dtype="<f2")
    norm_N = np.empty(len(samples), dtype=np.float32)
    for start in range(0, len(samples), NORM_ROWS):
        block = slice(start, start + NORM_ROWS)
        wide_ND = np.ascontiguousarray(features_ND[block], dtype=np.float64)
        # Summed along contiguous rows, one by one: a row's length does not depend on its neighbours.
        wide_N = np.sqrt(np.square(wide_ND).sum(axis=1))
        with np.errstate(over="ignore", under="ignore"):
            norm_N[block] = wide_N
        bad = np.flatnonzero(~np.isfinite(norm_N[block]) | (norm_N[block] == 0))
        if len(bad):
            sample = samples[start + int(bad[0])]
            raise ValueError(f"the features of {sample.key} in {sample.shard} are zero or not finite")
        rows_ND[block] = wide_ND / wide_N[:, None]
    with open(npy, "wb") as file:
        np.lib.format.write_array(file, rows_ND, version=(1, 0), allow_pickle=False)
    identity = _identity(samples)
    fixed = {"image_path": identity["key"], **identity, "emb_norm": pa.array(norm_N)}
    _write(parquet, {**fixed, **metadata.columns([sample.meta for sample in samples], is_prefixed=False)})


def write_predictions(path: Path, samples: Sequence[Sample], located: Located, views: Views | None = None) -> None:
    """Write a unit's places.

    Args:
        path: gets one row for each sample.
        samples: N of them, ordered by row; those of an embedding pair as they stand in it.
        located: N places in the same order.
        views: what is behind each of them, where the samples stand for locations.
    """
    _check_order(samples)
    if len(located) != len(samples):
        raise ValueError(f"{len(samples)} samples do not go with {len(located)} places")
    columns = {
        **_identity(samples),
        **({} if views is None else _views(views)),
        "lat": pa.array(located.position_deg[:, 0], pa.float64()),
        "lon": pa.array(located.position_deg[:, 1], pa.float64()),
        "cell": pa.array(located.topk_cell[:, 0], pa.int32()),
        "prob": pa.array(located.topk_prob[:, 0], pa.float32()),
        "topk_cell": _lists(located.topk_cell, pa.int32()),
        "topk_prob": _lists(located.topk_prob, pa.float32()),
        "mean_lat": pa.array(located.mean_deg[:, 0], pa.float64()),
        "mean_lon": pa.array(located.mean_deg[:, 1], pa.float64()),
        "spread_km": pa.array(located.spread_km, pa.float32()),
        "entropy": pa.array(located.entropy, pa.float32()),
    }
    json_columns = metadata.columns([sample.meta for sample in samples], is_prefixed=True)
    _write(path, {**columns, **json_columns})


def write_errors(path: Path, errors: Sequence[RowError]) -> None:
    """Write a unit's error rows, ordered by row."""
    if not errors:
        raise ValueError("a unit without error rows has no file of them")
    columns = {
        "key": pa.array([metadata.text(error.key) for error in errors], pa.string()),
        "shard": pa.array([metadata.text(error.shard) for error in errors], pa.string()),
        "row": pa.array([error.row for error in errors], pa.int64()),
        "stage": pa.array([error.stage for error in errors], pa.string()),
        "message": pa.array([metadata.text(error.message) for error in errors], pa.string()),
        "retryable": pa.array([error.retryable for error in errors], pa.bool_()),
    }
    _write(path, columns)


def read_tables(folder: Path | str) -> pa.Table:
    """All tables of a folder (predictions, metadata, errors) as one, in the order of their units.

    Where the samples' json gives a column another type in every shard, columns.py has the rules: integers and doubles
    become doubles where no digit is lost by it, all else that does not go together becomes text. What a shard does not
    have is null. `geoloc merge` does the same for any number of units, and needs no memory for it.

    Raises:
        InputError: the folder holds no Parquet, or one that cannot be read.
    """
    paths = sorted(Path(folder).glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise InputError(f"{folder} holds no .parquet; name a folder such as OUT/predictions")
    try:
        tables = [pq.ParquetFile(path).read().replace_schema_metadata() for path in paths]
        columns = Columns()
        for table in tables:
            columns.add(table.schema, *look_at_table(table))
        schema = columns.schema()
        return pa.concat_tables([conform(table, schema) for table in tables])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the tables in {folder} cannot be read: {error}; see `geoloc verify`") from error


def _identity(samples: Sequence[Sample]) -> dict[str, pa.Array]:
    return {
        "key": pa.array([metadata.text(sample.key) for sample in samples], pa.string()),
        "shard": pa.array([metadata.text(sample.shard) for sample in samples], pa.string()),
        "row": pa.array([sample.row for sample in samples], pa.int64()),
    }


def _views(views: Views) -> dict[str, pa.Array]:
    return {NUM_VIEWS: pa.array(views.num_views, pa.int32()), "view_km": pa.array(views.view_km, pa.float32())}


def _check_order(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("a unit without a good row has no table of them")
    # Stored embeddings may hold rows of several shards in any order: their place in the pair is their order.
    if samples[0].unit.kind == "shard":
        for before, after in itertools.pairwise(samples):
            assert before.row < after.row, "rows must be sorted by their row number"


def _lists(values_NK: NDArray[np.int32] | NDArray[np.float32], kind: pa.DataType) -> pa.ListArray:
    rows, kept = values_NK.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * kept, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values_NK.ravel(), kind))


def _write(path: Path, columns: Mapping[str, pa.Array]) -> None:
    table = pa.table(dict(columns)).replace_schema_metadata({"schema_version": json.dumps(SCHEMA_VERSION)})
    # Everything that a later release could choose otherwise is said: a resumed run must give the same bytes.
    pq.write_table(
        table,
        path,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        row_group_size=ROW_GROUP_ROWS,
        data_page_version="1.0",
    )
