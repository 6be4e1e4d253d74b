"""All pairs on the CPU by chords: unit vectors once a point, then one arc sine a pair and no other trigonometry.

    h = |u - v|^2 / 4 = sin^2(angle / 2);  distance = 2 R asin(sqrt(h))

Differences of unit vectors, not their product: each is exact to 1e-16, and so is the chord, down to identical points.
Only within some 13 km of the antipode does the arc sine lose digits; those few pairs are done again by the definition.
Work is in float64 for either dtype: unit vectors in float32 are half a metre apart.

Shape letters: N and M points.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from geoloc_kernels.haversine import EARTH_RADIUS_KM, cosine, distance_km, sine, wrapped

# Elements of a block: two buffers of float64 that stay in a core's second-level cache. Below 2^15 PyTorch leaves an
# operation to the thread that calls it: each thread has rows of its own, and none waits for others after every step.
_BLOCK = (1 << 15) - 1
_BLOCK_COLUMNS = 4096

# Beyond this h a rounding error of 4e-16 in it would be more than a micrometre of distance.
_NEAR_ANTIPODE = 1 - 1e-6


def unit_vectors(point_deg: Tensor) -> Tensor:
    """Points on the unit sphere.

    Args:
        point_deg: [..., 2] (lat, lon) in degrees.

    Returns:
        [..., 3] float64: x towards (0, 0), y towards (0, 90), z towards the north pole.
    """
    lat, lon = point_deg.double().unbind(-1)
    lon = wrapped(lon)
    cos_lat = cosine(wrapped(lat))
    # The cosine of a longitude beyond 90 is negative, and so it comes out: of what is left to 90.
    return torch.stack([cos_lat * cosine(lon), cos_lat * sine(lon), sine(lat)], dim=-1)


def pairwise_by_chords(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    """Distance of every point to every other one, in kilometres.

    Args:
        a_deg_N2: [N, 2] float32 or float64, (lat, lon) in degrees.
        b_deg_M2: [M, 2] of the same dtype.

    Returns:
        [N, M] of that dtype.
    """
    a_deg_N2, b_deg_M2 = a_deg_N2.detach(), b_deg_M2.detach()
    km_NM = a_deg_N2.new_empty(len(a_deg_N2), len(b_deg_M2))
    if km_NM.numel() == 0:
        return km_NM
    # Halves of unit vectors: the sum of their squared differences is h itself.
    a_3N1 = (unit_vectors(a_deg_N2) / 2).T.unsqueeze(-1)
    b_31M = (unit_vectors(b_deg_M2) / 2).T.contiguous().unsqueeze(1)
    is_inference = torch.is_inference_mode_enabled()

    def fill(band: slice) -> None:
        with torch.inference_mode(is_inference):
            _fill_band(km_NM[band], a_3N1[:, band], b_31M, a_deg_N2[band], b_deg_M2)

    bands = _bands(*km_NM.shape)
    if len(bands) == 1:
        fill(bands[0])
    else:
        with ThreadPoolExecutor(len(bands)) as pool:
            list(pool.map(fill, bands))
    return km_NM


def _bands(num_rows: int, num_columns: int) -> list[slice]:
    """Rows cut among as many threads as PyTorch may use, fewer where there is little to do."""
    num_bands = min(torch.get_num_threads(), num_rows, max(1, num_rows * num_columns // (4 * _BLOCK)))
    ends = [num_rows * band // num_bands for band in range(num_bands + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _fill_band(km_RM: Tensor, a_3R1: Tensor, b_31M: Tensor, a_deg_R2: Tensor, b_deg_M2: Tensor) -> None:
    """Distances of some rows, block by block."""
    num_rows, num_columns = km_RM.shape
    columns = min(num_columns, _BLOCK_COLUMNS)
    rows = max(1, min(num_rows, _BLOCK // columns))
    square, step = torch.empty(2, rows * columns, dtype=torch.float64)
    for top, left in itertools.product(range(0, num_rows, rows), range(0, num_columns, columns)):
        row, column = slice(top, top + rows), slice(left, left + columns)
        km = km_RM[row, column]
        h, difference = (buffer[: km.numel()].view(km.shape) for buffer in (square, step))
        torch.sub(a_3R1[0, row], b_31M[0, :, column], out=difference)
        torch.mul(difference, difference, out=h)
        for axis in (1, 2):
            torch.sub(a_3R1[axis, row], b_31M[axis, :, column], out=difference)
            h.addcmul_(difference, difference)
        _arc_km(h, km, a_deg_R2[row], b_deg_M2[column])


def _arc_km(h: Tensor, km: Tensor, a_deg: Tensor, b_deg: Tensor) -> None:
    """Squared half chords into `km`; `h` is used up."""
    # A maximum of NaN compares as false: such a block is looked through as well.
    is_plain = bool(h.max() <= _NEAR_ANTIPODE)
    far = None if is_plain else (h > _NEAR_ANTIPODE).nonzero(as_tuple=True)
    torch.mul(h.sqrt_().asin_(), 2 * EARTH_RADIUS_KM, out=km)
    if far is not None:
        row, column = far
        km[row, column] = distance_km(a_deg[row].double(), b_deg[column].double()).to(km.dtype)
