"""bank_topk: exact search of the nearest of a bank of embeddings, by inner product.

Shape letters: B queries, D features, C embeddings of the bank, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoloc_kernels.logits import exact_products
from geoloc_kernels.posterior import cell_chunks, check_floats, check_k, row_tiles
from geoloc_kernels.routes import KERNEL_K, bank_best
from geoloc_kernels.selection import RunningBest


def bank_topk(query_BD: Tensor, bank_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The embeddings with the largest inner products with each query: of unit vectors, their cosines.

    Every one is looked at, and the products of all are never in memory. Sums are float32.

    Args:
        query_BD: [B, D] float32, float16 or bfloat16, B >= 0.
        bank_CD: [C, D] of the queries' type, or one of both is widened to the other's.
        k: how many to keep, at least 1; all of them where there are fewer. On CUDA more than 32 take the slow way.

    Returns:
        [B, min(k, C)] float32 inner products, best first, and [B, min(k, C)] int64 rows of the bank, the lowest first
        among equals. A query with products that are not all finite has NaN and -1. No gradient leads back.

    Raises:
        ValueError: shapes, types or devices do not fit together, or k is less than 1.
    """
    check_floats(query_BD, "query_BD")
    check_floats(bank_CD, "bank_CD")
    if query_BD.shape[1] != bank_CD.shape[1]:
        raise ValueError(f"queries have {query_BD.shape[1]} features and the bank {bank_CD.shape[1]}")
    if query_BD.device != bank_CD.device:
        raise ValueError(f"queries are on {query_BD.device} and the bank is on {bank_CD.device}: move one")
    check_k(len(bank_CD), k)
    return _bank_topk(query_BD.detach(), bank_CD.detach(), k)  # type: ignore[no-any-return]


def bank_definition(query_BD: Tensor, bank_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the op `geoloc::bank_topk` computes, in plain PyTorch; see `bank_topk`."""
    ids = torch.arange(len(bank_CD), device=query_BD.device)
    parts = [_tile_best(query_BD[rows], bank_CD, ids, k) for rows in row_tiles(len(query_BD))] or [
        _empty(query_BD, bank_CD, k)
    ]
    score, found = (torch.cat(part) for part in zip(*parts, strict=True))
    return score, found


_bank_topk = torch.library.custom_op("geoloc::bank_topk", bank_definition, mutates_args=())


@_bank_topk.register_kernel("cuda")
def _(query_BD: Tensor, bank_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k > KERNEL_K or len(query_BD) == 0:
        return bank_definition(query_BD, bank_CD, k)
    return bank_best(query_BD, bank_CD, k)


@_bank_topk.register_fake
def _(query_BD: Tensor, bank_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _empty(query_BD, bank_CD, k)


def _tile_best(query_BD: Tensor, bank_CD: Tensor, id_C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = RunningBest(k, is_ascending=True)
    query_BD = query_BD.float()
    is_finite_B = torch.ones(len(query_BD), dtype=torch.bool, device=query_BD.device)
    for cells in cell_chunks(len(query_BD), len(bank_CD), k):
        with exact_products(query_BD.device):
            score_BC = query_BD @ bank_CD[cells].float().T
        low_B, high_B = score_BC.amin(dim=1), score_BC.amax(dim=1)
        is_sound_B = low_B.isfinite() & high_B.isfinite()
        if not is_sound_B.all():
            # Such rows go on as zeros until the end.
            is_finite_B &= is_sound_B
            score_BC, high_B = score_BC.where(is_sound_B[:, None], 0.0), high_B.where(is_sound_B, 0.0)
        best.add(score_BC, high_B, id_C[cells])
    is_finite_B1 = is_finite_B[:, None]
    return best.value_BK.where(is_finite_B1, torch.nan), best.id_BK.where(is_finite_B1, -1)


def _empty(query_BD: Tensor, bank_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query_BD.shape[0], min(k, bank_CD.shape[0]))
    return query_BD.new_empty(shape, dtype=torch.float32), query_BD.new_empty(shape, dtype=torch.int64)
