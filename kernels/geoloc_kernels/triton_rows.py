"""The posterior of rows of logits that are in memory: one program a row, one read.

Needs Triton: import this file inside functions.
Shape letters: B rows, C cells, P cells with padding, K kept; in the kernel N cells of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoloc_kernels.triton_cells import Answer, Cells, kept, new_answer, pack_cells
from geoloc_kernels.triton_posterior import add_tile, no_best, no_sums, search_tile, store_best, store_posterior

# Longer rows are read in tiles of so many cells.
_MAX_TILE = 8192
_CELLS_PER_WARP = 512


@triton.jit
def rows_kernel(
    logit_ptr, cells_ptr, cell_id_ptr, id_ptr, best_ptr, lse_ptr, mean_ptr, entropy_ptr,
    num_cells, logit_stride, cells_stride,
    k: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row."""
    row_1 = tl.program_id(0) + tl.arange(0, 1)
    is_row_1 = row_1 >= 0
    logit_at = logit_ptr + tl.program_id(0).to(tl.int64) * logit_stride
    sums = no_sums(1)
    best = no_best(1, K, k)
    bad_1 = tl.zeros([1], tl.float32)
    for begin in range(0, num_cells, N):
        col_N = begin + tl.arange(0, N)
        is_col_N = col_N < num_cells
        logit_1N = tl.load(logit_at + col_N, is_col_N, other=0.0)[None, :]
        # 0 * x is NaN where x is NaN or infinite, and 0 elsewhere.
        bad_1 += tl.sum(logit_1N * 0.0, 1)
        logit_1N = tl.where(is_col_N[None, :], logit_1N, float("-inf"))
        largest_1 = tl.max(logit_1N, 1)
        sums = add_tile(sums, logit_1N, largest_1, cells_ptr, cells_stride, col_N)
        best = search_tile(best, logit_1N, largest_1, cell_id_ptr, col_N)
    store_best(best, bad_1, row_1, is_row_1, id_ptr, best_ptr, k, K, k)
    store_posterior(sums, bad_1, row_1, is_row_1, lse_ptr, mean_ptr, entropy_ptr)


def rows_topk(
    logit_BC: Tensor,
    xyz_C3: Tensor | None,
    k: int,
    id_C: Tensor | None = None,
    *,
    cells: Cells | None = None,
    tile_cells: int | None = None,
) -> Answer:
    """Top-k, log-sum-exp, mean vector and entropy of given logits.

    Sums are compensated float32, the mean is divided in float64: log-sum-exp is within 1e-6 of max(1, |lse|), the mean
    vector within 1e-7 of the mean of the float32 vectors, up to the error of the chip's exponential (2 ulp).

    Args:
        logit_BC: [B, C] float32: logits, or logarithms of probabilities that need not add up to 1.
        xyz_C3: [C, 3] float32 unit vectors; None with `cells`.
        k: from 1 to MAX_K; C are kept where there are fewer.
        id_C: as `pack_cells` has it.
        cells: `pack_cells` of the same, made before; its bias is not used.
        tile_cells: cells read at a time, a power of two up to 8192; None: by C.

    Raises:
        ValueError: k or C is out of range, or logits are not float32.
    """
    if logit_BC.dtype != torch.float32:
        raise ValueError(f"rows_topk takes float32 logits, got {logit_BC.dtype}")
    num_rows, num_cells = logit_BC.shape
    k = kept(k, num_cells)
    answer = new_answer(num_rows, k, logit_BC.device)
    if num_rows == 0:
        return answer
    if logit_BC.stride(1) != 1:
        logit_BC = logit_BC.contiguous()
    cells = cells or pack_cells(num_cells, None, xyz_C3, id_C)
    tile = tile_cells or min(max(triton.next_power_of_2(num_cells), 16), _MAX_TILE)
    with torch.cuda.device_of(logit_BC):
        rows_kernel[(num_rows,)](
            logit_BC, cells.table_4P, cells.id_P, *answer,
            num_cells, logit_BC.stride(0), cells.table_4P.stride(0),
            k=k, K=triton.next_power_of_2(k), N=tile,
            num_warps=min(max(tile // _CELLS_PER_WARP, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return answer
