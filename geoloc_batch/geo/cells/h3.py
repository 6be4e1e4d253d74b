"""Cells from Uber's hexagonal grid: every H3 cell of one resolution that holds a point.

Shape letters: N points, C cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.partition import Partition, check_points
from geoloc_batch.geo.sphere import points_deg, unit_vectors


def build_h3(point_deg_N2: ArrayLike, res: int) -> tuple[Partition, NDArray[np.int64]]:
    """The H3 cells that the points fill.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        res: the grid's resolution, 0 (122 cells on Earth, about 2,200 km wide) to 15.

    Returns:
        The partition: ids 0 to C - 1 in ascending order of H3 index, each centroid the spherical mean of the cell's
        points, the index as text in the detail `h3`. And [N] the id of each point's cell.

    Raises:
        PartitionError: there is no point, a point is no place on Earth, or `res` is not from 0 to 15.
    """
    import h3.api.basic_int as h3

    if not 0 <= res <= 15:
        raise PartitionError(f"an H3 resolution is from 0 to 15, got {res}")
    points = np.asarray(point_deg_N2, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise PartitionError(f"points must be [N, 2] (lat, lon) with N > 0, got the shape {points.shape}")
    points = check_points(points[:, 0], points[:, 1])
    index_N = np.array([h3.latlng_to_cell(lat, lon, res) for lat, lon in points.tolist()], dtype=np.uint64)
    index_C, cell_N = np.unique(index_N, return_inverse=True)
    sum_C3 = np.zeros((len(index_C), 3))
    np.add.at(sum_C3, cell_N, unit_vectors(points))
    partition = Partition(
        ids=np.arange(len(index_C), dtype=np.int64),
        centroids_deg=points_deg(sum_C3),
        details=[{"h3": h3.int_to_str(index)} for index in index_C.tolist()],
        source=f"the H3 cells of resolution {res}",
    )
    return partition, cell_N.astype(np.int64)
