"""Attention's backends: which of torch's kernels computes it.

Shape letters: B batch, H heads, T tokens, E width of a head
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from geoloc_batch.errors import ConfigError

DEFAULT = "default"
"""torch's own choice, by rules that know neither the shape's speed nor the device's."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What a tower's attention is asked for, whatever the batch."""

    num_heads: int
    num_tokens: int
    head_width: int
    dtype: torch.dtype


class Attention:
    """Attention over random numbers, in all layers' shape and in the last one's, which asks for a single token.

    Args:
        shape: of the tower.
        batch_size: B.
        device: where.
    """

    def __init__(self, shape: AttentionShape, *, batch_size: int, device: torch.device) -> None:
        # As a packed projection gives them: the heads of a token side by side. The user's own random numbers go on.
        sides = (batch_size, shape.num_tokens, 3, shape.num_heads, shape.head_width)
        generator = torch.Generator(device).manual_seed(0)
        packed = torch.randn(sides, dtype=shape.dtype, device=device, generator=generator)
        self._qkv_BHTE = packed.permute(2, 0, 3, 1, 4).unbind()

    def run(self, sdpa: str) -> None:
        """Compute it once.

        Raises:
            RuntimeError: the backend does not run here, or memory ends.
        """
        query, key, value = self._qkv_BHTE
        with torch.inference_mode(), warnings.catch_warnings():
            # Why a backend does not run is warned of, at length.
            warnings.simplefilter("ignore")
            with sdpa_kernel([BACKENDS[sdpa]]) if sdpa != DEFAULT else nullcontext():
                scaled_dot_product_attention(query, key, value)
            with attending(sdpa):
                scaled_dot_product_attention(query[:, :, :1], key, value)


@contextmanager
def _preferring(sdpa: str) -> Iterator[None]:
    # Of one token's query some backends know nothing; what is left of it is little work by any formula.
    with sdpa_kernel([BACKENDS[sdpa], SDPBackend.MATH], set_priority=True):
        yield


def attending(sdpa: str) -> AbstractContextManager[None]:
    """Inside, attention is computed by a backend wherever it can be; a graph that is made inside keeps it."""
    return nullcontext() if sdpa == DEFAULT else _preferring(sdpa)


def check_sdpa(sdpa: str, shape: AttentionShape | None, device: torch.device) -> None:
    """Refuse a backend that does not run.

    Args:
        sdpa: default, or one of BACKENDS.
        shape: of the tower; None for one of another kind, whose attention is its own business.
        device: where.

    Raises:
        ConfigError: it does not, for this tower on this device.
    """
    if sdpa == DEFAULT:
        return
    remedy = "pass --sdpa default, which runs everywhere, and another --out where that was pinned to it"
    if shape is None:
        raise ConfigError(f"--sdpa {sdpa} is for plain image transformers, this encoder is of another kind; {remedy}")
    try:
        Attention(shape, batch_size=1, device=device).run(sdpa)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--sdpa {sdpa} does not run on {device} in {shape.dtype} ({reason}); {remedy}") from error
