"""How many photos make a step where the user leaves it open."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

log = logging.getLogger("geoloc_batch")

CPU_BATCH = 32
CUDA_BATCHES = (256, 128, 64)
"""Tried in this order. 256 fills the largest chips; more gains nothing."""


def largest_that_fits(try_out: Callable[[int], object], *, device: torch.device) -> int:
    """The largest of CUDA_BATCHES for which the device's memory is enough.

    Args:
        try_out: computes one batch of a size, and raises torch's OutOfMemoryError where it does not fit.
        device: whose memory it is.

    Raises:
        OutOfMemoryError: not even the smallest fits.
    """
    for size in CUDA_BATCHES:
        try:
            try_out(size)
            return size
        except torch.OutOfMemoryError:
            if size == CUDA_BATCHES[-1]:
                raise
            log.info("batches of %d do not fit into the memory of %s", size, device)
        finally:
            _give_back(device)
    raise AssertionError


def _give_back(device: torch.device) -> None:
    """Others may use this memory, and other sizes need other pieces of it."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
