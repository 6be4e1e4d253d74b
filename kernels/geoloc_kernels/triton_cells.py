"""What the head's kernels are given and give back: cells as they read them, and the tensors of an answer.

Shape letters: B rows, C cells, P cells with padding, K kept.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

MAX_K = 32
"""The most that a kernel keeps of a row."""

# No tile has more cells than this, so that tiles never read past the padding.
_PADDING = 8192

Answer: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""ids [B, K] int64, logits [B, K] float32, log-sum-exp [B] float64, mean [B, 3] float64, entropy [B] float32.

Best first, the lowest id first among equals. A row whose logits are not all finite has ids -1, and NaN elsewhere.
"""


class Cells(NamedTuple):
    """Cells as the kernels read them: tiles without masks, since what is missing at the end is padded."""

    table_4P: Tensor
    """[4, P] float32, contiguous: bias (-inf in the padding), x, y, z (0 in the padding)."""
    id_P: Tensor
    """[P] int32."""


def pack_cells(num_cells: int, bias_C: Tensor | None, xyz_C3: Tensor | None, id_C: Tensor | None) -> Cells:
    """Cells laid out for the kernels. A head may do this once and pass the result to every call.

    Args:
        num_cells: C.
        bias_C: [C]; None: 0.
        xyz_C3: [C, 3] unit vectors; None: 0.
        id_C: [C] integers from 0 to 2^31 - 64, all different, by which equals are ordered; None: 0 to C - 1.
    """
    given = [tensor for tensor in (bias_C, xyz_C3, id_C) if tensor is not None]
    device = given[0].device if given else torch.device("cpu")
    num_padded = -(-num_cells // _PADDING) * _PADDING
    table_4P = torch.zeros(4, num_padded, device=device)
    table_4P[0, num_cells:] = float("-inf")
    if bias_C is not None:
        # A bias that is no number spoils every row; the kernels see it best as a logit beyond all others.
        table_4P[0, :num_cells] = bias_C.where(bias_C.isfinite(), torch.inf)
    if xyz_C3 is not None:
        table_4P[1:, :num_cells] = xyz_C3.T
    if id_C is None:
        return Cells(table_4P, torch.arange(num_padded, dtype=torch.int32, device=device))
    id_P = torch.full((num_padded,), -1, dtype=torch.int32, device=device)
    id_P[:num_cells] = id_C
    return Cells(table_4P, id_P)


def new_answer(num_rows: int, k: int, device: torch.device, *, is_posterior: bool = True) -> Answer:
    """Tensors for an answer; without a posterior the last three have no rows."""
    num = num_rows if is_posterior else 0
    return (
        torch.empty(num_rows, k, dtype=torch.int64, device=device),
        torch.empty(num_rows, k, dtype=torch.float32, device=device),
        torch.empty(num, dtype=torch.float64, device=device),
        torch.empty(num, 3, dtype=torch.float64, device=device),
        torch.empty(num, dtype=torch.float32, device=device),
    )


def kept(k: int, num_cells: int) -> int:
    """How many of a row's cells are kept.

    Raises:
        ValueError: k is not from 1 to MAX_K, or there are no cells.
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"the kernels keep from 1 to {MAX_K} cells, not {k}")
    if num_cells < 1:
        raise ValueError("a posterior needs at least one cell, got none")
    return min(k, num_cells)
