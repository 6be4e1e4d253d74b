"""Settings of the encoder. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geoloc_batch.errors import ConfigError

STREETCLIP = "geolocal/StreetCLIP"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which encoder turns photos into features, and how it runs."""

    encoder: str = STREETCLIP
    """A folder with a Hugging Face CLIP checkpoint, a hub id (OWNER/NAME[@REVISION]),
    open_clip:ARCH[:PRETRAINED-or-file], or demo."""
    tap: Literal["pooled", "projected"] = "pooled"
    """pooled: the class token after the last layer norm, what heads take. projected: after CLIP's projection, what
    text is compared with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on CUDA and fp32 on a CPU."""
    batch_size: int = 0
    """Images per step, the one size that the encoder sees; 0 takes 256 on CUDA and 32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA and off on a CPU."""

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ConfigError(f"--batch-size must be 0 (choose) or more, got {self.batch_size}")
        if not self.encoder:
            raise ConfigError("--encoder must not be empty: give a checkpoint folder, a hub id, open_clip:ARCH or demo")
