"""What a caller of load_encoder may have misspelt. The command line has met its own before."""

from __future__ import annotations

import torch

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.arithmetic import PRECISIONS
from geoloc_batch.model.attention import BACKENDS, DEFAULT
from geoloc_batch.model.choice import MODES
from geoloc_batch.model.config import EncoderConfig


def check_options(config: EncoderConfig) -> None:
    """Raise ConfigError for a word that is none of an option's."""
    _check("--tap", config.tap, ("pooled", "projected"))
    _check("--compile", config.compile, ("auto", "on", "off"))
    _check("--precision", config.precision, ("auto", *PRECISIONS))
    _check("--compile-mode", config.compile_mode, ("auto", *MODES))
    _check("--sdpa", config.sdpa, ("auto", DEFAULT, *BACKENDS))


def _check(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is meant; None is the first CUDA device, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is unknown: {str(error).splitlines()[0]}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device} is not there: this process sees {torch.cuda.device_count()} CUDA devices")
    return place
