"""Metrics: how far places are from the truth, in the figures that the field's tables have.

Shape letters: N rows, E entries of all the lists of cells, T thresholds. Shares are percent, distances km.

Tables differ in details that move their last digits. A distance of exactly the threshold counts as within (<=) in the
code of GeoEstimation (Müller-Budack et al., ECCV 2018) and GeoCLIP (NeurIPS 2023), and doesn't (<) in that of
OSV-5M and PIGEON (both CVPR 2024): here it is `<=`, or `<` where `is_strict`. GeoEstimation and OSV-5M measure on a
ball of 6371 km, as here; PIGEON on one of 6378.137 km; GeoCLIP along the WGS84 ellipsoid. PIGEON rounds each row's
GeoScore to a whole number; OSV-5M doesn't, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km

BANDS_KM = (1.0, 25.0, 200.0, 750.0, 2500.0)
"""Street, city, region, country, continent: the thresholds of the field's tables."""
BALSCORE_BANDS_KM = (25.0, 200.0, 750.0)
GEOSCORE_MAX = 5000.0
GEOSCORE_DECAY_KM = 1492.7

# Rows whose distances are computed at once: the formula's temporaries stay small beside the columns.
_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """The share of rows within a distance."""

    threshold_km: float
    percent: float

    @property
    def name(self) -> str:
        """within_25_km, within_0.5_km."""
        text = repr(self.threshold_km)
        return f"within_{text.removesuffix('.0')}_km"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What a set of distances comes to."""

    rows: int
    """Rows with a predicted and a true place: what all but coverage is about."""
    asked: int
    """Rows that should have been predicted."""
    cell_rows: int
    """Rows whose true cell is known: what top_1 and top_5 are about."""
    top_1: float | None
    """Percent of cell_rows whose most probable cell is the true one; None where that is not known."""
    top_5: float | None
    """Likewise for the five most probable ones."""
    median_km: float
    mean_km: float
    bands: tuple[Band, ...]
    """Ascending: those of BANDS_KM, and what else was asked for."""
    balscore: float
    """Percent."""
    geoscore: float
    """Mean over the rows, 0 to 5000."""
    is_strict: bool
    """A row at exactly the threshold is outside (<), else inside (<=)."""

    @property
    def coverage(self) -> float:
        """Percent of what was asked that has a predicted place."""
        return 100.0 * self.rows / self.asked

    @property
    def comparison(self) -> str:
        """`<` or `<=`."""
        return "<" if self.is_strict else "<="

    def by_name(self) -> dict[str, float | int | str | None]:
        """Every figure under its name, with what it takes to compare it with other tables."""
        return {
            "top_1": self.top_1,
            "top_5": self.top_5,
            "median_km": self.median_km,
            "mean_km": self.mean_km,
            **{band.name: band.percent for band in self.bands},
            "balscore": self.balscore,
            "geoscore": self.geoscore,
            "coverage": self.coverage,
            "rows": self.rows,
            "asked": self.asked,
            "cell_rows": self.cell_rows,
            "comparison": self.comparison,
            "radius_km": EARTH_RADIUS_KM,
        }


def distances_km(found_deg_N2: ArrayLike, truth_deg_N2: ArrayLike) -> NDArray[np.float64]:
    """haversine_km row by row, in memory that does not grow with the formula's temporaries.

    Args:
        found_deg_N2: [N, 2] (lat, lon) in degrees.
        truth_deg_N2: [N, 2] likewise.

    Returns:
        [N] kilometres.
    """
    found, truth = np.asarray(found_deg_N2, dtype=np.float64), np.asarray(truth_deg_N2, dtype=np.float64)
    if found.shape != truth.shape or found.ndim != 2:
        raise ValueError(f"distances are between two lists of one length, got the shapes {found.shape}, {truth.shape}")
    distance_km_N = np.empty(len(found))
    for start in range(0, len(found), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        distance_km_N[rows] = haversine_km(found[rows], truth[rows])
    return distance_km_N


def geoscore(distance_km: ArrayLike) -> NDArray[np.float64]:
    """5000 exp(-d / 1492.7): 5000 on the spot, near 0 at the other end of the Earth.

    Args:
        distance_km: [...] kilometres.

    Returns:
        [...] in (0, 5000].

    Source: Haas et al., "PIGEON: Predicting Image Geolocations" (CVPR 2024), after the game GeoGuessr; Astruc et al.,
    "OpenStreetView-5M" (CVPR 2024).
    """
    return np.asarray(GEOSCORE_MAX * np.exp(np.asarray(distance_km, dtype=np.float64) / -GEOSCORE_DECAY_KM))


def balscore(percent_25: float, percent_200: float, percent_750: float) -> float:
    """The geometric mean of the percentages within 25, 200 and 750 km: what the published heads were chosen by."""
    return float(np.cbrt(percent_25 * percent_200 * percent_750))


def cell_ranks(true_cell_N: ArrayLike, num_kept_N: ArrayLike, kept_cell_E: ArrayLike) -> NDArray[np.int32]:
    """Where the true cell stands among those that were kept of each row.

    Args:
        true_cell_N: [N] ids.
        num_kept_N: [N] how many cells each row kept.
        kept_cell_E: [E] the rows' cells one after the other, most probable first; E is the sum of num_kept_N.

    Returns:
        [N] 1 for the most probable one, 0 where the true cell is not among them.
    """
    true_cell = np.asarray(true_cell_N, dtype=np.int64)
    num_kept, kept_cell_E = np.asarray(num_kept_N, dtype=np.int64), np.asarray(kept_cell_E)
    if num_kept.shape != true_cell.shape or num_kept.sum() != len(kept_cell_E):
        raise ValueError(f"{len(kept_cell_E)} cells are not what {len(true_cell)} rows kept")
    row_E = np.repeat(np.arange(len(true_cell)), num_kept)
    start_N = np.cumsum(num_kept) - num_kept
    hit = np.flatnonzero(kept_cell_E == true_cell[row_E])
    rank_N = np.zeros(len(true_cell), dtype=np.int32)
    # Backwards: should a cell stand twice in a row, its first place is written last.
    hit = hit[::-1]
    rank_N[row_E[hit]] = hit - start_N[row_E[hit]] + 1
    return rank_N


def summarise(
    distance_km_N: ArrayLike,
    *,
    asked: int | None = None,
    cell_rank: ArrayLike | None = None,
    num_kept: int = 0,
    thresholds_km: Sequence[float] = (),
    is_strict: bool = False,
) -> Metrics:
    """All metrics of a set of distances. The same rows in another order give the same figures to the last bit.

    Args:
        distance_km_N: [N] kilometres, N > 0.
        asked: rows that should have been predicted, N or more; None for N.
        cell_rank: ranks of the rows whose true cell is known, as `cell_ranks` gives them; None where none is.
        num_kept: how many cells the rows keep: with fewer than five, top_5 is unknown.
        thresholds_km: distances for further bands.
        is_strict: a row at exactly a threshold is outside.

    Raises:
        ValueError: there is no row, a distance or threshold is negative or not finite, or fewer rows were asked for
            than there are.
    """
    # Sorted once, the median, the bands and the order of summation all follow from it.
    sorted_km_N = np.sort(np.asarray(distance_km_N, dtype=np.float64))
    num_rows = len(sorted_km_N)
    if not num_rows:
        raise ValueError("metrics of no row at all are undefined")
    # NaN is sorted to the end.
    if sorted_km_N[0] < 0 or not np.isfinite(sorted_km_N[-1]):
        raise ValueError("distances must be finite and not negative; leave out the rows that have none")
    if asked is not None and asked < num_rows:
        raise ValueError(f"{asked} rows were asked for, yet there are {num_rows}")
    bands = _bands(sorted_km_N, thresholds_km, is_strict=is_strict)
    percent = {band.threshold_km: band.percent for band in bands}
    rank = np.zeros(0, dtype=np.int32) if cell_rank is None else np.asarray(cell_rank)
    return Metrics(
        rows=num_rows,
        asked=num_rows if asked is None else asked,
        cell_rows=len(rank),
        top_1=_top(rank, 1, num_kept),
        top_5=_top(rank, 5, num_kept),
        median_km=float((sorted_km_N[(num_rows - 1) // 2] + sorted_km_N[num_rows // 2]) / 2),
        mean_km=float(sorted_km_N.mean()),
        bands=bands,
        balscore=balscore(*(percent[threshold] for threshold in BALSCORE_BANDS_KM)),
        geoscore=float(geoscore(sorted_km_N).mean()),
        is_strict=is_strict,
    )


def _bands(sorted_km_N: NDArray[np.float64], thresholds_km: Sequence[float], *, is_strict: bool) -> tuple[Band, ...]:
    threshold_T = sorted({*BANDS_KM, *map(float, thresholds_km)})
    if not (np.isfinite(threshold_T).all() and threshold_T[0] > 0):
        raise ValueError(f"thresholds must be finite and above 0 km, got {threshold_T}")
    count_T = np.searchsorted(sorted_km_N, threshold_T, side="left" if is_strict else "right")
    return tuple(
        Band(threshold_km=threshold, percent=100.0 * int(count) / len(sorted_km_N))
        for threshold, count in zip(threshold_T, count_T, strict=True)
    )


def _top(rank: NDArray[np.int32], places: int, num_kept: int) -> float | None:
    if not len(rank) or num_kept < places:
        return None
    return 100.0 * int(((rank > 0) & (rank <= places)).sum()) / len(rank)
