"""Settings of packing. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Pack photos into tar shards: folders, single photos, or a CSV or Parquet that lists photos or holds them."""

    sources: Positional[Annotated[tuple[str, ...], arg(metavar="SOURCES")]] = ()
    """Folders, photos, or tables: a CSV, TSV or Parquet with a column `path`, or a Parquet with the photos' bytes."""
    out: str
    """Folder of the shards 000000.tar, 000001.tar, ..."""
    shard_photos: int = 10_000
    """Photos per shard, at most."""
    shard_mb: int = 1000
    """Size of a shard in MB, at most, a single larger photo excepted."""
    path_column: str = "path"
    """Column of a CSV or Parquet that names the photo's file: absolute, or relative to the table's folder."""
    image_column: str = ""
    """Column of a Parquet that holds the photo's bytes, plain or as Hugging Face's struct of bytes and path. Not given:
    image, bytes or image_bytes, where there is one."""
    key_column: str = ""
    """Column that names the photo. Not given: `key` where there is one, else the photo's path, else its number."""
    exif: bool = True
    """Put the position and the time that a photo's EXIF tells into its metadata."""
    duplicates: Literal["error", "rename"] = "error"
    """What to do when two photos have one key: stop before anything is written, or append ~2, ~3, ... to the later
    ones."""
    skip_missing: bool = False
    """Go on without the photos that cannot be read, and list them in skipped.csv; otherwise one of them stops the
    packing before anything is written."""
    overwrite: bool = False
    """Replace the shards that the output folder holds already."""

    def __post_init__(self) -> None:
        expand_home(self, {"out"})
        if not self.sources or not all(self.sources):
            raise ConfigError("no photos were given: name a folder, photos, or a CSV or Parquet that lists them")
        if not self.out:
            raise ConfigError("--out is missing: name the folder for the shards")
        if self.shard_photos < 1:
            raise ConfigError(f"--shard-photos must be at least 1, got {self.shard_photos}")
        if self.shard_mb < 1:
            raise ConfigError(f"--shard-mb must be at least 1, got {self.shard_mb}")
        if self.duplicates not in ("error", "rename"):
            raise ConfigError(f"--duplicates must be error or rename, got {self.duplicates!r}")
