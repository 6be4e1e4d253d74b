"""Settings of the encoder. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """auto is bf16 on CUDA and on processors with bf16 matrix tiles (AMX), else fp32. fp8 is bf16 with the products of
    all layers but the last in 8 bits, on CUDA devices that have them (8.9 and later): see what it costs on your photos
    with `geoloc fidelity`."""
    batch_size: int | Literal["auto"] = "auto"
    """Images per step, the one size that the encoder sees. auto (or 0) takes the largest of 64, 128 and 256 that fits
    on CUDA, and 32 on a CPU; the first process of a run decides for all."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA and off on a CPU."""
    compile_mode: Literal["auto", "default", "max-autotune-no-cudagraphs"] = "auto"
    """Which of torch.compile's modes. auto is what `geoloc warmup` found to be the fastest on this device, kept in the
    compile cache; without that, and on a CPU, default."""
    sdpa: Literal["auto", "default", "flash", "efficient", "cudnn", "math"] = "auto"
    """Which of torch's kernels computes attention; default is torch's own choice. auto takes on CUDA the fastest one,
    timed on the device in well under a second, on a CPU default. As with compile_mode, the first process decides for
    all."""
    compile_cache: str = ""
    """Folder of compiled graphs, which later processes start from; off keeps none. By default geoloc_batch/compile
    below the user's cache folder (XDG_CACHE_HOME, ~/.cache). Name one that all nodes share, and that nobody you do not
    trust may write: what lies there is run. `geoloc warmup` fills it."""

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and self.batch_size < 0:
            raise ConfigError(f"--batch-size must be auto (or 0) or at least 1, got {self.batch_size}")
        if not self.encoder:
            raise ConfigError("--encoder must not be empty: give a checkpoint folder, a hub id, open_clip:ARCH or demo")
        if self.compile == "off" and self.compile_mode not in ("auto", "default"):
            raise ConfigError(f"--compile-mode {self.compile_mode} has no part in --compile off; leave one of them out")

    @property
    def given_batch_size(self) -> int | None:
        """The batch size that the user asked for; None where it is left to us."""
        return None if self.batch_size == "auto" else self.batch_size or None


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupConfig:
    """Compile an encoder ahead of a run, so that the run's processes start from the compile cache."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        if self.encoder.compile == "off":
            raise ConfigError("--compile off leaves nothing to warm up; leave it out")
        if self.encoder.compile_cache == "off":
            raise ConfigError("--compile-cache off leaves nothing to warm up; name a folder, or leave it out")
