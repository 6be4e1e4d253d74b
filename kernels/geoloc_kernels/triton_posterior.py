"""What the Triton kernels of a posterior share: sums over cells, the k best, and what is written at the end.

A kernel walks the cells in tiles and keeps for each of its rows a state of two tuples:

- sums: the largest logit so far; then, relative to it, with p = exp(logit - largest), the sums of p, of
  p * (logit - largest), of p * x, p * y and p * z, all but the second followed by what rounding has added too much.
- best: the logits and the ids of the k best, unordered, and the worst of them (its logit and id).

"Better" is one order everywhere: the larger logit, and among equals the lower id. Every id is different, so that the
order is total, and the answer is the same however the cells are cut into tiles or parts.

Shape letters: R rows of a program, N cells of a tile, K kept (a power of two; slots beyond k stay unused).
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv:1805.02867, for the running
soft-max; Kahan, "Further remarks on reducing truncation errors", CACM 8 (1965), for the compensated sums.
"""

import triton
import triton.language as tl

# Ids are int32 in the kernels; empty slots of the k best count down from the largest one.
_NO_ID = tl.constexpr(0x7FFFFFFF)
# Below this a difference of logits is e^-10000 = 0 in float32; clamped here so that infinities make no NaN.
_FAR_BELOW = tl.constexpr(-1e4)
NUM_SUMS = tl.constexpr(11)
"""Numbers of a row's sums in memory."""


@triton.jit
def _plus(total, lost, value):
    """One step of Kahan's sum: (total, lost) with value added."""
    exact = value - lost
    new = total + exact
    return new, (new - total) - exact


@triton.jit
def no_sums(R: tl.constexpr):
    """The sums before the first tile."""
    zero = tl.zeros([R], tl.float32)
    largest = tl.full([R], float("-inf"), tl.float32)
    return largest, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def add_tile(sums, logit_RN, largest_R, cells_ptr, stride, col_N):
    """The sums with a tile of cells added.

    `largest_R` is the tile's largest logit; cells: planar, see `pack_cells`.
    """
    largest, s, s_lost, t, x, x_lost, y, y_lost, z, z_lost = sums
    new = tl.maximum(largest, largest_R)
    step = tl.maximum(largest - new, _FAR_BELOW)
    scale = tl.exp(step)
    below_RN = tl.maximum(logit_RN - new[:, None], _FAR_BELOW)
    p_RN = tl.exp(below_RN)
    s_new = tl.sum(p_RN, 1)
    t_new = tl.sum(p_RN * below_RN, 1)
    x_new = tl.sum(p_RN * tl.load(cells_ptr + stride + col_N)[None, :], 1)
    y_new = tl.sum(p_RN * tl.load(cells_ptr + 2 * stride + col_N)[None, :], 1)
    z_new = tl.sum(p_RN * tl.load(cells_ptr + 3 * stride + col_N)[None, :], 1)
    t = scale * (t + s * step) + t_new
    s, s_lost = _plus(scale * s, scale * s_lost, s_new)
    x, x_lost = _plus(scale * x, scale * x_lost, x_new)
    y, y_lost = _plus(scale * y, scale * y_lost, y_new)
    z, z_lost = _plus(scale * z, scale * z_lost, z_new)
    return new, s, s_lost, t, x, x_lost, y, y_lost, z, z_lost


@triton.jit
def no_best(R: tl.constexpr, K: tl.constexpr, k: tl.constexpr):
    """The k best before the first tile: empty slots, which anything beats; slots beyond k hold +inf, and stay."""
    slot_K = tl.arange(0, K)
    value_RK = tl.zeros([R, K], tl.float32) + tl.where(slot_K < k, float("-inf"), float("inf"))[None, :]
    id_RK = tl.zeros([R, K], tl.int32) + (-slot_K + _NO_ID)[None, :]
    return value_RK, id_RK, tl.full([R], float("-inf"), tl.float32), tl.full([R], _NO_ID, tl.int32)


@triton.jit
def search_tile(best, logit_RN, largest_R, id_ptr, col_N):
    """The k best with a tile's cells among them.

    The tile's cells are taken out from the best down, all rows at once, and only while a row's next one is better than
    its worst kept: most tiles of a long row are left after one comparison. Columns that don't exist hold -inf;
    `largest_R` is the tile's largest logit.
    """
    value_RK, id_RK, worst_R, worst_id_R = best
    # A tile of equals may hold an id lower than the worst kept.
    is_open_R = (largest_R >= worst_R) & (largest_R > float("-inf"))
    if tl.max(is_open_R.to(tl.int32), 0) > 0:
        id_N = tl.load(id_ptr + col_N)
        while tl.max(is_open_R.to(tl.int32), 0) > 0:
            next_id_R = tl.min(tl.where(logit_RN == largest_R[:, None], id_N[None, :], _NO_ID), 1)
            is_better_R = is_open_R & ((largest_R > worst_R) | (next_id_R < worst_id_R))
            # The worst one's id is its own, empty slots' too.
            is_slot_RK = is_better_R[:, None] & (id_RK == worst_id_R[:, None])
            value_RK = tl.where(is_slot_RK, largest_R[:, None], value_RK)
            id_RK = tl.where(is_slot_RK, next_id_R[:, None], id_RK)
            worst_R = tl.min(value_RK, 1)
            worst_id_R = tl.max(tl.where(value_RK == worst_R[:, None], id_RK, -1), 1)
            logit_RN = tl.where(id_N[None, :] == next_id_R[:, None], float("-inf"), logit_RN)
            largest_R = tl.max(logit_RN, 1)
            is_open_R = is_better_R & (largest_R >= worst_R) & (largest_R > float("-inf"))
    return value_RK, id_RK, worst_R, worst_id_R


@triton.jit
def store_best(best, bad_R, row_R, is_row_R, id_ptr, logit_ptr, id_stride, K: tl.constexpr, k: tl.constexpr):
    """Write the k best of each row, the best first; -1 and NaN where `bad_R` is not 0.

    id: [B, k] int64 or int32; logit: [B, k] float32; both with rows `id_stride` apart.
    """
    value_RK, id_RK, _, _ = best
    value_RK = tl.where((tl.arange(0, K) < k)[None, :], value_RK, float("-inf"))
    is_bad_R = bad_R != 0
    at_R = row_R.to(tl.int64) * id_stride
    for j in range(k):
        value_R = tl.max(value_RK, 1)
        first_R = tl.min(tl.where(value_RK == value_R[:, None], id_RK, _NO_ID), 1)
        tl.store(id_ptr + at_R + j, tl.where(is_bad_R, -1, first_R).to(id_ptr.dtype.element_ty), is_row_R)
        tl.store(logit_ptr + at_R + j, tl.where(is_bad_R, float("nan"), value_R), is_row_R)
        value_RK = tl.where((id_RK == first_R[:, None]) & (value_RK == value_R[:, None]), float("-inf"), value_RK)


@triton.jit
def store_posterior(sums, bad_R, row_R, is_row_R, lse_ptr, mean_ptr, entropy_ptr):
    """Write log-sum-exp [B] float32, mean [B, 3] float64 and entropy [B] float32, NaN where a logit was not finite."""
    largest, s, s_lost, t, x, x_lost, y, y_lost, z, z_lost = sums
    nan_R = tl.where(bad_R == 0, 0.0, float("nan"))
    log_s = tl.log(s)
    tl.store(lse_ptr + row_R, largest + log_s + nan_R, is_row_R)
    tl.store(entropy_ptr + row_R, tl.maximum(log_s - t / s, 0.0) + nan_R, is_row_R)
    exact = s.to(tl.float64) - s_lost.to(tl.float64) + nan_R.to(tl.float64)
    at = mean_ptr + row_R.to(tl.int64) * 3
    tl.store(at, (x.to(tl.float64) - x_lost.to(tl.float64)) / exact, is_row_R)
    tl.store(at + 1, (y.to(tl.float64) - y_lost.to(tl.float64)) / exact, is_row_R)
    tl.store(at + 2, (z.to(tl.float64) - z_lost.to(tl.float64)) / exact, is_row_R)


@triton.jit
def store_sums(sums, bad_R, at_R, is_row_R, sums_ptr):
    """Write the sums of a part: [..., NUM_SUMS] float32, then `merge_sums` reads them."""
    largest, s, s_lost, t, x, x_lost, y, y_lost, z, z_lost = sums
    at = sums_ptr + at_R.to(tl.int64) * NUM_SUMS
    tl.store(at, largest, is_row_R)
    tl.store(at + 1, s, is_row_R)
    tl.store(at + 2, s_lost, is_row_R)
    tl.store(at + 3, t, is_row_R)
    tl.store(at + 4, x, is_row_R)
    tl.store(at + 5, x_lost, is_row_R)
    tl.store(at + 6, y, is_row_R)
    tl.store(at + 7, y_lost, is_row_R)
    tl.store(at + 8, z, is_row_R)
    tl.store(at + 9, z_lost, is_row_R)
    tl.store(at + 10, bad_R, is_row_R)


@triton.jit
def _total(at_1S, is_part_1S, scale_1S):
    """A sum of all parts less what rounding has added, and nothing lost."""
    value_1S = tl.load(at_1S, is_part_1S, other=0.0) - tl.load(at_1S + 1, is_part_1S, other=0.0)
    return tl.sum(value_1S * scale_1S, 1)


@triton.jit
def merge_sums(sums_ptr, num_parts, S: tl.constexpr):
    """The sums of one row from those of its parts, and whether a logit was not finite."""
    part_1S = tl.arange(0, S)[None, :]
    is_part_1S = part_1S < num_parts
    at_1S = sums_ptr + part_1S * NUM_SUMS
    part_largest_1S = tl.load(at_1S, is_part_1S, other=float("-inf"))
    largest = tl.max(part_largest_1S, 1)
    step_1S = tl.maximum(part_largest_1S - largest[:, None], _FAR_BELOW)
    scale_1S = tl.exp(step_1S)
    s = _total(at_1S + 1, is_part_1S, scale_1S)
    t_1S = tl.load(at_1S + 3, is_part_1S, other=0.0)
    t = tl.sum(t_1S * scale_1S, 1) + _total(at_1S + 1, is_part_1S, scale_1S * step_1S)
    x = _total(at_1S + 4, is_part_1S, scale_1S)
    y = _total(at_1S + 6, is_part_1S, scale_1S)
    z = _total(at_1S + 8, is_part_1S, scale_1S)
    bad = tl.sum(tl.load(at_1S + 10, is_part_1S, other=0.0), 1)
    zero = tl.zeros([1], tl.float32)
    return (largest, s, zero, t, x, zero, y, zero, z, zero), bad
