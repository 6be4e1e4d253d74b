"""Cells of a quadtree: boxes on the map, halved both ways while they hold many points.

Shape letters: N points, C cells.

Source: Astruc et al., "OpenStreetView-5M: The Many Roads to Global Visual Geolocation", CVPR 2024: the tree's rule,
with depth 10 and 1000 points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.bbox import Box
from geoloc_batch.geo.cells.building import Centroid, Frame, partition_of
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs
from geoloc_batch.geo.shapes.boxes import BoxShapes


def build_quadtree(
    point_deg_N2: ArrayLike,
    max_points: int = 1000,
    depth: int = 10,
    *,
    bbox: Box | None = None,
    min_points: int = 1,
    centroid: Centroid = "mean",
) -> tuple[Partition, NDArray[np.int64]]:
    """The leaves of the tree that hold a point.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        max_points: a box that holds this many or more is cut into four, by its middle parallel and meridian.
        depth: how often at most.
        bbox: the box to begin with; without one the smallest that holds the points.
        min_points: cells with fewer points are left out; their points belong to the nearest centroid.
        centroid: the spherical mean of the cell's points, or the box's centre.

    Returns:
        The partition: ids 0 to C - 1 in the tree's order, south before north, then west before east. And [N] the id
        of each point's cell.

    Raises:
        PartitionError: there is no point, a point is no place on Earth, a number is out of range, or no cell holds
            `min_points` points.
    """
    if max_points < 1:
        raise PartitionError(f"--max-points must be at least 1, got {max_points}")
    if not 0 <= depth <= 40:
        raise PartitionError(f"--depth must be from 0 to 40, got {depth}")
    points = check_pairs(point_deg_N2)
    frame = Frame(points, bbox)
    unrolled = frame.unrolled(points)
    leaves = []
    stack = [(frame.low, frame.high, np.arange(len(points)), depth)]
    while stack:
        low, high, rows, levels = stack.pop()
        if len(rows) < max_points or levels == 0:
            leaves.append(np.concatenate([low, high]))
            continue
        middle = (low + high) / 2
        is_north, is_east = (unrolled[rows] >= middle).T
        # The last one pushed is the first one cut: south-west first.
        for north, east in ((1, 1), (1, 0), (0, 1), (0, 0)):
            quarter = rows[(is_north == north) & (is_east == east)]
            if len(quarter):
                way = np.array([north, east])
                corner = np.where(way, middle, low), np.where(way, high, middle)
                stack.append((*corner, quarter, levels - 1))
    shapes = BoxShapes(frame.rolled(np.array(leaves)))
    source = f"the quadtree of {max_points} points and depth {depth}"
    return partition_of(shapes, points, source=source, min_points=max(min_points, 1), centroid=centroid)
