"""Cells from Uber's hexagonal grid: every H3 cell of one resolution that holds a point.

Shape letters: N points, C cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.cells.building import Centroid, partition_of
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs
from geoloc_batch.geo.shapes.h3 import H3Shapes, h3_indexes


def build_h3(
    point_deg_N2: ArrayLike, res: int, *, min_points: int = 1, centroid: Centroid = "mean"
) -> tuple[Partition, NDArray[np.int64]]:
    """The H3 cells that the points fill.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        res: the grid's resolution, 0 (122 cells on Earth, about 2,200 km wide) to 15.
        min_points: cells with fewer points are left out; their points belong to the nearest centroid.
        centroid: the spherical mean of the cell's points, or the grid's own centre.

    Returns:
        The partition: ids 0 to C - 1 in ascending order of H3 index. And [N] the id of each point's cell.

    Raises:
        PartitionError: there is no point, a point is no place on Earth, `res` is not from 0 to 15, or no cell holds
            `min_points` points.
    """
    if not 0 <= res <= 15:
        raise PartitionError(f"an H3 resolution is from 0 to 15, got {res}")
    points = check_pairs(point_deg_N2)
    shapes = H3Shapes(np.unique(h3_indexes(points, res)))
    source = f"the H3 cells of resolution {res}"
    return partition_of(shapes, points, source=source, min_points=max(min_points, 1), centroid=centroid)
