"""Seen: which photos the files of a run hold, to find those that stand twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geoloc_batch.records import Unit


@dataclass(frozen=True, slots=True)
class Double:
    """What stands more than once."""

    shard: str
    """A tar by its pinned name; of an embedding pair also the shard that it names."""
    count: int
    """How many, each beyond its first."""
    what: str
    """photos, keys or locations."""
    units: tuple[int, ...]
    """The indexes of the units that hold the shard, or, between pairs, those photos."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Photos of one shard in one embedding pair."""

    unit: int
    folder: Path
    hashes: NDArray[np.int64]
    """[N] of row and key."""
    is_named: NDArray[np.bool_]
    """[N] has a key that is not its row."""

    def numbered(self, folders: dict[Path, int]) -> NDArray[np.int64]:
        """[N] who numbered the photos, so that only numbers of different hands are compared.

        A photo without a key is named by its row, and other tools may count from 0 in each pair of a folder.
        """
        return np.where(self.is_named, self.unit, -1 - folders.setdefault(self.folder, len(folders)))


class Seen:
    """Row numbers and keys of every shard, gathered from all units: a large tar is several units."""

    def __init__(self) -> None:
        self._rows: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._key_hashes: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._location_hashes: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._units: dict[str, set[int]] = defaultdict(set)
        # By the shard as the pairs name it.
        self._pairs: dict[str, list[_Part]] = defaultdict(list)

    def add(self, unit: Unit, table: pa.Table, *, are_rows: bool) -> None:
        """Note a table with the columns key, shard and row.

        Error rows count by row alone: the later of two equal keys is one, and rightly so. What stands in an embedding
        pair was named by whoever wrote it: within one pair a photo is its shard and row, between pairs its key as well.
        """
        rows = table["row"].to_numpy().astype(np.int64)
        if unit.kind == "shard":
            # By its pinned name: a run from another folder may have spelt it in another way.
            self._note(unit.source, unit, rows)
            if are_rows:
                self._key_hashes[unit.source].append(_hashes(table))
            return
        shards = table["shard"].to_numpy(zero_copy_only=False)
        named = list(zip(rows.tolist(), table["key"].to_pylist(), strict=True))
        hashes = np.fromiter(map(hash, named), dtype=np.int64, count=len(named))
        is_named = np.fromiter((key != str(row) for row, key in named), dtype=np.bool_, count=len(named))
        for shard in sorted(set(shards.tolist())):
            here = shards == shard
            self._note(f"{unit.source}: {shard}", unit, rows[here])
            if unit.kind == "locations":
                # Of one folder, whose pairs were looked at as a whole when its locations were numbered.
                continue
            self._pairs[shard].append(_Part(unit.index, Path(unit.source).parent, hashes[here], is_named[here]))

    def add_locations(self, unit: Unit, table: pa.Table) -> None:
        """Note the names of locations, the column key of grouped predictions.

        Those of shards stand once in each unit: another shard may show some of the same, which the run has told. Those
        of stored embeddings stand once in all.
        """
        source = f"unit {unit.index} ({unit.source})" if unit.kind == "shard" else unit.source
        self._location_hashes[source].append(_hashes(table))
        self._units[source].add(unit.index)

    def _note(self, shard: str, unit: Unit, rows: NDArray[np.int64]) -> None:
        self._rows[shard].append(rows)
        self._units[shard].add(unit.index)

    def doubles(self) -> Iterator[Double]:
        """What stands more than once in one tar, in one embedding pair, or in one folder's locations, by its shard."""
        everything = {"photos": self._rows, "keys": self._key_hashes, "locations": self._location_hashes}
        for what, gathered in everything.items():
            for shard, parts in gathered.items():
                values = np.concatenate(parts)
                doubled = len(values) - len(np.unique(values))
                if doubled:
                    yield Double(shard, doubled, what, tuple(sorted(self._units[shard])))

    def doubles_between_pairs(self) -> Iterator[Double]:
        """Photos with the same shard, row and key in several embedding pairs, by their shard."""
        for shard, parts in self._pairs.items():
            if len(parts) == 1:
                continue
            folders: dict[Path, int] = {}
            hashes = np.concatenate([part.hashes for part in parts])
            numbered = np.concatenate([part.numbered(folders) for part in parts])
            # Twice in one pair has been told by doubles().
            each = np.unique(np.stack([hashes, numbered]), axis=1)[0]
            photos, counts = np.unique(each, return_counts=True)
            if len(each) > len(photos):
                doubled = photos[counts > 1]
                held_by = {part.unit for part in parts if np.isin(doubled, part.hashes).any()}
                yield Double(shard, len(each) - len(photos), "photos", tuple(sorted(held_by)))


def _hashes(table: pa.Table) -> NDArray[np.int64]:
    """[N] of the keys: eight bytes each, for the keys of millions of photos need not fit into memory."""
    keys = table["key"].to_pylist()
    return np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
