"""head_topk: from features to the best cells of a head, its log-sum-exp, mean on the sphere and entropy, in one op.

Shape letters: B rows, D features, C cells, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoloc_kernels.fold import LAYER_NORM_EPS
from geoloc_kernels.logits import logits_of, operands
from geoloc_kernels.posterior import (
    HeadTopk,
    RunningPosterior,
    cell_chunks,
    check_cells,
    check_floats,
    empty_parts,
    joined,
    row_tiles,
)
from geoloc_kernels.routes import KERNEL_K, PRODUCT_CELLS, head_posterior, packed_cells


def head_topk(
    feature_BD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    xyz_C3: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    eps: float = LAYER_NORM_EPS,
    id_C: Tensor | None = None,
    packed: Sequence[Tensor] = (),
) -> HeadTopk:
    """The posterior of a folded head (see `fold_layer_norm`), without the logits of all cells in memory.

    logits = (rstd(x) (x @ weight.T) + bias) / temperature, with sums in float32 and never rounded to less; rstd(x) is
    1 / sqrt(var(x) + eps).

    Args:
        feature_BD: [B, D] float32, float16 or bfloat16, raw, B >= 0.
        weight_CD: [C, D] from `fold_layer_norm`, of the features' type, or one of both is widened to the other's.
        bias_C: [C] from `fold_layer_norm`.
        xyz_C3: [C, 3] float32 or float64, the cells' unit vectors. Their sums are float64 on the CPU, float32 on CUDA.
        k: cells to keep, at least 1; all of them where there are fewer. On CUDA more than 32 take the slow way.
        temperature: positive.
        eps: LayerNorm's.
        id_C: [C] int64, the cells' ids where the weight's rows are in another order, 0 to C - 1; None: they are not.
        packed: on CUDA, bias, vectors and ids as `prepare_head` lays them out for the kernels; none: in every call.

    Returns:
        HeadTopk, on the features' device. Each row depends on itself alone, to the bit among calls of one shape. No
        gradient leads back to the inputs.

    Raises:
        ValueError: shapes, types or devices do not fit together, or k or temperature cannot be.
    """
    _check_head(feature_BD, weight_CD, bias_C, temperature)
    check_cells(feature_BD, xyz_C3, len(weight_CD), k)
    if id_C is not None and (id_C.shape != bias_C.shape or id_C.dtype != torch.int64):
        raise ValueError(f"id_C must be [{len(bias_C)}] int64, got {list(id_C.shape)} of {id_C.dtype}")
    _check_layout(weight_CD, id_C, packed)
    tensors = (tensor.detach() for tensor in (feature_BD, weight_CD, bias_C, xyz_C3))
    return HeadTopk(*_head_topk(*tensors, id_C, k, temperature, eps, list(packed)))


def head_definition(
    feature_BD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    xyz_C3: Tensor,
    id_C: Tensor | None,
    k: int,
    temperature: float,
    eps: float,
    packed: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op `geoloc::head_topk` computes, in plain PyTorch; see `head_topk`."""
    num_rows, num_cells = len(feature_BD), len(weight_CD)
    is_ascending = id_C is None
    ids = torch.arange(num_cells, device=feature_BD.device) if id_C is None else id_C
    parts = []
    for rows in row_tiles(num_rows):
        rows_BD, scale_B = operands(feature_BD[rows], weight_CD.dtype, eps)
        running = RunningPosterior(k, is_ascending=is_ascending)
        for cells in cell_chunks(len(rows_BD), num_cells, k):
            logit_BC = logits_of(rows_BD, scale_B, weight_CD[cells], bias_C[cells], temperature)
            running.add(logit_BC, xyz_C3[cells], ids[cells])
        parts.append(running.result())
    return joined(parts, num_cells, k, feature_BD.device)


_head_topk = torch.library.custom_op("geoloc::head_topk", head_definition, mutates_args=())


@_head_topk.register_kernel("cuda")
def _(
    feature_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, xyz_C3: Tensor, id_C: Tensor | None, k: int, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    way = head_definition if k > KERNEL_K or len(feature_BD) == 0 else head_posterior
    return way(feature_BD, weight_CD, bias_C, xyz_C3, id_C, k, *settings)


@_head_topk.register_fake
def _(
    feature_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, xyz_C3: Tensor, id_C: Tensor | None, k: int, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_parts(feature_BD.shape[0], weight_CD.shape[0], k, feature_BD)


@torch.no_grad()
def head_logits(
    feature_BD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = LAYER_NORM_EPS,
    k: int = 1,
) -> Tensor:
    """[B, C] float32 logits of a folded head; arguments as `head_topk` has them.

    On the CPU, of equal shapes and k, they are the very ones that `head_topk` sees: `posterior_topk` of them gives its
    bits. On CUDA products of another shape may round otherwise.
    """
    _check_head(feature_BD, weight_CD, bias_C, temperature)
    if feature_BD.is_cuda:
        return logits_of(*operands(feature_BD, weight_CD.dtype, eps), weight_CD, bias_C, temperature)
    logit_BC = feature_BD.new_empty((len(feature_BD), len(weight_CD)), dtype=torch.float32)
    for rows in row_tiles(len(feature_BD)):
        rows_BD, scale_B = operands(feature_BD[rows], weight_CD.dtype, eps)
        for cells in cell_chunks(len(rows_BD), len(weight_CD), k):
            logit_BC[rows, cells] = logits_of(rows_BD, scale_B, weight_CD[cells], bias_C[cells], temperature)
    return logit_BC


def _check_head(feature_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, temperature: float) -> None:
    check_floats(feature_BD, "feature_BD")
    check_floats(weight_CD, "weight_CD")
    if weight_CD.shape[1] != feature_BD.shape[1] or bias_C.shape != weight_CD.shape[:1]:
        raise ValueError(
            f"features {list(feature_BD.shape)}, weight {list(weight_CD.shape)} and bias {list(bias_C.shape)} do not "
            "fit together: they must be [B, D], [C, D] and [C]"
        )
    if not feature_BD.device == weight_CD.device == bias_C.device:
        raise ValueError(f"features are on {feature_BD.device}, weight on {weight_CD.device}, bias on {bias_C.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_layout(weight_CD: Tensor, id_C: Tensor | None, packed: Sequence[Tensor]) -> None:
    if id_C is not None and id_C.device != weight_CD.device:
        raise ValueError(f"id_C is on {id_C.device} and the weight is on {weight_CD.device}: move one")
    if packed and (packed[0].shape[-1] < len(weight_CD) or packed[0].device != weight_CD.device):
        raise ValueError(
            f"packed has {packed[0].shape[-1]} cells on {packed[0].device}, the weight {len(weight_CD)} on "
            f"{weight_CD.device}: pass what prepare_head made of this head"
        )


@dataclass(frozen=True, eq=False, slots=True)
class PreparedHead:
    """A folded head as `head_topk` is fastest with it; made by `prepare_head`. Ids are the original ones throughout."""

    weight_CD: Tensor
    """[C, D], its rows in the order of `id_C`."""
    bias_C: Tensor
    """[C] float32."""
    xyz_C3: Tensor
    """[C, 3] unit vectors."""
    id_C: Tensor | None
    """[C] int64, the original rows; None where the order is the original one."""
    packed: tuple[Tensor, ...]
    """On CUDA the last three as the kernels read them."""

    def topk(self, feature_BD: Tensor, k: int, *, temperature: float = 1.0) -> HeadTopk:
        """See `head_topk`."""
        return head_topk(
            feature_BD,
            self.weight_CD,
            self.bias_C,
            self.xyz_C3,
            k,
            temperature=temperature,
            id_C=self.id_C,
            packed=self.packed,
        )

    def logits(self, feature_BD: Tensor, *, temperature: float = 1.0, k: int = 1) -> Tensor:
        """[B, C] float32 in the original order of the cells; see `head_logits`."""
        logit_BC = head_logits(feature_BD, self.weight_CD, self.bias_C, temperature=temperature, k=k)
        return logit_BC if self.id_C is None else logit_BC[:, self.id_C.argsort()]


def prepare_head(weight_CD: Tensor, bias_C: Tensor, xyz_C3: Tensor, *, is_shuffled: bool | None = None) -> PreparedHead:
    """Put the cells into the order that suits the device; once, at load.

    Partitions list cells by place, so that the best of a row are neighbours, and a kernel that searches tile by tile
    finds most of them in one tile: it waits for one extraction after another. Drawn by lot they are spread over all.

    Args:
        weight_CD: [C, D] from `fold_layer_norm`, on the device where features will be.
        bias_C: [C].
        xyz_C3: [C, 3] the cells' unit vectors.
        is_shuffled: whether the order is drawn; None: where the kernels search tiles, on CUDA with over 8192 cells.
    """
    if is_shuffled is None:
        is_shuffled = weight_CD.is_cuda and len(weight_CD) > PRODUCT_CELLS
    id_C = None
    if is_shuffled:
        # One order for one number of cells, so that a run repeats to the bit.
        id_C = torch.randperm(len(weight_CD), generator=torch.Generator().manual_seed(0)).to(weight_CD.device)
        weight_CD, bias_C, xyz_C3 = weight_CD[id_C], bias_C[id_C], xyz_C3[id_C]
    packed = packed_cells(bias_C, xyz_C3, id_C) if weight_CD.is_cuda else ()
    return PreparedHead(weight_CD, bias_C, xyz_C3, id_C, packed)
