"""LayerNorm's part of a row on CUDA, before its product with a folded weight: one read, one kernel.

In float64, as `fold` has it, whose rows would be copied into float64 in memory first. Needs Triton: import this file
inside functions. Shape letters: B rows, D features; in the kernel N features with padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FEATURES = 8192
"""A row is in one program's registers; longer ones go by `fold`."""

_FEATURES_PER_WARP = 512


@triton.jit
def scale_kernel(
    feature_ptr, scale_ptr, normed_ptr, num_features, feature_stride, eps,
    N: tl.constexpr, IS_NORMED: tl.constexpr,
):  # fmt: skip
    """One row: 1 / sqrt(var + eps), or the row itself with mean 0 and variance 1."""
    row = tl.program_id(0).to(tl.int64)
    at_N = tl.arange(0, N)
    is_feature_N = at_N < num_features
    value_N = tl.load(feature_ptr + row * feature_stride + at_N, is_feature_N, other=0.0).to(tl.float64)
    offset_N = tl.where(is_feature_N, value_N - tl.sum(value_N, 0) / num_features, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(offset_N * offset_N, 0) / num_features + eps)
    if IS_NORMED:
        tl.store(normed_ptr + row * num_features + at_N, (offset_N * scale).to(tl.float32), is_feature_N)
    else:
        tl.store(scale_ptr + row, scale.to(tl.float32))


def row_scale(feature_BD: Tensor, eps: float) -> Tensor:
    """[B] float32, see `fold.row_scale`, of rows of 1 to MAX_FEATURES."""
    scale_B = feature_BD.new_empty(len(feature_BD), dtype=torch.float32)
    _launch(feature_BD, scale_B, eps, is_normed=False)
    return scale_B


def normed_rows(feature_BD: Tensor, eps: float) -> Tensor:
    """[B, D] float32, see `fold.normed_rows`, of rows of 1 to MAX_FEATURES."""
    normed_BD = torch.empty(feature_BD.shape, dtype=torch.float32, device=feature_BD.device)
    _launch(feature_BD, normed_BD, eps, is_normed=True)
    return normed_BD


def _launch(feature_BD: Tensor, out: Tensor, eps: float, *, is_normed: bool) -> None:
    num_rows, num_features = feature_BD.shape
    if num_rows == 0:
        return
    if feature_BD.stride(1) != 1:
        feature_BD = feature_BD.contiguous()
    padded = triton.next_power_of_2(num_features)
    with torch.cuda.device_of(feature_BD):
        scale_kernel[(num_rows,)](
            feature_BD, out, out, num_features, feature_BD.stride(0), eps, N=padded, IS_NORMED=is_normed,
            num_warps=min(max(padded // _FEATURES_PER_WARP, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
