"""Fills the compile cache with the graph that a run of an encoder will ask for.

On CUDA, where --compile-mode is left open, the tower is compiled in each mode, and the fastest is remembered there too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.choice import (
    MODES,
    Choice,
    Seconds,
    choose_mode,
    is_measured,
    keep_choice,
    read_choice,
    stopwatch,
)
from geoloc_batch.model.compile_cache import graph_folder, is_finished
from geoloc_batch.model.config import WarmupConfig
from geoloc_batch.model.encoder import Encoder, load_encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """What `geoloc warmup` ends with."""

    encoder: str
    precision: str
    batch_size: int
    device: str
    seconds: float
    """For the first batch, compiling included, and the comparison of modes where there was one."""
    was_warm: bool
    """The graph was there already, and was loaded."""
    compile_mode: str
    sdpa: str
    milliseconds: dict[str, float]
    """For a batch in each mode, where they were compared just now."""
    compile_cache: str
    """The folder of this graph."""


def warm_up(
    config: WarmupConfig, *, device: torch.device | str | None = None, seconds: Seconds | None = None
) -> Warmup:
    """Compile an encoder, or see that it was compiled.

    Args:
        config: of the encoder; `compile` counts as on.
        device: as load_encoder takes it.
        seconds: as choice.stopwatch gives them, where modes are compared; a test's own.

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
        compile_mode=wanted.compile_mode,
        sdpa=wanted.sdpa,
        compile_cache=wanted.compile_cache,
        device=device,
    )
    started = time.perf_counter()
    root = encoder.cache_root()
    assert root is not None
    is_open = wanted.compile_mode == "auto" and is_measured(encoder.device)
    milliseconds: dict[str, float] = {}
    if is_open and read_choice(root, encoder.graph_facts(), asked=wanted.sdpa) is None:
        milliseconds = _compare_modes(encoder, root, seconds or stopwatch(encoder.device), asked=wanted.sdpa)
    folder = graph_folder(root, encoder.graph_facts())
    was_warm = is_finished(folder) and not milliseconds
    encoder.encode(_black(encoder)).cpu()
    if not is_finished(folder):
        raise ConfigError(f"--compile-cache {root} was not filled; name a folder that can be written")
    return Warmup(
        encoder=encoder.name,
        precision=encoder.precision,
        batch_size=encoder.batch_size,
        device=str(encoder.device),
        seconds=round(time.perf_counter() - started, 3),
        was_warm=was_warm,
        compile_mode=encoder.compile_mode,
        sdpa=encoder.sdpa,
        milliseconds=milliseconds,
        compile_cache=str(folder),
    )


def _compare_modes(encoder: Encoder, root: Path, seconds: Seconds, *, asked: str) -> dict[str, float]:
    """Compile a tower in each mode, settle the encoder on the fastest, and keep that for later processes."""
    pixels = _black(encoder).to(encoder.device)
    contenders = {}
    for mode in MODES:
        trial = encoder.at_precision(encoder.precision)
        trial.settle(compile_mode=mode)
        contenders[mode] = partial(trial.encode, pixels)
    mode, found = choose_mode(contenders, seconds)
    encoder.settle(compile_mode=mode)
    milliseconds = {name: round(1000 * value, 3) for name, value in found.items()}
    try:
        choice = Choice(sdpa=encoder.sdpa, compile_mode=mode)
        keep_choice(root, encoder.graph_facts(), choice, milliseconds, asked=asked)
    except OSError as error:
        raise ConfigError(
            f"--compile-cache {root} was not filled ({error.strerror}); name a folder that can be written"
        ) from error
    return milliseconds


def _black(encoder: Encoder) -> Tensor:
    """A batch, channels last in memory, as the stream hands over batches."""
    shape = (encoder.batch_size, encoder.image_size, encoder.image_size, 3)
    return torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
