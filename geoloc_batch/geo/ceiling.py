"""The ceiling of a partition: how near a head could come that never mistakes the cell.

Shape letters: N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.geo.metrics import distances_km, summarise
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Distances from points to the centroids of their cells."""

    points: int
    percent: dict[str, float]
    """By band (`within_25_km`): the share of points at that distance or nearer."""
    median_km: float
    mean_km: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """The best that any head can do on these cells, if it answers centroids."""

    cells: int
    points: int
    outside: int
    """Points that no cell's shape holds; all, where the partition has no shapes."""
    nearest_is_not_containing_percent: float | None
    """Of the points in a cell: those for which another cell's centroid is nearer."""
    containment: Reach | None
    """Of the points in a cell: a head that always names the cell that holds the point."""
    assigned: Reach
    """Of all points: the cell that holds the point, else the one with the nearest centroid."""
    nearest: Reach
    """Of all points: a head that always names the cell with the nearest centroid. No head comes nearer."""


def ceiling(partition: Partition, point_deg_N2: ArrayLike, thresholds_km: Sequence[float] = ()) -> Ceiling:
    """Measure the ceiling of a partition on points.

    Args:
        partition: the cells.
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        thresholds_km: bands to report besides the field's own.

    Raises:
        PartitionError: there is no point, or a point is no place on Earth.
    """
    points = check_pairs(point_deg_N2)
    found = partition.locate(points[:, 0], points[:, 1])
    nearest_N = partition.nearest(points[:, 0], points[:, 1])
    assigned_km_N = distances_km(partition.centroids_of(found.ids), points)
    nearest_km_N = distances_km(partition.centroids_of(nearest_N), points)
    inside = found.inside
    differs = float((nearest_N != found.ids)[inside].mean() * 100) if inside.any() else None
    return Ceiling(
        cells=len(partition),
        points=len(points),
        outside=found.num_outside,
        nearest_is_not_containing_percent=differs,
        containment=_reach(assigned_km_N[inside], thresholds_km) if inside.any() else None,
        assigned=_reach(assigned_km_N, thresholds_km),
        nearest=_reach(nearest_km_N, thresholds_km),
    )


def _reach(distance_km_N: NDArray[np.float64], thresholds_km: Sequence[float]) -> Reach:
    found = summarise(distance_km_N, asked=len(distance_km_N), thresholds_km=thresholds_km)
    return Reach(
        points=found.rows,
        percent={band.name: band.percent for band in found.bands},
        median_km=found.median_km,
        mean_km=found.mean_km,
    )
