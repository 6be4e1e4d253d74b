"""Settings of an evaluation. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Compare predictions with the truth: bands, median, balscore, GeoScore, accuracy of cells, coverage."""

    predictions: Positional[Annotated[str, arg(metavar="PREDICTIONS")]]
    """OUT of `geoloc predict` or its folder predictions/, or a Parquet or CSV with the columns key, lat, lon; cell and
    topk_cell are used where they are."""
    out: str
    """Folder of its own for metrics.json, metrics.md and rows.parquet; those of an earlier evaluation are replaced."""
    truth: str = ""
    """Parquet (or a folder of them) or CSV with key, lat, lon, and where they are known cell (the true cell) and shard
    (for keys that repeat from shard to shard). Left out, the truth is what the photos' own json says: the columns
    meta_lat and meta_lon of the predictions."""
    cells: str = ""
    """The cells that were predicted, as `geoloc predict` takes them: the true cell is then the one that the true place
    lies in, and the column cell of the truth is not read."""
    split: str = ""
    """Compare only the rows of the truth whose column split has this value: with --truth HEAD/splits.parquet, which
    `geoloc train` writes, --split test leaves out what the head was trained on."""
    head: str = ""
    """Which head's predictions, where OUT holds those of several."""
    thresholds: tuple[float, ...] = ()
    """A further band, in km, besides 1, 25, 200, 750 and 2500; repeat the flag for several."""
    strict: bool = False
    """Count a distance of exactly the threshold as outside (<), as OSV-5M and PIGEON do. Without it, as inside (<=), as
    GeoEstimation and GeoCLIP do."""
    key_column: str = "key"
    """Column of the truth that names the photo: its path in the shard without the last extension. For predictions of
    locations the one that names these: rows of one key that agree count once, so a table of photos will do."""
    lat_column: str = "lat"
    """Column of the truth with degrees of latitude. Without --truth, NAME stands for meta_NAME."""
    lon_column: str = "lon"
    """Column of the truth with degrees of longitude; likewise."""

    def __post_init__(self) -> None:
        if not self.predictions:
            raise ConfigError("PREDICTIONS must not be empty: name OUT of `geoloc predict`, a Parquet or a CSV")
        if not self.out:
            raise ConfigError("--out must not be empty: name the folder for the metrics")
        if self.split and not self.truth:
            raise ConfigError(
                f"--split {self.split} chooses rows of the truth by its column split; name its file with --truth"
            )
        for threshold in self.thresholds:
            if not (math.isfinite(threshold) and threshold > 0):
                raise ConfigError(f"--thresholds must be above 0 km, got {threshold:g}")
        flag_of: dict[str, str] = {}
        for flag, column in (("key", self.key_column), ("lat", self.lat_column), ("lon", self.lon_column)):
            if not column:
                raise ConfigError(f"--{flag}-column must not be empty: name a column of the truth")
            if column in flag_of:
                both = f"--{flag_of[column]}-column and --{flag}-column"
                raise ConfigError(f"{both} are both {column!r}; name one column each")
            flag_of[column] = flag
        expand_home(self, ("predictions", "out", "truth", "cells"))
