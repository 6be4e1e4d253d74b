"""The comparison: read both tables, say what is wrong with them, measure, write.

Shape letters: N rows of the truth, P predictions, M rows that are compared.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.evaluate import cells, output
from geoloc_batch.evaluate.config import EvaluateConfig
from geoloc_batch.evaluate.evaluation import Evaluation
from geoloc_batch.evaluate.keys import Ints
from geoloc_batch.evaluate.pairs import Pairs, read_pairs
from geoloc_batch.evaluate.problems import Flags, count, look_for_swap, nothing_to_compare, warnings_of
from geoloc_batch.geo.metrics import distances_km, geoscore, summarise

log = logging.getLogger("geoloc_batch")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure predictions against the truth and write metrics.json, metrics.md and rows.parquet.

    Returns:
        The metrics, the counts of what was left out, and the warnings, which are logged as well.

    Raises:
        UserError: a file, a column, a key or the output folder is not what it must be, or nothing can be compared.
    """
    folder = output.check_out(config.out)
    pairs = read_pairs(config)
    found, true = pairs.predictions.places, pairs.truth.places
    is_compared_N = true.is_place_N & (pairs.row_N >= 0)
    is_compared_N[is_compared_N] = found.is_place_N[pairs.row_N[is_compared_N]]
    swap = look_for_swap(pairs)
    counts = count(pairs, is_compared_N, swap)
    if not is_compared_N.any():
        raise InputError(nothing_to_compare(pairs, counts, swap))
    distance_km_M = distances_km(found.point_deg_N2[pairs.row_N[is_compared_N]], true.point_deg_N2[is_compared_N])
    true_cell_N, complaint = _true_cells(config, pairs)
    rank_N, num_kept = _ranks(pairs, is_compared_N, true_cell_N)
    has_cell_N = is_compared_N & (true_cell_N != cells.NO_CELL)
    evaluation = Evaluation(
        metrics=summarise(
            distance_km_M,
            asked=int(true.is_place_N.sum()) + pairs.error_rows,
            cell_rank=rank_N[has_cell_N] if num_kept else None,
            num_kept=num_kept,
            thresholds_km=config.thresholds,
            is_strict=config.strict,
        ),
        counts=counts,
        warnings=(*warnings_of(pairs, counts, swap), *filter(None, [complaint])),
        predictions=pairs.predictions.name,
        truth=pairs.truth.name,
        cells=config.cells,
        out=config.out,
    )
    for warning in evaluation.warnings:
        log.warning("%s", warning)
    output.write(folder, evaluation, _rows(pairs, is_compared_N, distance_km_M, true_cell_N, rank_N))
    return evaluation


def _true_cells(config: EvaluateConfig, pairs: Pairs) -> tuple[Ints, str]:
    """([N] the true cells, NO_CELL where unknown; what is to be said of them)."""
    true_cell_N, complaint = cells.stated_cells(pairs.truth.table), ""
    if config.cells:
        is_place_N = pairs.truth.places.is_place_N
        points_deg, predictions = pairs.truth.places.point_deg_N2[is_place_N], pairs.predictions
        true_cell_N[is_place_N], complaint = cells.assigned_cells(
            config.cells, points_deg, predictions.table, predictions.name
        )
    return true_cell_N, complaint


def _ranks(pairs: Pairs, is_compared_N: Flags, true_cell_N: Ints) -> tuple[NDArray[np.int32], int]:
    """([N] where the true cells of compared rows stand among the predicted ones; how many of these a row keeps)."""
    rank_N = np.zeros(len(true_cell_N), dtype=np.int32)
    if not (true_cell_N != cells.NO_CELL).any():
        return rank_N, 0
    row_M = pairs.row_N[is_compared_N]
    true_cell_P = np.full(pairs.predictions.table.num_rows, cells.NO_CELL, dtype=np.int64)
    true_cell_P[row_M] = true_cell_N[is_compared_N]
    rank_P, num_kept = cells.ranks(pairs.predictions.table, true_cell_P)
    rank_N[is_compared_N] = rank_P[row_M]
    return rank_N, num_kept


def _rows(
    pairs: Pairs,
    is_compared_N: Flags,
    distance_km_M: NDArray[np.float64],
    true_cell_N: Ints,
    rank_N: NDArray[np.int32],
) -> pa.Table:
    """One row for each true place, in the truth's order; what has no predicted place is null."""
    is_asked_N = pairs.truth.places.is_place_N
    is_compared = is_compared_N[is_asked_N]
    found_deg_M2 = pairs.predictions.places.point_deg_N2[pairs.row_N[is_compared_N]]

    def spread(values_M: NDArray[np.float64]) -> pa.Array:
        values = np.zeros(len(is_compared))
        values[is_compared] = values_M
        return pa.array(values, mask=~is_compared)

    table = pairs.truth.table.select([name for name in ("key", "shard") if name in pairs.truth.table.column_names])
    true_deg = pairs.truth.places.point_deg_N2[is_asked_N]
    columns = {
        "true_lat": pa.array(true_deg[:, 0]),
        "true_lon": pa.array(true_deg[:, 1]),
        "lat": spread(found_deg_M2[:, 0]),
        "lon": spread(found_deg_M2[:, 1]),
        "distance_km": spread(distance_km_M),
        "geoscore": spread(geoscore(distance_km_M)),
    }
    has_cell = true_cell_N[is_asked_N] != cells.NO_CELL
    if has_cell.any():
        columns["true_cell"] = pa.array(true_cell_N[is_asked_N], mask=~has_cell)
        columns["cell_rank"] = pa.array(rank_N[is_asked_N], mask=~(has_cell & is_compared))
    table = table.filter(pa.array(is_asked_N))
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table
