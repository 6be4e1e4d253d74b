"""How the head's kernel cuts its work: fixed by dtype, chip and number of rows, so that a size always means one answer.

Every choice compiles without a spill (tests/kernels/test_triton_build.py). On Hopper a tile of 128 x 128 has 64 logits
a thread in registers; 128 x 256 would leave no room for the soft-max.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Sizes of one program's work."""

    rows: int
    """Rows of a program; a power of two, at least 16, as the next two."""
    cells: int
    """Cells of a tile."""
    features: int
    """Features of a slice."""
    warps: int
    stages: int
    """Slices in flight."""


HOPPER_HALF = Tiles(128, 128, 64, 8, 4)
# Two of these programs share a multiprocessor: one loads while the other takes its soft-max.
HOPPER_HALF_FEW_ROWS = Tiles(64, 128, 64, 4, 4)
HOPPER_FLOAT = Tiles(64, 128, 32, 8, 3)
AMPERE_HALF = Tiles(128, 64, 32, 8, 4)
AMPERE_FLOAT = Tiles(64, 64, 32, 8, 3)


def pick_tiles(dtype: torch.dtype, capability: tuple[int, int], num_rows: int) -> Tiles:
    """The tiles of `num_rows` rows of `dtype` on a chip of a compute capability."""
    # Chips of 12.x multiply as Ampere does, with less shared memory than Hopper.
    is_hopper = (9, 0) <= capability < (12, 0)
    if dtype == torch.float32:
        return HOPPER_FLOAT if is_hopper else AMPERE_FLOAT
    if not is_hopper:
        return AMPERE_HALF
    return HOPPER_HALF_FEW_ROWS if num_rows <= HOPPER_HALF_FEW_ROWS.rows else HOPPER_HALF


def tiles_for(feature_BD: Tensor, num_rows: int) -> Tiles:
    """The tiles on the tensor's device; on a CPU, under the interpreter, Hopper's."""
    capability = torch.cuda.get_device_capability(feature_BD.device) if feature_BD.is_cuda else (9, 0)
    return pick_tiles(feature_BD.dtype, capability, num_rows)


def num_programs(feature_BD: Tensor) -> int:
    """Programs that fill the tensor's device, two a multiprocessor; on a CPU, under the interpreter, eight."""
    if not feature_BD.is_cuda:
        return 8
    return 2 * int(torch.cuda.get_device_properties(feature_BD.device).multi_processor_count)
