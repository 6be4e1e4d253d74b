"""The small records that pass from room to room. Nothing but the standard library here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one execution reads and one commit publishes: a shard, a byte range of one, an embedding pair, or
    locations that embedding pairs show.
    """

    index: int
    """Position in the plan, pinned at first sight: it names the unit's output files."""
    kind: Literal["shard", "embeddings", "locations"]
    """shard: a tar of photos. embeddings: an .npy with its Parquet of metadata. locations: those of a range of numbers,
    their views wherever among the pairs of a folder."""
    source: str
    """The shard as the user gave it: a path, an http(s) URL or a `pipe:` command; the path of the .npy; or
    the folder of the pairs."""
    num_bytes: int = 0
    """Bytes to read, 0 where that is not known beforehand (pipes, some servers)."""
    start: int = 0
    """First byte of the range, at a sample's border. Of locations the number of the first; where it equals `stop`,
    the rows that show no location are meant."""
    stop: int | None = None
    """End of the range, None for the end of the file."""
    first_row: int = 0
    """The row that the first photo of the range has in its shard."""
    max_rows: int | None = None
    """Read no more photos than this (a trial run), None for all."""
    pinned_source: str = ""
    """How the source was given when it was first seen, where it is spelt otherwise now."""

    @property
    def shard(self) -> str:
        """What rows and errors call the source: the spelling of its first sight."""
        return self.pinned_source or self.source


@dataclass(frozen=True, slots=True)
class Sample:
    """One photo's identity. (shard, row) is unique; keys may repeat across shards."""

    unit: Unit
    shard: str
    """The shard as given when the photo was read: unit.source, or, from embeddings, the one that they name."""
    row: int
    """Position among the photos of its shard, counted from 0, damaged and doubled ones included."""
    key: str
    """The member's path without its last extension."""
    meta: bytes
    """The sample's json as it stands in the shard, b"" where there is none."""
    location: str | None = None
    """Which location it shows, where that was looked up already."""


@dataclass(frozen=True, slots=True)
class RowError:
    """A photo that gave no row."""

    key: str
    shard: str
    row: int
    stage: str
    """read, decode, encode, group or locate."""
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class UnitError:
    """A shard that could not be read to its end. The samples before the damage are kept."""

    shard: str
    message: str
    offset: int
    """Bytes into the shard; -1 where it could not be opened."""
    bytes_unread: int | None
    """Bytes after the damage, None where the length is unknown."""
    retryable: bool


@dataclass(frozen=True, slots=True)
class UnitEnd:
    """Said once per unit, when its last photo has been read and decoded or refused."""

    unit: Unit
    num_samples: int
    """Photos seen: those handed on plus those in `errors`."""
    errors: tuple[RowError, ...] = ()
    unit_error: UnitError | None = None
    warnings: tuple[str, ...] = ()
