"""Boxes that choose points: by four numbers, or by a region's name.

Shape letters: N points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Between two parallels and two meridians, edges included. West of a greater number than east: across 180."""

    south: float
    west: float
    north: float
    east: float

    def __post_init__(self) -> None:
        bounds = (self.south, self.west, self.north, self.east)
        is_place = all(abs(value) <= limit for value, limit in zip(bounds, (90, 180, 90, 180), strict=True))
        if not is_place or self.south >= self.north or self.west in (self.east, self.east + 360):
            raise ConfigError(
                f"--bbox takes SOUTH WEST NORTH EAST in degrees, such as 34 -25 72 45, got "
                f"{' '.join(f'{value:g}' for value in bounds)}"
            )

    def holds(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[N] whether each (lat, lon) lies in the box."""
        lat_N, lon_N = point_deg_N2[:, 0], point_deg_N2[:, 1]
        after, before = lon_N >= self.west, lon_N <= self.east
        between = (after & before) if self.west < self.east else (after | before)
        # 180 and -180 are one meridian.
        between |= (np.abs(lon_N) == 180) & (max(self.west, self.east) == 180 or min(self.west, self.east) == -180)
        return np.asarray((lat_N >= self.south) & (lat_N <= self.north) & between)


REGIONS = {
    # The domain of Copernicus' regional air quality forecasts (CAMS: 25 W to 45 E, 30 to 72 N), cut at 34 N: with
    # Cyprus, Crete and Iceland, without most of North Africa, the Canaries and Svalbard.
    "europe": Box(south=34.0, west=-25.0, north=72.0, east=45.0),
    "world": Box(south=-90.0, west=-180.0, north=90.0, east=180.0),
}
"""Boxes with names, for `--region`."""
