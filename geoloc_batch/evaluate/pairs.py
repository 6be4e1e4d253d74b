"""Pairs: both tables, read and looked at, and which of their rows belong together.

Shape letters: N rows of the truth, P predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geoloc_batch.errors import InputError
from geoloc_batch.evaluate.config import EvaluateConfig
from geoloc_batch.evaluate.keys import Ints, check_unique, match, merge_repeats
from geoloc_batch.evaluate.places import Places, look_at
from geoloc_batch.evaluate.progress import Progress
from geoloc_batch.evaluate.sources import Source, find_predictions, find_truth
from geoloc_batch.evaluate.tables import Column, Kind, count_rows, read_table

_KEY, _SHARD = Column(name="key", kind="text", is_required=True), Column(name="shard", kind="text")
_PLACE = tuple(Column(name=name, kind="degrees", is_required=True) for name in ("lat", "lon"))
_CELLS = (Column(name="cell", kind="cell"), Column(name="topk_cell", kind="cells"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two tables."""

    name: str
    """What messages call it."""
    table: pa.Table
    """key; shard, cell and topk_cell where there are such."""
    places: Places


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """The truth, and the prediction of each of its rows."""

    predictions: Side
    """[P]"""
    truth: Side
    """[N]"""
    row_N: Ints
    """[N] the row of the predictions, -1 where there is none."""
    num_repeats: int = 0
    """Rows of the truth that said again what an earlier one of their key says; they are not among its rows."""
    error_rows: int = 0
    """Photos of the run that gave no prediction, where the truth is the predictions' own."""
    has_own_truth: bool = False
    """The truth is what the predictions carry along: it knows of no photo that was not read."""
    progress: Progress | None = None
    """How far the run is that the predictions are of; None where they are of none."""


def read_pairs(config: EvaluateConfig) -> Pairs:
    """Read what the config names.

    Raises:
        InputError: a file or a column is missing or of the wrong kind, or a key is empty, or stands twice and is no
            agreeing repeat in the truth.
        ConfigError: one of several heads must be chosen.
    """
    predictions = find_predictions(config.predictions, config.head)
    return _with_truth(config, predictions) if config.truth else _with_own_truth(config, predictions)


def _with_truth(config: EvaluateConfig, source: Source) -> Pairs:
    given = find_truth(config.truth)
    kinds: dict[str, Kind] = {"key": "text", "lat": "degrees", "lon": "degrees"}
    written = {"key": config.key_column, "lat": config.lat_column, "lon": config.lon_column}
    columns = [
        Column(name=name, kind=kind, written=written[name], is_required=True, flag=f"--{name}-column")
        for name, kind in kinds.items()
    ]
    stated = () if config.cells else (Column(name="cell", kind="cell"),)
    # A column has one meaning: what the flags say.
    more = [column for column in (_SHARD, *stated) if column.name not in written.values()]
    wanted_split = [Column(name="split", kind="text", is_required=True)] if config.split else []
    table = read_table(given, [*columns, *more, *wanted_split])
    if config.split:
        table = _of_split(table, config.split, given.name)
    name = f"{given.name}, split {config.split}" if config.split else given.name
    # The cells of millions of rows are not read where nothing can be said of them.
    wants_cells = config.cells or "cell" in table.column_names
    wanted = [_KEY, _SHARD, *_PLACE, *(_CELLS if wants_cells else ())]
    predictions = _side(source.name, read_table(source, wanted))
    agreeing = [column for column in ("lat", "lon", "cell") if column in table.column_names]
    table, num_repeats = merge_repeats(table, predictions.table, name, agreeing)
    truth = _side(name, table)
    row_N = match(truth.table, predictions.table, truth.name, predictions.name)
    return Pairs(predictions=predictions, truth=truth, row_N=row_N, num_repeats=num_repeats, progress=source.progress)


def _of_split(table: pa.Table, split: str, name: str) -> pa.Table:
    """The rows of one split, without that column."""
    kept = table.filter(pc.equal(table["split"], split))
    if not kept.num_rows:
        found = ", ".join(sorted(filter(None, pc.unique(table["split"]).to_pylist()))[:10]) or "nothing"
        raise InputError(f"--split {split}: the column split of {name} holds {found}; name one of them")
    return kept.drop_columns(["split"])


def _with_own_truth(config: EvaluateConfig, source: Source) -> Pairs:
    """The truth is what the photos' json says, which predictions carry along."""
    metas = {f"meta_{config.lat_column}": "true_lat", f"meta_{config.lon_column}": "true_lon"}
    own = [Column(name=name, kind="degrees", written=column) for column, name in metas.items()]
    table = read_table(source, [_KEY, _SHARD, *_PLACE, *own, *(_CELLS if config.cells else ())])
    for column, name in metas.items():
        if name not in table.column_names:
            raise InputError(
                f"{source.name} has no column {column} that could serve as the truth; give it with --truth FILE, "
                f"or name what the photos' json calls it with --lat-column and --lon-column"
            )
    check_unique(table, source.name)
    places = look_at(*(_numbers(table[name]) for name in metas.values()))
    identity = table.select([name for name in ("key", "shard") if name in table.column_names])
    return Pairs(
        predictions=_side(source.name, table.drop_columns(list(metas.values()))),
        truth=Side(name=f"{' and '.join(metas)} of {source.name}", table=identity, places=places),
        row_N=np.arange(table.num_rows),
        error_rows=count_rows(source.errors),
        has_own_truth=True,
        progress=source.progress,
    )


def _side(name: str, table: pa.Table) -> Side:
    places = look_at(_numbers(table["lat"]), _numbers(table["lon"]))
    return Side(name=name, table=table.drop_columns(["lat", "lon"]), places=places)


def _numbers(column: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.asarray(pc.fill_null(column, np.nan).to_numpy(), dtype=np.float64)
