"""One batch: as decode threads fill it, and as the consumer gets it.

Shape letters: B batch, S image side.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError
from geoloc_batch.records import Sample


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One fixed shape for the encoder."""

    pixels: Tensor
    """[B, 3, S, S] uint8, channels last in memory (torch.channels_last): the order that decoders write."""
    samples: tuple[Sample, ...]
    """Whose pixels the first rows are; the rows behind them are zeros."""
    give_back: Callable[[], None] | None = field(default=None, repr=False)
    """Set by the stream, see release."""

    def release(self) -> None:
        """Give the buffer back to the stream, which will write into `pixels` again; a second call does nothing."""
        if self.give_back is not None:
            self.give_back()


@dataclass(slots=True, eq=False)
class Filling:
    """A batch that decode threads write into."""

    pixels: Tensor
    samples: list[Sample] = field(default_factory=list)
    num_written: int = 0
    rows: npt.NDArray[np.uint8] = field(init=False)
    """[B, S, S, 3], the pixels as they lie in memory."""

    def __post_init__(self) -> None:
        self.rows = self.pixels.permute(0, 2, 3, 1).numpy()


def new_ring(num_batches: int, batch_size: int, side: int, *, pin_memory: bool) -> list[Tensor]:
    """Batches to be filled.

    Returns:
        [B, 3, S, S] uint8 each, channels last in memory.

    Raises:
        ConfigError: they do not fit into memory.
    """
    num_bytes = num_batches * batch_size * side * side * 3
    # Asked beforehand: the kernel promises more memory than there is, and kills whoever fills it.
    if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise _no_room(num_batches, batch_size, num_bytes)
    try:
        return [
            torch.empty((batch_size, side, side, 3), dtype=torch.uint8, pin_memory=pin_memory).permute(0, 3, 1, 2)
            for _ in range(num_batches)
        ]
    except (RuntimeError, MemoryError) as error:
        raise _no_room(num_batches, batch_size, num_bytes) from error


def _no_room(num_batches: int, batch_size: int, num_bytes: int) -> ConfigError:
    return ConfigError(
        f"--batch-size {batch_size} needs {num_bytes / 1e9:.1f} GB for the {num_batches} batches that photos are "
        "decoded into, more than there is; pass a smaller one"
    )
