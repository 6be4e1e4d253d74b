"""A description of cells: how many, how large, how full.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, unit_vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a quantity is spread over the cells."""

    min: float
    p10: float
    median: float
    p90: float
    max: float
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What `geoloc cells show` ends with."""

    cells: int
    shapes: str | None
    """h3, box, polygon; None where only centroids are known."""
    parents: int | None
    """How many different parents the cells have."""
    names: bool
    fingerprint: str
    points: int | None
    """Points that were counted: the given ones, else what the file says its cells were built from."""
    points_outside: int | None
    """Of the given points: those that no cell's shape holds; each counts for the nearest centroid's cell."""
    empty_cells: int | None
    points_per_cell: Spread | None
    area_km2: Spread | None
    radius_km: Spread | None
    """Of discs of the same areas."""
    nearest_centroid_km: Spread | None
    """From each centroid to the next one."""
    map: str


def describe(partition: Partition, point_deg_N2: NDArray[np.float64] | None = None, map_file: str = "") -> Shown:
    """Describe a partition, with the points per cell where points are given or the file says."""
    counts, outside = count_points(partition, point_deg_N2)
    areas = None if partition.shapes is None else partition.shapes.areas_km2()
    return Shown(
        cells=len(partition),
        shapes=None if partition.shapes is None else partition.shapes.kind,
        parents=None if partition.parents is None else len(np.unique(partition.parents)),
        names=partition.names is not None,
        fingerprint=partition.fingerprint,
        points=None if counts is None else int(counts.sum()),
        points_outside=outside,
        empty_cells=None if counts is None else int((counts == 0).sum()),
        points_per_cell=None if counts is None else _spread(counts),
        area_km2=None if areas is None else _spread(areas),
        radius_km=None if areas is None else _spread(np.sqrt(areas / np.pi)),
        nearest_centroid_km=_spread(_nearest_km(partition)) if len(partition) > 1 else None,
        map=map_file,
    )


def count_points(
    partition: Partition, point_deg_N2: NDArray[np.float64] | None
) -> tuple[NDArray[np.int64] | None, int | None]:
    """[C] points per cell, and how many of them lie in none; from the detail `points` where no points are given."""
    if point_deg_N2 is not None:
        found = partition.locate(point_deg_N2[:, 0], point_deg_N2[:, 1])
        row_N = np.searchsorted(partition.ids, found.ids)
        counts = np.bincount(row_N, minlength=len(partition)).astype(np.int64)
        return counts, None if partition.shapes is None else found.num_outside
    known = [detail.get("points") for detail in partition.details]
    whole = [count for count in known if isinstance(count, int) and not isinstance(count, bool)]
    if not known or len(whole) < len(known):
        return None, None
    return np.array(whole, dtype=np.int64), None


def _nearest_km(partition: Partition) -> NDArray[np.float64]:
    from scipy.spatial import cKDTree

    vector_C3 = unit_vectors(partition.centroids_deg)
    chord_C2, _ = cKDTree(vector_C3).query(vector_C3, k=2)
    return np.asarray(2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord_C2[:, 1] / 2, 1)))


def _spread(values: NDArray[np.float64] | NDArray[np.int64]) -> Spread:
    low, p10, median, p90, high = (round(float(each), 3) for each in np.percentile(values, [0, 10, 50, 90, 100]))
    return Spread(min=low, p10=p10, median=median, p90=p90, max=high, mean=round(float(values.mean()), 3))
