"""Settings of a run. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home
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
    out: str = ""
    """Folder of the results. Run again on the same folder to go on where a run was cut off."""
    dry_run: bool = False
    """Read and decode alone: tells how many photos a second these shards could feed, what limits that, and how many
    cores an encoder needs. Loads no encoder, writes nothing, needs no --out."""
    target_images_per_second: float = 1345.0
    """With --dry-run: the encoder's speed that cores are counted for; by default 65 % of what one H200 could do at
    most with ViT-L/14-336 in bf16."""
    run: RunConfig = field(default_factory=RunConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        expand_home(self, {"out"})
        if not self.out and not self.dry_run:
            raise ConfigError("--out must be given: name the folder for the embeddings")
        if not self.shards:
            raise ConfigError("no shards were given: name tar files, a glob, a brace range, a folder, pipe: or http(s)")
        if not self.target_images_per_second > 0:
            raise ConfigError(f"--target-images-per-second must be above 0, got {self.target_images_per_second}")


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
    group_by: str = ""
    """The member of the photos' json that names their location (nested members with dots): one row for each location,
    from all of its photos. From shards these must lie in one shard; --from-embeddings finds them wherever they are.
    The numbers 7 and 7.0 and the text 7 name one location, the text 7.0 another."""
    locate: LocateConfig = field(default_factory=LocateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        expand_home(self, {"out", "from_embeddings"})
        if bool(self.shards) == bool(self.from_embeddings):
            given = "both" if self.shards else "neither"
            raise ConfigError(f"give either shards (or photos) or --from-embeddings FOLDER, got {given}")
        if self.from_embeddings and self.save_embeddings:
            raise ConfigError("--save-embeddings has nothing to save: --from-embeddings names stored ones already")
        if self.locate.fusion != "auto" and not self.group_by:
            raise ConfigError(
                f"--fusion {self.locate.fusion} was given without --group-by: name what groups the photos"
            )
        if self.from_embeddings and not self.out:
            raise ConfigError("--out is missing: name the folder for the predictions")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """Execute the units of a run that ended with an error once more, where another try could help."""

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The output folder of the run; the command that made it is taken from there."""
    unit: tuple[int, ...] = ()
    """Make this unit again, whatever its errors, as `geoloc verify` asks for it or because its shard was replaced by a
    sound one; repeat the flag for several. What comes of it replaces what stood, unless the shard cannot be read so far
    now or holds no good photo: then exit code 3. None given takes all units with errors that another try could mend;
    there nothing is replaced by fewer rows."""
    encoder: str = ""
    """Where the encoder is now, if elsewhere than the run's command says."""
    head: tuple[str, ...] = ()
    """Where the heads are now, likewise."""
    cells: tuple[str, ...] = ()
    """Where their cells are now, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityConfig:
    """Compare a precision with fp32 on your own photos: features, and places where heads are given. Writes nothing.

    Where --precision auto stands for fp32, bf16 is compared.
    """

    shards: Positional[Annotated[tuple[str, ...], arg(metavar="SHARDS")]] = ()
    """Tar shards as `geoloc embed` takes them."""
    head: tuple[str, ...] = ()
    """A head's file, as `geoloc predict` takes it; repeat the flag for several. None given compares features alone."""
    cells: tuple[str, ...] = ()
    """geocell_info.json of the heads' partitions: one for all, or one for each in the same order."""
    limit: int = 512
    """Photos to compare, in the order of the shards. Each is encoded twice."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ConfigError("no shards were given: name tar files, a glob, a brace range, a folder, pipe: or http(s)")
        if self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.cells and not self.head:
            raise ConfigError("--cells was given without --head: cells belong to a head")


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
    num_views: int | None = None
    """Photos behind it, where they are grouped by location: `photo` is the location's name then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run of embed, predict or retry ends with.

    Counts are of the given shards, whoever worked on them and when; of a retry, of all that OUT holds. Speed is this
    process's.
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
    """0 complete; 3 complete with unit errors, too many error rows or locations in more than one unit; 75 incomplete,
    run again."""
    unit_errors: int = 0
    """Shards that could not be read to their end."""
    kept: int = 0
    """Units whose retry in this process gave nothing to replace what stands, or that it had to leave out."""
    places: tuple[PhotoPlace, ...] = ()
    """Where photos were given instead of shards: the first of them, with their places."""
