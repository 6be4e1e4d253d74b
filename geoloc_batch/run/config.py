"""Settings of a run. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.stream.config import StreamConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What holds for every run."""

    limit: int | None = None
    """Stop after this many photos, in the order of the shards: a trial."""
    max_error_rate: float = 0.01
    """More error rows than this share of the photos make exit code 3."""
    heartbeat_s: float = 15.0
    """Seconds between two signs of life of this process. One that misses four of them is taken for dead, and its work
    is done by others; give all processes on one OUT the same."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"--max-error-rate must lie between 0 and 1, got {self.max_error_rate}")
        if not 0.05 <= self.heartbeat_s <= 3600:
            raise ConfigError(f"--heartbeat-s must lie between 0.05 and 3600 seconds, got {self.heartbeat_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Turn shards of photos into embeddings, in clip-retrieval's layout."""

    shards: Positional[Annotated[tuple[str, ...], arg(metavar="SHARDS")]] = ()
    """Tar shards: files, globs, brace ranges, folders, 'pipe:COMMAND', http(s) addresses."""
    out: str
    """Folder of the results. Run again on the same folder to go on where a run was cut off."""
    run: RunConfig = field(default_factory=RunConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("--out must not be empty: name the folder for the embeddings")
        if not self.shards:
            raise ConfigError("no shards were given: name tar files, a glob, a brace range, a folder, pipe: or http(s)")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Locate photos: from shards, from stored embeddings, or straight from photos."""

    shards: Positional[Annotated[tuple[str, ...], arg(metavar="SHARDS")]] = ()
    """Tar shards as `geoloc embed` takes them, or photos and folders of photos."""
    out: str = ""
    """Folder of the results. May be left out for photos: then only the table is printed."""
    from_embeddings: str = ""
    """A folder that `geoloc embed` or --save-embeddings wrote, in place of shards."""
    save_embeddings: bool = False
    """Write the embeddings too, in the same pass."""
    locate: LocateConfig = field(default_factory=LocateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.from_embeddings):
            given = "both" if self.shards else "neither"
            raise ConfigError(f"give either shards (or photos) or --from-embeddings FOLDER, got {given}")
        if self.from_embeddings and self.save_embeddings:
            raise ConfigError("--save-embeddings has nothing to save: --from-embeddings names stored ones already")
        if self.from_embeddings and not self.out:
            raise ConfigError("--out is missing: name the folder for the predictions")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoPlace:
    """One line of the table that follows `geoloc predict photo.jpg`: where it was taken, or why that cannot be said."""

    photo: str
    head: str = ""
    """Which of several heads says so."""
    lat: float = float("nan")
    lon: float = float("nan")
    """Degrees."""
    cell: int = -1
    prob: float = float("nan")
    spread_km: float = float("nan")
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run of embed or predict ends with.

    Counts are of the given shards, whoever worked on them and when; speed is this process's.
    """

    units: int
    samples: int
    rows: int
    errors: int
    seconds: float
    images_per_second: float
    limiting_stage: str
    out: str
    exit_code: int
    """0 complete; 3 complete with unit errors or too many error rows; 75 incomplete, run again."""
    unit_errors: int = 0
    """Shards that could not be read to their end."""
    places: tuple[PhotoPlace, ...] = ()
    """Where photos were given instead of shards: the first of them, with their places."""
