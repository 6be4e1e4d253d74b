"""The ways through a head on CUDA, and which one is taken: by the sizes alone.

- product: a matrix product of some rows, so that their logits stay in the L2 cache, then one kernel over them; again.
- fused: one kernel; logits go from the tensor cores into the soft-max and are never in memory.
- split: the same with the cells cut among more programs than there are tiles of rows; what they found is merged.

Whoever wants to know which way was taken appends a function to `observers`. The functions here take any device: with
TRITON_INTERPRET=1 the kernels run on CPU tensors.

Shape letters: B rows, D features, C cells, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from geoloc_kernels.logits import logits_of, operands

if TYPE_CHECKING:
    from geoloc_kernels.triton_cells import Cells

Route: TypeAlias = Literal["product", "fused", "split"]
_Parts: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

KERNEL_K = 32
"""The kernels keep at most so many; more are found by the definition."""
PRODUCT_CELLS = 8192
"""Up to so many cells a row of logits is read from the L2 cache faster than its best are found between products."""

observers: list[Callable[[Route], None]] = []
"""Each is called with the route of every call."""

# Rows of the fused kernel's tile: a program's share of the work.
_TILE_ROWS = 128
# An H200's, for tensors that are on no CUDA device.
_DEFAULT_SMS = 132
_DEFAULT_L2_BYTES = 50 << 20


def route(num_rows: int, num_cells: int, num_sms: int) -> Route:
    """The way that a head of `num_cells` goes with `num_rows` rows on a chip of `num_sms` multiprocessors.

    Split where the tiles of rows would leave more than half of the multiprocessors without work.
    """
    if num_cells <= PRODUCT_CELLS:
        return "product"
    return _fused_or_split(num_rows, num_sms)


def head_posterior(
    feature_BD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    xyz_C3: Tensor,
    id_C: Tensor | None,
    k: int,
    temperature: float,
    eps: float,
    packed: Sequence[Tensor] = (),
    *,
    chosen: Route | None = None,
) -> _Parts:
    """What `head_topk` returns, by kernels, for B >= 1 rows and k <= KERNEL_K.

    Arguments are those of `head_topk`, `packed` what `packed_cells` made of bias, vectors and ids; and `chosen` the
    route instead of the one by the sizes. With `id_C` there is no product, whose columns are the ids.
    """
    from geoloc_kernels.triton_cells import Cells
    from geoloc_kernels.triton_head import fused_topk

    num_sms = _num_sms(feature_BD)
    taken = chosen or route(len(feature_BD), len(weight_CD), num_sms)
    if taken == "product" and id_C is not None:
        taken = _fused_or_split(len(feature_BD), num_sms)
    _tell(taken)
    cells = Cells(*(packed or packed_cells(bias_C, xyz_C3, id_C)))
    if taken == "product":
        return _by_product(feature_BD, weight_CD, bias_C, k, temperature, eps, cells)
    rows_BD, scale_B = operands(feature_BD, weight_CD.dtype, eps)
    weight_CD = weight_CD.to(rows_BD.dtype)
    num_parts = _num_parts(taken)
    return fused_topk(rows_BD, scale_B, weight_CD, None, xyz_C3, k, 1.0 / temperature, cells=cells, num_parts=num_parts)


def rows_posterior(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> _Parts:
    """What `posterior_topk` returns, by one kernel over rows, for B >= 1 rows and k <= KERNEL_K."""
    from geoloc_kernels.triton_rows import rows_topk

    return rows_topk(logit_BC.float(), xyz_C3.float(), k)


def bank_best(query_BD: Tensor, bank_CD: Tensor, k: int, *, chosen: Route | None = None) -> tuple[Tensor, Tensor]:
    """What `bank_topk` returns, by the head's kernels without their soft-max, for B >= 1 rows and k <= KERNEL_K."""
    from geoloc_kernels.triton_head import fused_topk

    taken = chosen or _fused_or_split(len(query_BD), _num_sms(query_BD))
    _tell(taken)
    query_BD, bank_CD = _of_one_type(query_BD, bank_CD)
    scale_B = query_BD.new_ones(len(query_BD), dtype=torch.float32)
    ids, score, *_ = fused_topk(query_BD, scale_B, bank_CD, None, None, k, 1.0, num_parts=_num_parts(taken))
    return score, ids


def packed_cells(bias_C: Tensor, xyz_C3: Tensor, id_C: Tensor | None) -> tuple[Tensor, ...]:
    """Bias, unit vectors and ids as the kernels read them. A head does this once."""
    from geoloc_kernels.triton_cells import pack_cells

    return tuple(pack_cells(len(bias_C), bias_C.float(), xyz_C3.float(), id_C))


def row_chunks(num_rows: int, num_cells: int, l2_bytes: int) -> Iterator[slice]:
    """Rows whose float32 logits fill at most half of the L2 cache, all chunks of one size.

    Matrix products of other sizes may round differently: the last chunk overlaps the one before it instead of being
    shorter.
    """
    most = max(l2_bytes // 2 // (4 * num_cells), 1)
    size = -(-num_rows // -(-num_rows // most))
    for start in range(0, num_rows, size):
        start = min(start, num_rows - size)
        yield slice(start, start + size)


def _by_product(
    feature_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, k: int, temperature: float, eps: float, cells: Cells
) -> _Parts:
    from geoloc_kernels.triton_rows import rows_topk

    weight_CD = weight_CD.to(torch.promote_types(feature_BD.dtype, weight_CD.dtype))
    parts: list[_Parts] = []
    num_done = 0
    for rows in row_chunks(len(feature_BD), len(weight_CD), _l2_bytes(feature_BD)):
        logit_BC = logits_of(*operands(feature_BD[rows], weight_CD.dtype, eps), weight_CD, bias_C, temperature)
        found = rows_topk(logit_BC, None, k, cells=cells)
        ids, logit, lse, mean, entropy = (part[num_done - rows.start :] for part in found)
        parts.append((ids, logit, lse, mean, entropy))
        num_done = rows.stop
    if len(parts) == 1:
        return parts[0]
    ids, logit, lse, mean, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, logit, lse, mean, entropy


def _of_one_type(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _fused_or_split(num_rows: int, num_sms: int) -> Route:
    return "split" if 2 * -(-num_rows // _TILE_ROWS) <= num_sms else "fused"


def _num_parts(taken: Route) -> int | None:
    return None if taken == "split" else 1


def _tell(taken: Route) -> None:
    for observer in observers:
        observer(taken)


def _num_sms(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return _DEFAULT_SMS
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _l2_bytes(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return _DEFAULT_L2_BYTES
    return int(torch.cuda.get_device_properties(tensor.device).L2_cache_size)
