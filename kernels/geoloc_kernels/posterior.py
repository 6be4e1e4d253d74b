"""posterior_topk: what is kept of a posterior over cells, from logits: the best, the mean on the sphere, the entropy.

The definition goes through the cells chunk by chunk with an online soft-max, so that its temporaries stay at some MB
whatever the number of cells.

Shape letters: B rows, C cells, K kept.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geoloc_kernels.routes import KERNEL_K, rows_posterior
from geoloc_kernels.selection import RunningBest

_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# A chunk's logits, 2 MB in float32. Their largest companion is a copy in float64.
_CHUNK_LOGITS = 1 << 19
# Enough for a matrix product to run at full speed.
_ROWS_AT_ONCE = 256
_MIN_FLOAT32 = torch.finfo(torch.float32).min


class HeadTopk(NamedTuple):
    """What is kept of B posteriors over C cells. A row whose logits are not all finite has ids of -1, and NaN else."""

    id_BK: Tensor
    """[B, min(K, C)] int64, the most probable cells, best first; the lowest id first among equals."""
    logit_BK: Tensor
    """[B, min(K, C)] float32, after the temperature. A probability is exp(logit - lse)."""
    lse_B: Tensor
    """[B] float64, the logarithm of the sum of exp(logit); float32 would cost large logits' probabilities 4e-6."""
    mean_B3: Tensor
    """[B, 3] float64, the probability-weighted mean of the cells' unit vectors."""
    entropy_B: Tensor
    """[B] float32, nats, not negative."""


def posterior_topk(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> HeadTopk:
    """What is kept of the posteriors that logits stand for.

    Args:
        logit_BC: [B, C] float32, float16 or bfloat16: logits, or logarithms of probabilities that need not add up to 1.
        xyz_C3: [C, 3] float32 or float64, the cells' unit vectors. Their sums are float64 on the CPU, float32 on CUDA.
        k: cells to keep, at least 1; all of them where there are fewer. On CUDA more than 32 take the slow way.

    Returns:
        HeadTopk, on the logits' device.

    Raises:
        ValueError: shapes, types or devices do not fit together, or k is less than 1.
    """
    check_floats(logit_BC, "logit_BC")
    check_cells(logit_BC, xyz_C3, logit_BC.shape[-1], k)
    return HeadTopk(*_posterior_topk(logit_BC.detach(), xyz_C3.detach(), k))


def posterior_definition(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op `geoloc::posterior_topk` computes, in plain PyTorch; see `posterior_topk`."""
    num_rows, num_cells = logit_BC.shape
    ids = torch.arange(num_cells, device=logit_BC.device)
    parts: list[_Parts] = []
    for rows in row_tiles(num_rows):
        running = RunningPosterior(k, is_ascending=True)
        for cells in cell_chunks(rows.stop - rows.start, num_cells, k):
            running.add(_contiguous_copy(logit_BC[rows, cells]), xyz_C3[cells], ids[cells])
        parts.append(running.result())
    return joined(parts, num_cells, k, logit_BC.device)


_posterior_topk = torch.library.custom_op("geoloc::posterior_topk", posterior_definition, mutates_args=())


@_posterior_topk.register_kernel("cuda")
def _(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if k > KERNEL_K or len(logit_BC) == 0:
        return posterior_definition(logit_BC, xyz_C3, k)
    return rows_posterior(logit_BC, xyz_C3, k)


@_posterior_topk.register_fake
def _(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_parts(logit_BC.shape[0], logit_BC.shape[1], k, logit_BC)


def check_floats(value: Tensor, name: str) -> None:
    """Raises ValueError unless `value` has two dimensions and one of the types that ops take."""
    if value.ndim != 2 or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must have 2 dimensions of float32, float16 or bfloat16, got {list(value.shape)} of {value.dtype}"
        )


def check_cells(rows: Tensor, xyz_C3: Tensor, num_cells: int, k: int) -> None:
    """Raises ValueError unless there are `num_cells` >= 1 unit vectors on the rows' device, and k >= 1."""
    if xyz_C3.shape != (num_cells, 3) or not xyz_C3.is_floating_point():
        raise ValueError(f"xyz_C3 must be [{num_cells}, 3] of a float type, got {list(xyz_C3.shape)} of {xyz_C3.dtype}")
    if xyz_C3.device != rows.device:
        raise ValueError(f"xyz_C3 is on {xyz_C3.device} and the rows are on {rows.device}: move one")
    check_k(num_cells, k)


def check_k(num_cells: int, k: int) -> None:
    """Raises ValueError unless there is something to choose among, and something to keep."""
    if num_cells < 1:
        raise ValueError("there must be at least one cell to choose among, got 0")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _contiguous_copy(logit_BC: Tensor) -> Tensor:
    """To be overwritten, and with one order of sums whatever the layout was."""
    return logit_BC.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def row_tiles(num_rows: int) -> Iterator[slice]:
    """The rows, some at a time."""
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, num_rows))


def cell_chunks(num_rows: int, num_cells: int, k: int) -> Iterator[slice]:
    """The cells of a tile of rows, some at a time: at least k. The same for equal arguments, so that bits repeat."""
    size = max(_CHUNK_LOGITS // num_rows, k)
    for start in range(0, num_cells, size):
        yield slice(start, min(start + size, num_cells))


def joined(parts: list[_Parts], num_cells: int, k: int, device: torch.device) -> _Parts:
    """The parts of all tiles, one below another; empty ones where there is none."""
    if not parts:
        return empty_parts(0, num_cells, k, torch.empty(0, device=device))
    if len(parts) == 1:
        return parts[0]
    ids, logit, lse, mean, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, logit, lse, mean, entropy


def empty_parts(num_rows: int, num_cells: int, k: int, like: Tensor) -> _Parts:
    """Uninitialised parts of the right shapes and types, on the device of `like`."""
    kept = min(k, num_cells)
    return (
        like.new_empty((num_rows, kept), dtype=torch.int64),
        like.new_empty((num_rows, kept), dtype=torch.float32),
        like.new_empty((num_rows,), dtype=torch.float64),
        like.new_empty((num_rows, 3), dtype=torch.float64),
        like.new_empty((num_rows,), dtype=torch.float32),
    )


class RunningPosterior:
    """The posterior of the cells so far: online soft-max in float32 logits and float64 sums, and the k best."""

    def __init__(self, k: int, *, is_ascending: bool) -> None:
        self._best = RunningBest(k, is_ascending=is_ascending)
        self._high_B: Tensor | None = None

    def add(self, logit_BC: Tensor, xyz_C3: Tensor, id_C: Tensor) -> None:
        """Take the next cells: [B, C] float32 logits, any, overwritten; at first at least k, or all that there are."""
        low_B, high_B = logit_BC.amin(dim=1), logit_BC.amax(dim=1)
        if self._high_B is None:
            self._high_B = high_B.nan_to_num(0.0, 0.0, 0.0)
            self._is_finite_B = torch.ones_like(high_B, dtype=torch.bool)
            self._sum_B4 = high_B.new_zeros((len(high_B), 4), dtype=torch.float64)
            self._weighted_B = high_B.new_zeros(len(high_B), dtype=torch.float64)
        floor = None
        if not (torch.maximum(self._high_B, high_B) - low_B).isfinite().all():
            # Rows that are not finite go on as zeros until the end. Or differences overflow, though no logit does.
            is_finite_B = low_B.isfinite() & high_B.isfinite()
            self._is_finite_B &= is_finite_B
            logit_BC = logit_BC.where(is_finite_B[:, None], 0.0)
            high_B, floor = high_B.where(is_finite_B, 0.0), _MIN_FLOAT32
        self._best.add(logit_BC, high_B, id_C)
        self._add_sums(logit_BC, high_B, xyz_C3, floor)

    def _add_sums(self, logit_BC: Tensor, high_B: Tensor, xyz_C3: Tensor, floor: float | None) -> None:
        assert self._high_B is not None
        new_B = torch.maximum(self._high_B, high_B)
        # What was summed with the old maximum taken off moves to the new one: sum of e^(t + d) (t + d).
        step_B = self._high_B.double() - new_B.double()
        self._weighted_B = step_B.exp() * (self._weighted_B + step_B * self._sum_B4[:, 3])
        below_BC = logit_BC.sub_(new_B[:, None])
        if floor is not None:
            below_BC.clamp_(min=floor)
        prob_BC = below_BC.exp()
        # The sum of the probabilities itself is the last column: in one product with the vectors' sums, it rounds as
        # they do, so that the mean of cells at one place is that place to 1e-15.
        xyz1_C4 = torch.cat([xyz_C3.double(), xyz_C3.new_ones((len(xyz_C3), 1), dtype=torch.float64)], dim=1)
        self._sum_B4 = torch.addcmul(prob_BC.double() @ xyz1_C4, step_B.exp()[:, None], self._sum_B4)
        self._weighted_B += below_BC.mul_(prob_BC).sum(dim=1)
        self._high_B = new_B

    def result(self) -> _Parts:
        """id_BK, logit_BK, lse_B, mean_B3 and entropy_B of all cells that were added."""
        assert self._high_B is not None
        is_finite_B1 = self._is_finite_B[:, None]
        sum_B = self._sum_B4[:, 3]
        log_sum_B = sum_B.log()
        entropy_B = (log_sum_B - self._weighted_B / sum_B).clamp(min=0.0)
        return (
            self._best.id_BK.where(is_finite_B1, -1),
            self._best.value_BK.where(is_finite_B1, torch.nan),
            (self._high_B.double() + log_sum_B).where(self._is_finite_B, torch.nan),
            (self._sum_B4[:, :3] / sum_B[:, None]).where(is_finite_B1, torch.nan),
            entropy_B.float().where(self._is_finite_B, torch.nan),
        )
