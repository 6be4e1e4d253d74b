"""The k largest of many columns that come chunk by chunk, exactly: the lowest id first among equals.

Shape letters: B rows, C columns, K kept, T of two lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_HALF = 0xFFFFFFFF


def best_of(value_BC: Tensor, id_C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their ids, descending, the lowest id first among equals.

    Args:
        value_BC: [B, C] float32, no NaN.
        id_C: [C] int64, all different, from 0 to 2^31 - 1.
        k: at least 1; C columns are kept where there are fewer.

    Returns:
        [B, min(k, C)] values and ids.
    """
    # One more than is kept: torch.topk leaves open which of equals it takes, and this one tells whether that matters.
    best_BT, column_BT = value_BC.topk(min(k + 1, value_BC.shape[1]), dim=1)
    id_BT = id_C[column_BT]
    if best_BT.shape[1] > k:
        tied_B = best_BT[:, k - 1] == best_BT[:, k]
        best_BT, id_BT = best_BT[:, :k], id_BT[:, :k]
        if tied_B.any():
            row = tied_B.nonzero().squeeze(1)
            best_BT, id_BT = best_BT.contiguous(), id_BT.contiguous()
            best_BT[row], id_BT[row] = _best_by_key(value_BC[row], id_C, k)
    return _in_order(best_BT, id_BT)


def _best_by_key(value_BC: Tensor, id_C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by way of keys that are all different: the float's bits, made to ascend as it does, then the id."""
    # Adding zero turns -0.0 into 0.0, which has other bits.
    bits_BC = (value_BC + 0.0).view(torch.int32).long()
    ascending_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC)
    column_BK = ((ascending_BC << 32) | (_LOW_HALF - id_C)).topk(k, dim=1).indices
    return value_BC.gather(1, column_BK), id_C[column_BK]


def _in_order(value_BT: Tensor, id_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Descending by value, then ascending by id."""
    if (value_BT[:, 1:] < value_BT[:, :-1]).all():
        return value_BT, id_BT
    id_BT, order_BT = id_BT.sort(dim=1)
    value_BT, order_BT = value_BT.gather(1, order_BT).sort(dim=1, descending=True, stable=True)
    return value_BT, id_BT.gather(1, order_BT)


class RunningBest:
    """The k best of all columns so far.

    Args:
        k: at least 1.
        is_ascending: every later id is greater than every earlier one, so that a later equal never counts.
    """

    value_BK: Tensor
    """[B, K] float32, best first."""
    id_BK: Tensor
    """[B, K] int64."""

    def __init__(self, k: int, *, is_ascending: bool) -> None:
        self._k = k
        self._is_ascending = is_ascending
        self._is_empty = True

    def add(self, value_BC: Tensor, high_B: Tensor, id_C: Tensor) -> None:
        """Take the next columns.

        Args:
            value_BC: [B, C] float32, no NaN; the first ones at least k, or all that there are.
            high_B: [B] the largest of each row.
            id_C: [C] int64.
        """
        if self._is_empty:
            self.value_BK, self.id_BK = best_of(value_BC, id_C, self._k)
            self._is_empty = False
            return
        # Few rows find one of their best in a late chunk: the others are not searched.
        last_B = self.value_BK[:, -1]
        row = (high_B > last_B if self._is_ascending else high_B >= last_B).nonzero().squeeze(1)
        if len(row) == 0:
            return
        found = best_of(value_BC[row] if len(row) < len(value_BC) else value_BC, id_C, self._k)
        both = (torch.cat([old[row], new], dim=1) for old, new in zip((self.value_BK, self.id_BK), found, strict=True))
        value_BT, id_BT = _in_order(*both)
        self.value_BK[row], self.id_BK[row] = value_BT[:, : self._k], id_BT[:, : self._k]
