"""Fills the compile cache with the graph that a run of an encoder will ask for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.compile_cache import is_finished
from geoloc_batch.model.config import WarmupConfig
from geoloc_batch.model.encoder import load_encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """What `geoloc warmup` ends with."""

    encoder: str
    precision: str
    batch_size: int
    device: str
    seconds: float
    """For the first batch, compiling included."""
    was_warm: bool
    """The graph was there already, and was loaded."""
    compile_cache: str
    """The folder of this graph."""


def warm_up(config: WarmupConfig, *, device: torch.device | str | None = None) -> Warmup:
    """Compile an encoder, or see that it was compiled.

    Args:
        config: of the encoder; `compile` counts as on.
        device: as load_encoder takes it.

    Raises:
        ConfigError: the folder of compiled graphs cannot be written; else as load_encoder.
    """
    wanted = config.encoder
    encoder = load_encoder(
        wanted.encoder,
        tap=wanted.tap,
        precision=wanted.precision,
        batch_size=wanted.batch_size,
        compile="on",
        compile_cache=wanted.compile_cache,
        device=device,
    )
    folder = encoder.graph_folder()
    assert folder is not None
    was_warm = is_finished(folder)
    started = time.perf_counter()
    # Channels last in memory, as the stream hands over batches.
    shape = (encoder.batch_size, encoder.image_size, encoder.image_size, 3)
    encoder.encode(torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)).cpu()
    if not is_finished(folder):
        raise ConfigError(f"--compile-cache {folder.parent} was not filled; name a folder that can be written")
    return Warmup(
        encoder=encoder.name,
        precision=encoder.precision,
        batch_size=encoder.batch_size,
        device=str(encoder.device),
        seconds=round(time.perf_counter() - started, 3),
        was_warm=was_warm,
        compile_cache=str(folder),
    )
