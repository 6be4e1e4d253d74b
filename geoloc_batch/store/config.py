"""Settings of the commands that look at an output folder. Free of torch and of all else that is slow to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home

WATCH_S = 10.0


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a run is, how fast, who works on it and who has gone silent."""

    # What --watch means where no number follows it.
    WITHOUT_VALUE: ClassVar[dict[str, str]] = {"watch": str(WATCH_S)}

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The output folder of the run."""
    watch: Annotated[float | None, arg(metavar="[SECONDS]")] = None
    """Look again every so many seconds (10 where no number follows) until all is done: a terminal is redrawn, elsewhere
    each look is one line."""
    json: bool = False
    """Print the JSON object alone, and all ranks in it, where the text has the first 24."""

    def __post_init__(self) -> None:
        expand_home(self, {"out"})
        if self.watch is not None and not 0.1 <= self.watch <= 86400:
            raise ConfigError(f"--watch must lie between 0.1 and 86400 seconds, got {self.watch}")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Put the results of all units together: predictions (or metadata) as one Parquet, or embeddings as one .npy."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The output folder of the run, its --out."""
    out: str
    """What to write: FILE.parquet, or a new folder laid out as RUN is, with a folder for each of several heads. Nothing
    is overwritten."""
    embeddings: bool = False
    """Merge the embeddings into one .npy, with their metadata as one Parquet in the same order; --out is a folder."""
    partial: bool = False
    """Merge what is done of a run that is not complete; without it such a run is refused."""

    def __post_init__(self) -> None:
        expand_home(self, {"run", "out"})
        if not self.out:
            raise ConfigError("--out must be given: name a file that ends in .parquet, or a new folder")
