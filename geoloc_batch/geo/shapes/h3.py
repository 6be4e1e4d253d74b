"""Cells of Uber's hexagonal grid, of one resolution or of several.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM

_STERADIAN_KM2 = EARTH_RADIUS_KM**2


class H3Shapes(Shapes):
    """C cells of the H3 grid; a point goes to the finest of them that holds it.

    Raises:
        PartitionError: an index is no H3 cell, or stands twice.
    """

    kind: ClassVar[str] = "h3"

    def __init__(self, index_C: ArrayLike) -> None:
        import h3.api.basic_int as h3

        self.index_C = np.array(index_C, dtype=np.uint64)
        """[C] the cells' 64-bit indexes."""
        self.index_C.setflags(write=False)
        for row, index in enumerate(self.index_C.tolist()):
            if not h3.is_valid_cell(index):
                raise PartitionError(f"cell {row} of the partition has the H3 index {index:x}, which is no H3 cell")
        if len(np.unique(self.index_C)) != len(self.index_C):
            raise PartitionError("an H3 cell stands twice in the partition")
        self._resolutions = sorted({h3.get_resolution(index) for index in self.index_C.tolist()}, reverse=True)
        self._order = np.argsort(self.index_C)

    @classmethod
    def from_names(cls, names: Sequence[str]) -> H3Shapes:
        """Of indexes in hexadecimal, such as 841fb47ffffffff."""
        try:
            return cls([int(name, 16) for name in names])
        except (ValueError, OverflowError) as error:
            if isinstance(error, PartitionError):
                raise
            raise PartitionError(f"an H3 index is a hexadecimal number of 64 bits: {error}") from error

    @property
    def names(self) -> list[str]:
        """[C] the indexes in hexadecimal."""
        return [f"{index:x}" for index in self.index_C.tolist()]

    def __len__(self) -> int:
        return len(self.index_C)

    def take(self, rows: NDArray[np.intp]) -> H3Shapes:
        """The cells named by `rows`."""
        return H3Shapes(self.index_C[rows])

    def canonical_bytes(self) -> bytes:
        """The indexes."""
        return self.index_C.astype("<u8").tobytes()

    def centres_deg(self) -> NDArray[np.float64]:
        """[C, 2] the grid's own centres."""
        import h3.api.basic_int as h3

        return np.array([h3.cell_to_latlng(index) for index in self.index_C.tolist()]).reshape(-1, 2)

    def areas_km2(self) -> NDArray[np.float64]:
        """[C] of the exact outlines."""
        import h3.api.basic_int as h3

        return np.array([h3.cell_area(index, unit="rads^2") for index in self.index_C.tolist()]) * _STERADIAN_KM2

    def geometries(self) -> NDArray[np.object_]:
        """[C] polygons of the corners; their edges are great circles in truth."""
        import h3.api.basic_int as h3
        import shapely

        from geoloc_batch.geo.shapes.antimeridian import on_the_map

        corners = [np.array(h3.cell_to_boundary(index))[:, ::-1] for index in self.index_C.tolist()]
        return on_the_map(np.array([shapely.Polygon(ring) for ring in corners], dtype=object))

    def _find(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        row_N = np.full(len(point_deg_N2), -1, dtype=np.intp)
        sorted_C = self.index_C[self._order]
        for res in self._resolutions:
            open_N = np.flatnonzero(row_N < 0)
            index = h3_indexes(point_deg_N2[open_N], res)
            place = np.minimum(np.searchsorted(sorted_C, index), len(sorted_C) - 1)
            row_N[open_N] = np.where(sorted_C[place] == index, self._order[place], -1)
        return row_N

    def _at_pole(self, lat: float) -> int:
        # The grid gives a pole one cell, whatever its longitude.
        return -1


def h3_indexes(point_deg_N2: NDArray[np.float64], res: int) -> NDArray[np.uint64]:
    """[N] the index of the H3 cell of resolution `res` that holds each point (degrees, checked by the caller)."""
    import h3.api.basic_int as h3

    # The grid's library takes one point a call; this loop costs 0.6 us a point and no list of results.
    lat, lon = point_deg_N2[:, 0].tolist(), point_deg_N2[:, 1].tolist()
    return np.fromiter(map(h3.latlng_to_cell, lat, lon, repeat(res)), dtype=np.uint64, count=len(lat))
