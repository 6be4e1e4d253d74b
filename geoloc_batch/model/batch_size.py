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


# cuBLAS, cuDNN and the driver take memory past torch's allocator, and have words of their own where there is none.
_SHORTAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_shortage(error: RuntimeError) -> bool:
    """Whether an error of torch's says that the device's memory has ended."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SHORTAGES)


def largest_that_fits(try_out: Callable[[int], object], *, device: torch.device) -> int:
    """The largest of CUDA_BATCHES for which the device's memory is enough.

    Args:
        try_out: computes one batch of a size, and raises what `is_shortage` knows where it does not fit.
        device: whose memory it is.

    Raises:
        OutOfMemoryError, RuntimeError: not even the smallest fits; torch's own error.
    """
    for size in CUDA_BATCHES:
        try:
            try_out(size)
            return size
        except RuntimeError as error:
            if not is_shortage(error) or size == CUDA_BATCHES[-1]:
                raise
            log.info("batches of %d do not fit into the memory of %s", size, device)
        finally:
            give_back(device)
    raise AssertionError


def give_back(device: torch.device) -> None:
    """Others may use this memory, and other sizes need other pieces of it."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
