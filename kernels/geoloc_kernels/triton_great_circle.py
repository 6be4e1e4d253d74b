"""The great circle on CUDA: one kernel for pairs, one for all pairs, in float32 or float64.

The arithmetic is that of `haversine`, all in degrees, with polynomials instead of library calls: a sine that takes
degrees and an arc sine that gives kilometres. They round less often, need no range reduction and no stack, and run
under Triton's interpreter. Of a and b = 1 - a only the smaller one is measured with, so that no quotient is needed:

    km = 2 R asin(sqrt(a)) where a <= 1/2, else pi R - 2 R asin(sqrt(b))

Needs Triton: import this file inside functions. Shape letters: P pairs; R rows and C columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Near-minimax polynomials, the highest power first, made with 60 digits (mpmath.chebyfit); maximal relative errors.
# sin(x degrees) = x P(x^2), |x| <= 90: 4e-9 and 3e-22.
SINE_32 = (3.914911781e-22, -9.772473621e-17, 1.349555764e-11, -8.860956922e-7, 0.01745329244)
SINE_64 = (
    -3.1463710907448042e-51,
    3.636258293232361e-45,
    -3.2483203934603112e-39,
    2.2393678828516688e-33,
    -1.1468201772248061e-27,
    4.1412674172505314e-22,
    -9.788384861617643e-17,
    1.349601623163255e-11,
    -8.8609615570129802e-7,
    0.017453292519943296,
)
# 2 R asin(sqrt(m)) = sqrt(m) P(m), 0 <= m <= 0.501, R = 6371 km: 3e-9 and 2e-17.
ARC_32 = (
    1588.568031,
    -1749.80165,
    1381.970319,
    -94.68994168,
    457.4620265,
    561.6871268,
    956.0084881,
    2123.659836,
    12742.00002,
)
ARC_64 = (
    14571.863311350383,
    -57569.04404353362,
    108218.22874081925,
    -125980.99642947083,
    101425.67154519404,
    -59351.579032108189,
    26243.901597715348,
    -8729.160537792466,
    2379.6251938537282,
    -351.03194854503105,
    194.85705233090555,
    138.94624960093376,
    178.66129806134373,
    221.0629746369813,
    285.06810503111795,
    387.12667516677865,
    568.83928681631701,
    955.64999998948631,
    2123.6666666667064,
    12742.0,
)

# pi R, from a point to its antipode, in two parts: rounded to float32 as one it would be 86 cm off.
HALF_WAY_ROUND = tl.constexpr(20015.0859375)
HALF_WAY_REST = tl.constexpr(0.000858520572)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """Horner's rule; the coefficients take the precision of x."""
    value = tl.full(x.shape, COEFFICIENTS[0], x.dtype)
    for power in tl.static_range(1, len(COEFFICIENTS)):
        value = value * x + COEFFICIENTS[power]
    return value


@triton.jit
def folded(degrees):
    """The same direction within [-180, 180), exactly."""
    return degrees - 360 * tl.floor(degrees / 360 + 0.5)


@triton.jit
def square_root(x):
    """Rounded to nearest: the fast one would be a metre off at 10,000 km."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def sine_squared(degrees, SINE: tl.constexpr):
    """Squared sine of an angle of 0 to 180 degrees."""
    degrees = tl.minimum(degrees, 180 - degrees)
    square = degrees * degrees
    factor = polynomial(square, SINE)
    return square * (factor * factor)


@triton.jit
def cosine(degrees, SINE: tl.constexpr):
    """Cosine of an angle within [-180, 180] degrees, by what is left to 90: it keeps its digits near the poles."""
    left = 90 - tl.abs(degrees)
    return left * polynomial(left * left, SINE)


@triton.jit
def arc_km(lat_a, lon_a, cos_a, lat_b, lon_b, cos_b, SINE: tl.constexpr, ARC: tl.constexpr):
    """Distance of points in degrees, all folded already; the shapes broadcast."""
    # The shorter way around: inside the map, or across the antimeridian, where both summands are exact and small.
    inside = tl.abs(lon_b - lon_a)
    across = tl.minimum((180 - lon_a) + (180 + lon_b), (180 + lon_a) + (180 - lon_b))
    half_turn = tl.minimum(inside, across) * 0.5
    cosines = cos_a * cos_b
    near = sine_squared(tl.abs(lat_b - lat_a) * 0.5, SINE) + cosines * sine_squared(half_turn, SINE)
    far = sine_squared(tl.abs(lat_a + lat_b) * 0.5, SINE) + cosines * sine_squared(90 - half_turn, SINE)
    is_near = near <= far
    smaller = tl.where(is_near, near, far)
    # Rounding goes below zero only where a latitude lies beyond a pole. A comparison with NaN keeps NaN.
    smaller = tl.where(smaller < 0, 0.0, smaller)
    km = square_root(smaller) * polynomial(smaller, ARC)
    return tl.where(is_near, km, HALF_WAY_ROUND - (km - HALF_WAY_REST))


@triton.jit
def paired_kernel(a_ptr, b_ptr, km_ptr, num_pairs, SINE: tl.constexpr, ARC: tl.constexpr, P: tl.constexpr):
    """A block of pairs: [num_pairs, 2] and [num_pairs, 2] -> [num_pairs]."""
    pair_P = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    is_pair_P = pair_P < num_pairs
    lat_a = folded(tl.load(a_ptr + 2 * pair_P, is_pair_P, other=0.0))
    lon_a = folded(tl.load(a_ptr + 2 * pair_P + 1, is_pair_P, other=0.0))
    lat_b = folded(tl.load(b_ptr + 2 * pair_P, is_pair_P, other=0.0))
    lon_b = folded(tl.load(b_ptr + 2 * pair_P + 1, is_pair_P, other=0.0))
    km = arc_km(lat_a, lon_a, cosine(lat_a, SINE), lat_b, lon_b, cosine(lat_b, SINE), SINE, ARC)
    tl.store(km_ptr + pair_P, km, is_pair_P)


@triton.jit
def pairwise_kernel(
    a_ptr, b_ptr, km_ptr, num_rows, num_columns,
    SINE: tl.constexpr, ARC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of all pairs: [num_rows, 2] and [num_columns, 2] -> [num_rows, num_columns]."""
    num_tiles = tl.cdiv(num_columns, C)
    row_R = (tl.program_id(0) // num_tiles).to(tl.int64) * R + tl.arange(0, R)
    column_C = (tl.program_id(0) % num_tiles) * C + tl.arange(0, C)
    is_row_R, is_column_C = row_R < num_rows, column_C < num_columns
    lat_R = folded(tl.load(a_ptr + 2 * row_R, is_row_R, other=0.0))
    lon_R = folded(tl.load(a_ptr + 2 * row_R + 1, is_row_R, other=0.0))
    lat_C = folded(tl.load(b_ptr + 2 * column_C, is_column_C, other=0.0))
    lon_C = folded(tl.load(b_ptr + 2 * column_C + 1, is_column_C, other=0.0))
    cos_R, cos_C = cosine(lat_R, SINE), cosine(lat_C, SINE)
    km_RC = arc_km(
        lat_R[:, None], lon_R[:, None], cos_R[:, None], lat_C[None, :], lon_C[None, :], cos_C[None, :], SINE, ARC
    )
    place_RC = row_R[:, None] * num_columns + column_C[None, :]
    tl.store(km_ptr + place_RC, km_RC, is_row_R[:, None] & is_column_C[None, :])


def polynomials(dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sine's and arc sine's coefficients for float32 or float64."""
    return (SINE_32, ARC_32) if dtype == torch.float32 else (SINE_64, ARC_64)


def launch_paired(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """`great_circle_km` of [..., 2] and [..., 2] of one shape, float32 or float64, on one CUDA device.

    Bytes of a pair in float32: 16 read, 4 written; some 60 floating-point operations.
    """
    km = a_deg.new_empty(a_deg.shape[:-1])
    if km.numel():
        block = 1024 if a_deg.dtype == torch.float32 else 512
        grid = (triton.cdiv(km.numel(), block),)
        with on_device_of(a_deg):
            paired_kernel[grid](
                a_deg.contiguous(), b_deg.contiguous(), km, km.numel(), *polynomials(km.dtype), block,
                enable_fp_fusion=True,
            )  # fmt: skip
    return km


def launch_pairwise(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    """`pairwise_km` of [N, 2] and [M, 2], float32 or float64, on one CUDA device.

    Bytes of a pair in float32: 4 written, the points come from the cache; some 60 floating-point operations.
    """
    num_rows, num_columns = len(a_deg_N2), len(b_deg_M2)
    km_NM = a_deg_N2.new_empty(num_rows, num_columns)
    if km_NM.numel():
        # Each thread has eight rows, for which its columns' cosines are taken once.
        rows, columns = (32, 128) if km_NM.dtype == torch.float32 else (32, 64)
        grid = (triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns),)
        with on_device_of(a_deg_N2):
            pairwise_kernel[grid](
                a_deg_N2.contiguous(), b_deg_M2.contiguous(), km_NM, num_rows, num_columns,
                *polynomials(km_NM.dtype), rows, columns, enable_fp_fusion=True,
            )  # fmt: skip
    return km_NM


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Kernels go to the current device, which need not be the tensor's; under the interpreter it is none."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
