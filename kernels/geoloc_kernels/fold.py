"""LayerNorm folded into the linear layer behind it, and what is left of it: a scale of each row.

Shape letters: B rows, D features, C cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LAYER_NORM_EPS = 1e-5

_FLOAT64_ROWS = 4096


def fold_layer_norm(
    norm_weight_D: Tensor, norm_bias_D: Tensor, weight_CD: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm's scale and shift moved into the linear layer behind it.

    The rows of the folded weight have mean zero, so that they may meet features whose mean was or was not taken off:
    logits = (x @ weight'.T) / sqrt(var(x) + eps) + bias'.

    Args:
        norm_weight_D: [D] LayerNorm's scale.
        norm_bias_D: [D] its shift.
        weight_CD: [C, D] the linear layer's weight.
        bias_C: [C] its bias.

    Returns:
        weight' [C, D] and bias' [C], float32, computed in float64.
    """
    weight = weight_CD.double() * norm_weight_D.double()
    bias = bias_C.double() + weight_CD.double() @ norm_bias_D.double()
    return (weight - weight.mean(dim=1, keepdim=True)).float(), bias.float()


def normed_rows(feature_BD: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """[B, D] float32 rows of mean 0 and variance 1, as LayerNorm makes them before its scale and shift.

    With the mean taken off before the product large means don't cancel in it. In float64, because the squares of values
    above 1e19 overflow in float32.
    """
    parts = [functional.layer_norm(rows.double(), rows.shape[-1:], eps=eps).float() for rows in _tiles(feature_BD)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_scale(feature_BD: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """[B] float32, 1 / sqrt(var(x) + eps): what the product of raw rows with a folded weight is multiplied by."""
    dims = feature_BD.shape[-1:]
    parts = [torch.native_layer_norm(rows.double(), dims, None, None, eps)[2] for rows in _tiles(feature_BD)]
    return torch.cat(parts).flatten().float()


def _tiles(rows: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time, so that copies in float64 stay small."""
    return torch.split(rows, _FLOAT64_ROWS)
