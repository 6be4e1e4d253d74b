"""One row's parts made one: the second kernel of `fused_topk` where cells are cut into parts.

Needs Triton: import this file inside functions.
Shape letters: B rows, S parts, K kept; in the kernel N candidates of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoloc_kernels.triton_cells import Answer
from geoloc_kernels.triton_posterior import (
    NUM_SUMS,
    merge_sums,
    no_best,
    search_tile,
    store_best,
    store_posterior,
)

_MAX_TILE = 4096


class Parts(NamedTuple):
    """What the programs of a row found, part after part."""

    ids: Tensor
    """[B * S * K] int32 and padding."""
    logit: Tensor
    """[B * S * K] float32."""
    sums: Tensor
    """[B, S, NUM_SUMS] float32: the sums of a state, then 0, or NaN where a logit was not finite."""


def new_parts(num_rows: int, num_parts: int, k: int, device: torch.device) -> Parts:
    """Memory for the parts."""
    num = num_rows * num_parts
    return Parts(
        torch.empty(num * k + _MAX_TILE, dtype=torch.int32, device=device),
        torch.empty(num * k, dtype=torch.float32, device=device),
        torch.empty(num, NUM_SUMS.value, dtype=torch.float32, device=device),
    )


@triton.jit(do_not_specialize=["num_parts"])
def merge_kernel(
    part_id_ptr, part_logit_ptr, sums_ptr, id_ptr, logit_ptr, lse_ptr, mean_ptr, entropy_ptr, num_parts,
    k: tl.constexpr, K: tl.constexpr, S: tl.constexpr, N: tl.constexpr, IS_POSTERIOR: tl.constexpr,
):  # fmt: skip
    """One row."""
    row_1 = tl.program_id(0) + tl.arange(0, 1)
    is_row_1 = row_1 >= 0
    first = tl.program_id(0).to(tl.int64) * num_parts
    sums, bad_1 = merge_sums(sums_ptr + first * NUM_SUMS, num_parts, S)
    best = no_best(1, K, k)
    for begin in range(0, num_parts * k, N):
        col_N = begin + tl.arange(0, N)
        is_col_N = col_N < num_parts * k
        logit_1N = tl.load(part_logit_ptr + first * k + col_N, is_col_N, other=float("-inf"))[None, :]
        best = search_tile(best, logit_1N, tl.max(logit_1N, 1), part_id_ptr + first * k, col_N)
    store_best(best, bad_1, row_1, is_row_1, id_ptr, logit_ptr, k, K, k)
    if IS_POSTERIOR:
        store_posterior(sums, bad_1, row_1, is_row_1, lse_ptr, mean_ptr, entropy_ptr)


def merge_parts(parts: Parts, answer: Answer, num_parts: int, *, is_posterior: bool) -> None:
    """Write the answer that the parts add up to."""
    num_rows, k = answer[0].shape
    merge_kernel[(num_rows,)](
        *parts[:2], parts.sums, *answer, num_parts,
        k=k, K=triton.next_power_of_2(k), S=max(triton.next_power_of_2(num_parts), 2),
        N=min(max(triton.next_power_of_2(num_parts * k), 16), _MAX_TILE), IS_POSTERIOR=is_posterior,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
