"""Spots: coordinates that are one, places that must stay together, and what lies near to what. numpy and scipy.

Shape letters: N rows, K distinct spots, U units of spots that stay together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.geo.points import one_name
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, unit_vectors

KEY_DECIMALS = 6
"""Degrees that are equal when rounded to so many decimals, 0.1 m on the ground, are the same spot."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def distinct_spots(point_deg_N2: Floats) -> tuple[Floats, Ints]:
    """[K, 2] the distinct spots, sorted, and [N] which of them each row is."""
    rounded_N2 = one_name(np.round(point_deg_N2, KEY_DECIMALS))
    micro_N2 = np.rint(rounded_N2 * 10**KEY_DECIMALS).astype(np.int64)
    key_N = micro_N2[:, 0] * 10 ** (KEY_DECIMALS + 3) + micro_N2[:, 1]
    _, first_K, spot_N = np.unique(key_N, return_index=True, return_inverse=True)
    return rounded_N2[first_K], spot_N.astype(np.int64)


def units_of(spot_N: Ints, together_N: ArrayLike | None, num_spots: int) -> tuple[Ints, Ints]:
    """What must stay together: spots that one label reaches, by way of other labels and spots too.

    Args:
        spot_N: [N] each row's spot.
        together_N: [N] each row's label, any whole numbers; None where every spot stands for itself.
        num_spots: K.

    Returns:
        [K] each spot's unit, numbered by their lowest spots; [U] each unit's chief spot: of those where its labels'
        first rows stand the lowest.
    """
    if together_N is None:
        return np.arange(num_spots), np.arange(num_spots)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, first_G, label_N = np.unique(np.asarray(together_N), return_index=True, return_inverse=True)
    assert label_N.shape == spot_N.shape, f"{len(spot_N)} rows, labels of the shape {label_N.shape}"
    size = num_spots + len(first_G)
    edges = coo_matrix((np.ones(len(spot_N), dtype=np.bool_), (spot_N, num_spots + label_N)), shape=(size, size))
    component_K = connected_components(edges, directed=False)[1][:num_spots]
    # Every component has a spot, a label, and so a chief.
    _, lowest_U = np.unique(component_K, return_index=True)
    unit_of_component = np.empty(len(lowest_U), dtype=np.int64)
    unit_of_component[component_K[np.sort(lowest_U)]] = np.arange(len(lowest_U))
    unit_K = unit_of_component[component_K]
    first = np.unique(spot_N[first_G])
    return unit_K, first[np.unique(unit_K[first], return_index=True)[1]]


def nearest(from_deg_A2: Floats, to_deg_B2: Floats, within_km: float) -> tuple[Floats, Ints]:
    """[A] the chord to the nearest of B and its row; infinite and B where none is within the distance."""
    from scipy.spatial import cKDTree

    chord = 2 * math.sin(min(within_km / (2 * EARTH_RADIUS_KM), math.pi / 2))
    tree = cKDTree(unit_vectors(to_deg_B2))
    found_A, row_A = tree.query(unit_vectors(from_deg_A2), distance_upper_bound=chord * (1 + 1e-12))
    return found_A, row_A
