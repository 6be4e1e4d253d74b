"""Cells: which one is the true one of each row, and where it stands among those that were predicted.

Shape letters: N rows of the truth, P predictions.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from geoloc_batch.errors import ConfigError, PartitionError
from geoloc_batch.geo.metrics import cell_ranks
from geoloc_batch.geo.partition import load_partition

Ints = NDArray[np.int64]
NO_CELL = -1


def has_cells(predictions: pa.Table) -> bool:
    """Whether predictions say which cells they mean."""
    return bool({"cell", "topk_cell"} & set(predictions.column_names))


def assigned_cells(path: str, point_deg_N2: NDArray[np.float64], predictions: pa.Table, name: str) -> tuple[Ints, str]:
    """The cell of a partition that each true place lies in, or whose centroid is nearest where it lies in none.

    Args:
        path: the partition, as --cells names it.
        point_deg_N2: [N, 2] places on Earth.
        predictions: must be of cells of this partition.
        name: what messages call them.

    Returns:
        ([N] ids; how many places lie in no cell, in words, "" where that does not happen).

    Raises:
        ConfigError: the predictions have no cells.
        PartitionError: the partition cannot be read, or lacks a cell that was predicted.
    """
    if not has_cells(predictions):
        raise ConfigError(f"--cells {path} needs predictions with a column cell or topk_cell; {name} has neither")
    partition = load_partition(path)
    column = "topk_cell" if "topk_cell" in predictions.column_names else "cell"
    chunks = [pc.list_flatten(chunk) if column == "topk_cell" else chunk for chunk in predictions[column].chunks]
    predicted = pc.unique(pa.chunked_array(chunks, type=pa.int64())).drop_null().to_numpy(zero_copy_only=False)
    strange = np.sort(predicted[~np.isin(predicted, partition.ids)])
    if len(strange):
        raise PartitionError(
            f"--cells {path} has no cell {strange[0]}, which {name} predicts ({len(strange)} such cells); "
            f"give the cells that the head was used with"
        )
    assigned = partition.locate(point_deg_N2[:, 0], point_deg_N2[:, 1])
    return assigned.ids, assigned.complaint(partition)


def stated_cells(truth: pa.Table) -> Ints:
    """The truth's own column `cell`, [N], NO_CELL where it says none."""
    if "cell" not in truth.column_names:
        return np.full(truth.num_rows, NO_CELL, dtype=np.int64)
    return _numbers(truth["cell"])


def ranks(predictions: pa.Table, true_cell_P: Ints) -> tuple[NDArray[np.int32], int]:
    """Where the true cell stands among those that were predicted.

    Args:
        predictions: P rows with `topk_cell`, or with `cell` alone, or with neither.
        true_cell_P: [P] ids.

    Returns:
        ([P] 1 for the most probable cell, 0 where it is not among those kept; how many a row keeps, at most).
    """
    if "topk_cell" not in predictions.column_names:
        if "cell" not in predictions.column_names:
            return np.zeros(len(true_cell_P), dtype=np.int32), 0
        return (_numbers(predictions["cell"]) == true_cell_P).astype(np.int32), 1
    parts, max_kept, start = [np.empty(0, dtype=np.int32)], 0, 0
    for chunk in predictions["topk_cell"].chunks:
        num_kept = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        kept = _numbers(pa.chunked_array([pc.list_flatten(chunk)]))
        parts.append(cell_ranks(true_cell_P[start : start + len(chunk)], num_kept, kept))
        max_kept, start = max(max_kept, int(num_kept.max(initial=0))), start + len(chunk)
    return np.concatenate(parts), max_kept


def _numbers(column: pa.ChunkedArray) -> Ints:
    return np.asarray(pc.fill_null(column, NO_CELL).to_numpy(), dtype=np.int64)
