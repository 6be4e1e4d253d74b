"""Encoders of a run: the one that its settings name, the same in fp32, and what to do when memory ends.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from geoloc_batch.errors import GeolocError
from geoloc_batch.model.attention import DEFAULT
from geoloc_batch.model.batch_size import is_shortage
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.encoder import Encoder, load_encoder

REFERENCE = "fp32"
"""The precision that others are compared with."""

Features = Callable[[Tensor], Tensor]
"""[B, 3, S, S] uint8 -> [B, D] float32."""


def load(config: EncoderConfig, device: torch.device) -> Encoder:
    """The encoder that the settings name.

    Raises:
        UserError, HubError: see load_encoder.
        GeolocError: the device's memory does not hold it.
    """
    try:
        return load_encoder(
            config.encoder,
            tap=config.tap,
            precision=config.precision,
            batch_size=config.batch_size,
            compile=config.compile,
            compile_mode=config.compile_mode,
            sdpa=config.sdpa,
            compile_cache=config.compile_cache,
            device=device,
        )
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise GeolocError(
            f"{device} is out of memory ({_first_line(error)}): the weights of {config.encoder} do not fit beside what "
            "it holds already; end other processes on it, pass a smaller --batch-size, or use another device"
        ) from error


def left_open(config: EncoderConfig) -> list[str]:
    """Settings that the user left to us, as run.json calls them: those of the first rank hold for all."""
    is_open = {
        "precision": config.precision == "auto",
        "compile": config.compile == "auto",
        "compile_mode": config.compile_mode == "auto",
        "sdpa": config.sdpa == "auto",
        "batch_size": config.given_batch_size is None,
    }
    return [name for name, is_left_open in is_open.items() if is_left_open]


def adopt_settings(config: EncoderConfig, pinned: Mapping[str, Any]) -> EncoderConfig:
    """The settings with what a run has pinned in place of what was left open."""
    adopted = {name: pinned[name] for name in left_open(config) if name in pinned}
    if "compile" in adopted:
        adopted["compile"] = "on" if adopted["compile"] else "off"
    if adopted.get("compile", config.compile) == "off":
        # What is not compiled has no mode, whoever asked for one.
        adopted["compile_mode"] = DEFAULT
    return dataclasses.replace(config, **adopted)


def reference_of(encoder: Encoder) -> Features:
    """The same weights in fp32, from [B, 3, S, S] uint8 to [B, D] float32 on the encoder's device, B of any size.

    Never compiled: it has too few photos to compute for that.
    """
    tower = encoder.at_precision(REFERENCE).tower

    def features(pixels_B3SS: Tensor) -> Tensor:
        # As in Encoder.encode: cuDNN convolves fp32 in TF32 unless told otherwise.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BD: Tensor = tower(pixels_B3SS.to(encoder.device).permute(0, 2, 3, 1).contiguous())
            return features_BD

    return features


def wider_precision(precision: str, device: torch.device) -> str | None:
    """What a unit that overflows is made in: bf16, or fp32 where the device only emulates that; None below fp16."""
    if precision != "fp16":
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32"
    return "bf16"


@contextmanager
def explained_shortage(encoder: Encoder, remedy: str) -> Iterator[None]:
    """Say, of a device whose memory ends inside, what can be done.

    Raises:
        GeolocError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise GeolocError(
            f"{encoder.device} is out of memory at --batch-size {encoder.batch_size} ({_first_line(error)}); {remedy}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
