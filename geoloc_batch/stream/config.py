"""Settings of the stream. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from geoloc_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How shards are read and photos are decoded."""

    decode_threads: int = 0
    """Threads that decode and resize; 0 takes the CPUs this process may use, less one when there are more than two."""
    fast_decode: bool = False
    """Decode JPEGs that are at least twice too large at 1/2, 1/4 or 1/8 of their size: 1.3 (of 1 megapixel) to 2.4 (of
    12) times as many photos a second. Changes pixels by 0.3 to 3 levels of 255 on average, so features differ."""
    apply_orientation: bool = False
    """Turn photos as their EXIF orientation says. Off, as CLIP's own preprocessing has it."""
    max_pixels: int = 180_000_000
    """A photo with more pixels becomes an error row instead of filling the memory."""
    decode_memory_mb: int = 2048
    """Decoded pixels that all threads together may hold, in MB."""

    def __post_init__(self) -> None:
        if self.decode_threads < 0:
            raise ConfigError(f"--decode-threads must be 0 (choose) or more, got {self.decode_threads}")
        if self.max_pixels < 1:
            raise ConfigError(f"--max-pixels must be at least 1, got {self.max_pixels}")
        if self.decode_memory_mb < 1:
            raise ConfigError(f"--decode-memory-mb must be at least 1, got {self.decode_memory_mb}")
