"""Shapes: the outlines of a partition's cells, and the search for the one that holds a point.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

# Searches hold a few hundred bytes a point: more points go in turns.
_POINTS_AT_ONCE = 1 << 19


class Shapes(ABC):
    """The outlines of C cells, in the order of the partition's ids. They never change.

    A place has many names on a map: all longitudes meet at a pole, and -180 is 180. `find` gives one answer for all
    of a place's names.
    """

    kind: ClassVar[str]
    """The word that files use: h3, box or polygon."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: NDArray[np.intp]) -> Shapes:
        """The outlines of the cells named by `rows`, in that order."""

    @abstractmethod
    def canonical_bytes(self) -> bytes:
        """What the fingerprint covers."""

    @abstractmethod
    def centres_deg(self) -> NDArray[np.float64]:
        """[C, 2] (lat, lon) of each outline's centre of gravity on the sphere."""

    @abstractmethod
    def areas_km2(self) -> NDArray[np.float64]:
        """[C] square kilometres."""

    @abstractmethod
    def geometries(self) -> NDArray[np.object_]:
        """[C] shapely polygons in (lon, lat), split at the antimeridian where they lie across it."""

    @abstractmethod
    def _find(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        """[N] the row of the cell that holds each point, as the map has it; -1 for none."""

    @abstractmethod
    def _at_pole(self, lat: float) -> int:
        """The lowest row of the cells that touch the pole at `lat` (90 or -90); -1 where `_find` knows better."""

    def find(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        """The cell that holds each point.

        Args:
            point_deg_N2: [N, 2] (lat, lon) in degrees, checked by the caller.

        Returns:
            [N] rows, -1 for a point that no cell holds. An edge belongs to both its cells: for boxes the one to the
            north or east of it takes the point, for polygons the one with the lower id, as at the poles.
        """
        found = [
            self._find_all_names(point_deg_N2[start : start + _POINTS_AT_ONCE])
            for start in range(0, len(point_deg_N2), _POINTS_AT_ONCE)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.intp)

    def _find_all_names(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        point_deg_N2 = point_deg_N2.copy()
        lat_N, lon_N = point_deg_N2[:, 0], point_deg_N2[:, 1]
        lon_N[lon_N == 180] = -180
        row_N = self._find(point_deg_N2)
        again = np.flatnonzero((row_N < 0) & (lon_N == -180))
        if len(again):
            row_N[again] = self._find(np.stack([lat_N[again], np.full(len(again), 180.0)], axis=-1))
        for pole in (90.0, -90.0):
            at_pole_N = lat_N == pole
            if at_pole_N.any():
                row = self._at_pole(pole)
                row_N[at_pole_N] = row if row >= 0 else row_N[at_pole_N]
        return row_N


def first_pairs(point: NDArray[Any], row: NDArray[Any], rank: NDArray[Any], num_points: int) -> NDArray[np.intp]:
    """[N] of (point, row) pairs in any order the row of least (rank, row) for each point; -1 for points without."""
    row_N = np.full(num_points, -1, dtype=np.intp)
    # Backwards, so that the best is written last.
    order = np.lexsort((row, rank, point))[::-1]
    row_N[point[order]] = row[order]
    return row_N
