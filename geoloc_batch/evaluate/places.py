"""What may be wrong with coordinates: missing, out of range, null island, lat and lon swapped.

Shape letters: N rows. Coordinates as they stand in a file may be NaN, infinite or beyond the poles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.metrics import distances_km

Floats = NDArray[np.float64]
# Swapping must bring the median down to this share at least: half of a mere guesser's rows improve by swapping, too.
_SWAPPED_MEDIAN = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """N coordinates and what they are."""

    point_deg_N2: Floats
    """[N, 2] (lat, lon) as they stand in the file."""
    is_missing_N: NDArray[np.bool_]
    """[N] one of the two is not there, or NaN."""
    is_out_of_range_N: NDArray[np.bool_]
    """[N] both are there, and are no place on Earth."""
    is_null_island_N: NDArray[np.bool_]
    """[N] exactly (0, 0): a gap that was filled with zeros, nearly always."""

    @property
    def is_place_N(self) -> NDArray[np.bool_]:  # noqa: N802
        """[N] a place on Earth. (0, 0) is one: it is told, and stays."""
        return ~(self.is_missing_N | self.is_out_of_range_N)


def look_at(lat_N: Floats, lon_N: Floats) -> Places:
    """Sort coordinates by what they are.

    Args:
        lat_N: [N] degrees, NaN where there is none.
        lon_N: likewise.
    """
    point_deg_N2 = np.stack([lat_N, lon_N], axis=-1)
    is_missing_N = np.asarray(np.isnan(point_deg_N2).any(axis=1))
    return Places(
        point_deg_N2=point_deg_N2,
        is_missing_N=is_missing_N,
        is_out_of_range_N=~is_missing_N & ~_on_earth(point_deg_N2),
        is_null_island_N=(point_deg_N2 == 0).all(axis=1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """How much closer rows come when lat and lon of one side are swapped."""

    side: str
    """`truth` or `predictions`."""
    is_sure: bool
    """False where the other side may be the wrong one as well: swapping either brings the two together."""
    num_closer: int
    num_rows: int
    median_km: float
    """With what is in the files; infinite where most rows are no places."""
    swapped_median_km: float


def find_swap(found_deg_N2: Floats, truth_deg_N2: Floats) -> Swap | None:
    """Whether one side's lat and lon look swapped: most rows come closer by swapping, and the median falls.

    Args:
        found_deg_N2: [N, 2] as they stand in the file, none missing.
        truth_deg_N2: likewise, row by row.

    Returns:
        The side that it is, or None. Where both would do, the one with more coordinates beyond the poles; else the
        truth, which no tool of ours has written.
    """
    if not len(found_deg_N2):
        return None
    sides = {"truth": truth_deg_N2, "predictions": found_deg_N2}
    given_km_N = _reach(found_deg_N2, truth_deg_N2)
    swaps = []
    for side in sides:
        found, truth = (sides[name][:, :: -1 if name == side else 1] for name in ("predictions", "truth"))
        swapped_km_N = _reach(found, truth)
        swap = Swap(
            side=side,
            is_sure=True,
            num_closer=int((swapped_km_N < given_km_N).sum()),
            num_rows=len(given_km_N),
            median_km=_middle(given_km_N),
            swapped_median_km=_middle(swapped_km_N),
        )
        if 2 * swap.num_closer > swap.num_rows and swap.swapped_median_km < _SWAPPED_MEDIAN * swap.median_km:
            swaps.append(swap)
    num_wrong = {side: int((~_on_earth(points)).sum()) for side, points in sides.items()}
    swaps.sort(key=lambda swap: -num_wrong[swap.side])
    if len(swaps) == 2 and num_wrong["truth"] == num_wrong["predictions"]:
        return replace(swaps[0], is_sure=False)
    return swaps[0] if swaps else None


def _on_earth(point_deg_N2: Floats) -> NDArray[np.bool_]:
    return np.asarray((np.abs(point_deg_N2[:, 0]) <= 90) & (np.abs(point_deg_N2[:, 1]) <= 180))


def _reach(found_deg_N2: Floats, truth_deg_N2: Floats) -> Floats:
    """Distances; infinite where one of the two is no place."""
    is_place_N = _on_earth(found_deg_N2) & _on_earth(truth_deg_N2)
    distance_km_N = np.full(len(found_deg_N2), np.inf)
    distance_km_N[is_place_N] = distances_km(found_deg_N2[is_place_N], truth_deg_N2[is_place_N])
    return distance_km_N


def _middle(distance_km_N: Floats) -> float:
    """The upper of the two middle values: no mean of a finite and an infinite one."""
    middle = len(distance_km_N) // 2
    return float(np.partition(distance_km_N, middle)[middle])
