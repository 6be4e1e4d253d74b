"""A head's posterior from features: logits tile by tile from the tensor cores, and never in memory.

One program has a tile of rows and walks its part of the cells. Features times weights run through one flat loop over
(tile of cells, slice of features), so that the next tile's loads are under way while a tile's soft-max is taken.
`fused_topk` gives every program all cells, or for few rows a part of them, and merges what the parts found.

Half inputs go into the tensor cores as they are, their products are summed in float32. Float32 inputs are multiplied as
three products of tf32 halves: a logit is off by about 2^-21 of the sum of |feature * weight|. Neither uses atomics; a
row's answer depends on that row alone while B, C and D keep their sizes.

Needs Triton: import this file inside functions.
Shape letters: B rows, D features, C cells, P cells with padding, K kept, S parts; in the kernel R rows of a program, N
cells of a tile, E features of a slice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from geoloc_kernels.triton_cells import Answer, Cells, kept, new_answer, pack_cells
from geoloc_kernels.triton_merge import Parts, merge_parts, new_parts
from geoloc_kernels.triton_posterior import (
    add_tile,
    no_best,
    no_sums,
    search_tile,
    store_best,
    store_posterior,
    store_sums,
)
from geoloc_kernels.triton_tiles import Tiles, num_programs, tiles_for

_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


# Numbers of rows and parts differ from call to call: no build of their own for those that 16 divides, or for 1.
@triton.jit(do_not_specialize=["num_rows", "tiles_per_part"])
def head_kernel(
    feature_ptr, rstd_ptr, weight_ptr, cells_ptr, cell_id_ptr,
    id_ptr, logit_ptr, lse_ptr, mean_ptr, entropy_ptr, sums_ptr,
    num_rows, num_cells, feature_pieces, feature_pieces_apart, weight_pieces_apart, cells_stride, tiles_per_part,
    inv_temperature,
    k: tl.constexpr, K: tl.constexpr, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    IS_POSTERIOR: tl.constexpr, IS_EVEN: tl.constexpr, IS_PART: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of rows against a part of the cells: the answer, or with `IS_PART` what the merge kernel takes."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    is_row_R = row_R < num_rows
    part = tl.program_id(1)
    # Counted in pieces of 16 bytes, so that the compiler knows that it may load such.
    num_features = feature_pieces * ALIGN
    feature_stride = feature_pieces_apart * ALIGN
    weight_stride = weight_pieces_apart * ALIGN
    slice_E = tl.arange(0, E)
    tile_N = tl.arange(0, N)
    # Past the end the last row and the last cell are read again instead of being masked: rows are not stored, and
    # cells there have a bias of -inf.
    feature_at_R = tl.minimum(row_R, num_rows - 1).to(tl.int64) * feature_stride
    scale_R = tl.load(rstd_ptr + row_R, is_row_R, other=0.0) * inv_temperature

    num_slices = tl.cdiv(num_features, E)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(num_cells, N))
    sums = no_sums(R)
    best = no_best(R, K, k)
    bad_R = tl.zeros([R], tl.float32)
    acc_RN = tl.zeros([R, N], tl.float32)
    for step in range(first * num_slices, last * num_slices):
        begin = (step // num_slices) * N
        at = (step % num_slices) * E
        # The tile's start in 64 bits, places within it in 32.
        weight_at_N = tl.minimum(tile_N, num_cells - 1 - begin) * weight_stride
        feature_at = feature_ptr + at + feature_at_R[:, None] + slice_E[None, :]
        weight_at = weight_ptr + begin.to(tl.int64) * weight_stride + at + weight_at_N[:, None] + slice_E[None, :]
        if IS_EVEN:
            feature_RE = tl.load(feature_at)
            weight_NE = tl.load(weight_at)
        else:
            is_feature_E = (at + slice_E < num_features)[None, :]
            feature_RE = tl.load(feature_at, is_feature_E, other=0.0)
            weight_NE = tl.load(weight_at, is_feature_E, other=0.0)
        if UPCAST:
            feature_RE = feature_RE.to(tl.float32)
            weight_NE = weight_NE.to(tl.float32)
        acc_RN = tl.dot(feature_RE, tl.trans(weight_NE), acc_RN, input_precision="tf32x3")
        if at + E >= num_features:
            col_N = begin + tile_N
            logit_RN = acc_RN * scale_R[:, None]
            # 0 * x is NaN where x is NaN or infinite, and 0 elsewhere.
            bad_R += tl.sum(logit_RN * 0.0, 1)
            logit_RN += (tl.load(cells_ptr + col_N) * inv_temperature)[None, :]
            largest_R = tl.max(logit_RN, 1)
            # The bias has made it overflow.
            bad_R += largest_R * 0.0
            if IS_POSTERIOR:
                sums = add_tile(sums, logit_RN, largest_R, cells_ptr, cells_stride, col_N)
            best = search_tile(best, logit_RN, largest_R, cell_id_ptr, col_N)
            acc_RN = tl.zeros([R, N], tl.float32)
    if IS_PART:
        at_R = row_R * tl.num_programs(1) + part
        store_best(best, tl.zeros([R], tl.float32), at_R, is_row_R, id_ptr, logit_ptr, k, K, k)
        store_sums(sums, bad_R, at_R, is_row_R, sums_ptr)
    else:
        store_best(best, bad_R, row_R, is_row_R, id_ptr, logit_ptr, k, K, k)
        if IS_POSTERIOR:
            store_posterior(sums, bad_R, row_R, is_row_R, lse_ptr, mean_ptr, entropy_ptr)


def fused_topk(
    feature_BD: Tensor,
    rstd_B: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    xyz_C3: Tensor | None,
    k: int,
    inv_temperature: float,
    id_C: Tensor | None = None,
    *,
    cells: Cells | None = None,
    tiles: Tiles | None = None,
    num_parts: int | None = 1,
) -> Answer:
    """The posterior of logits = (feature . weight * rstd + bias) * inv_temperature, never in memory.

    Args:
        feature_BD: [B, D] bfloat16, float16 or float32.
        rstd_B: [B] float32, a scale for each row.
        weight_CD: [C, D], the features' dtype; copied at each call unless its rows are whole multiples of 16 bytes.
        bias_C: [C] float32; None: 0. Where one is no number, no row has an answer.
        xyz_C3: [C, 3] float32 unit vectors; None: the k best alone, without soft-max, for a bank of embeddings.
        k: from 1 to MAX_K; C are kept where there are fewer.
        inv_temperature: 1 / temperature.
        id_C: as `pack_cells` has it: the cells' ids where they stand in another order.
        cells: `pack_cells` of bias, vectors and ids, made before.
        tiles: how the work is cut; None: by dtype and chip.
        num_parts: into how many parts, which another kernel merges, the cells are cut for few rows, at most one a tile;
            None: as many as fill the chip. Sums of parts are added in another order than one program would add them;
            ids and logits are the same.

    Returns:
        The answer; the last three tensors are empty where `xyz_C3` is None.

    Raises:
        ValueError: k or C is out of range, or the dtypes differ.
    """
    if feature_BD.dtype != weight_CD.dtype:
        raise ValueError(f"features are {feature_BD.dtype} and weights {weight_CD.dtype}; convert one of them")
    num_rows, num_cells = len(feature_BD), len(weight_CD)
    k = kept(k, num_cells)
    answer = new_answer(num_rows, k, feature_BD.device, is_posterior=xyz_C3 is not None)
    if num_rows == 0:
        return answer
    feature_BD, weight_CD = _aligned(feature_BD), _aligned(weight_CD)
    num_features, align = feature_BD.shape[1], _alignment(feature_BD)
    if cells is None:
        bias_C = weight_CD.new_zeros(num_cells, dtype=torch.float32) if bias_C is None else bias_C
        cells = pack_cells(num_cells, bias_C, xyz_C3, id_C)
    tiles = tiles or tiles_for(feature_BD, num_rows)
    num_row_tiles, num_tiles = triton.cdiv(num_rows, tiles.rows), triton.cdiv(num_cells, tiles.cells)
    if num_parts is None:
        num_parts = max(num_programs(feature_BD) // num_row_tiles, 1)
    tiles_per_part = triton.cdiv(num_tiles, min(num_parts, num_tiles))
    num_parts = triton.cdiv(num_tiles, tiles_per_part)
    parts: Parts | None = new_parts(num_rows, num_parts, k, feature_BD.device) if num_parts > 1 else None
    ids, logit, lse, mean, entropy = answer
    with torch.cuda.device_of(feature_BD):
        head_kernel[(num_row_tiles, num_parts)](
            feature_BD, rstd_B.contiguous(), weight_CD, cells.table_4P, cells.id_P,
            parts.ids if parts else ids, parts.logit if parts else logit, lse, mean, entropy,
            parts.sums if parts else logit,
            num_rows, num_cells, num_features // align, feature_BD.stride(0) // align, weight_CD.stride(0) // align,
            cells.table_4P.stride(0), tiles_per_part, inv_temperature,
            k=k, K=triton.next_power_of_2(k), R=tiles.rows, N=tiles.cells, E=tiles.features,
            IS_POSTERIOR=xyz_C3 is not None, IS_EVEN=num_features % tiles.features == 0, IS_PART=parts is not None,
            # The interpreter multiplies bfloat16 as if it were integers.
            ALIGN=align, UPCAST=_IS_INTERPRETED,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not None:
            merge_parts(parts, answer, num_parts, is_posterior=xyz_C3 is not None)
    return answer


def _alignment(tensor: Tensor) -> int:
    """Elements of 16 bytes."""
    return 16 // tensor.element_size()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with columns of zeros if its rows are not contiguous or not multiples of 16 bytes."""
    align = _alignment(tensor)
    if tensor.stride(1) == 1 and tensor.stride(0) % align == 0 and tensor.shape[1] % align == 0:
        return tensor
    return functional.pad(tensor, (0, -tensor.shape[1] % align)).contiguous()
