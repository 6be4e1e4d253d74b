"""OpenStreetView-5M's quadtree: cluster_id, min_lat, min_lon, max_lat, max_lon, mean_lat, mean_lon.

Source: Astruc et al., "OpenStreetView-5M: The Many Roads to Global Visual Geolocation", CVPR 2024; the file
quadtree_10_1000.csv beside their data set.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.formats.geocell_info import BOX_FIELDS, MAX_ID
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.boxes import BoxShapes

_COLUMNS = ("cluster_id", *BOX_FIELDS, "mean_lat", "mean_lon")


def read_quadtree(path: Path) -> Partition:
    """Read such a file, its rows in any order: cells are boxes, centroids the means of the training points.

    Raises:
        PartitionError: the file cannot be read, a column is missing, or a value is no number; names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise PartitionError(
                    f"{path} has no column {missing[0]}: a CSV of cells is OSV-5M's quadtree, with the columns "
                    f"{', '.join(_COLUMNS)}"
                )
            values = [[_number(row[name], name, rows.line_num, path) for name in _COLUMNS] for row in rows]
    except FileNotFoundError:
        raise PartitionError(f"no such file of cells: {path}; give OSV-5M's quadtree or a geocell_info.json") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PartitionError(f"{path} cannot be read as a CSV of cells: {error}") from error
    if not values:
        raise PartitionError(f"{path} holds no cell")
    table = np.array(sorted(values))
    bad = (table[:, 0] != np.round(table[:, 0])) | (table[:, 0] < 0) | (table[:, 0] > MAX_ID)
    if bad.any():
        raise PartitionError(f"{path}: {table[bad][0, 0]:g} is no id of a cell: ids are from 0 to {MAX_ID}")
    try:
        shapes = BoxShapes(table[:, 1:5])
    except PartitionError as error:
        raise PartitionError(f"{path}: {error}") from error
    return Partition(ids=table[:, 0].astype(np.int64), centroids_deg=table[:, 5:7], source=str(path), shapes=shapes)


def _number(text: str | None, name: str, line: int, path: Path) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if value != value:
        raise PartitionError(f"{path}, line {line}: {name} is {(text or '')[:40]!r}, which is no number")
    return value
