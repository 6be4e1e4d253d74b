"""Logits of a folded head by a matrix product: sums in float32, never rounded to less.

Shape letters: B rows, D features, C cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from geoloc_kernels import fold


def operands(feature_BD: Tensor, weight_dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Rows for the product with a folded weight, of the wider of both types, and what their products are scaled by.

    Half types go raw into the product: normed rows would be rounded once more. Float32 rows are normed first, so that
    large means don't cancel in the product; their scale is 1.
    """
    dtype = torch.promote_types(feature_BD.dtype, weight_dtype)
    way: Any = fold
    if feature_BD.is_cuda:
        from geoloc_kernels import triton_scale

        way = triton_scale if 0 < feature_BD.shape[1] <= triton_scale.MAX_FEATURES else fold
    if dtype == torch.float32:
        return way.normed_rows(feature_BD, eps), feature_BD.new_ones(len(feature_BD), dtype=dtype)
    return feature_BD.to(dtype), way.row_scale(feature_BD, eps)


def logits_of(rows_BD: Tensor, scale_B: Tensor, weight_CD: Tensor, bias_C: Tensor, temperature: float) -> Tensor:
    """[B, C] float32 logits of `operands`, divided by the temperature."""
    inverse = 1.0 / temperature
    bias_C = bias_C.float() * inverse
    weight_CD = weight_CD.to(rows_BD.dtype)
    if rows_BD.dtype == torch.float32:
        with exact_products(rows_BD.device):
            return torch.addmm(bias_C, rows_BD, weight_CD.T, alpha=inverse)
    if rows_BD.is_cuda:
        product_BC = torch.mm(rows_BD, weight_CD.T, out_dtype=torch.float32)
    else:
        with exact_products(rows_BD.device):
            product_BC = rows_BD.float() @ weight_CD.float().T
    return torch.addcmul(bias_C, product_BC, (scale_B * inverse)[:, None], out=product_BC)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever `torch.set_float32_matmul_precision` allows the process.

    tf32 moves a logit by some 1e-3 and bf16 by 1e-2: other cells, and kilometres in the mean.
    """
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    if before == "ieee" or (before == "none" and backends.fp32_precision in ("none", "ieee")):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
