"""The metadata of stored views, kept in memory for as many of the next locations as fit.

The views of one unit may stand in every pair of a folder. Reading all pairs for each unit would cost the square of the
folder's size: so a pair is read once for all units of a window, which reaches as far as memory allows. Locations come
in the order of their numbers; in any other order the answer is the same, and slower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.records import Sample, Unit
from geoloc_batch.store.features import StoredFeatures, read_features
from geoloc_batch.store.locations import Locations

MAX_BYTES = 1 << 30
"""Of metadata in memory: that of about ten million views where each has a few members."""


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Those rows of a pair that show locations of the window."""

    stored: StoredFeatures
    """Without its table."""
    row_N: NDArray[np.int64]
    """[N] ascending."""
    table: pa.Table
    """[N] their metadata."""

    def features_at(self, row_V: NDArray[np.int64]) -> NDArray[np.float32]:
        """[V, D] raw features of some of the rows."""
        return self.stored.features_at(row_V)

    def samples_at(self, unit: Unit, row_V: NDArray[np.int64]) -> list[Sample]:
        """[V] who some of the rows are; `unit` is of the whole folder."""
        return self.stored.samples_at(unit, row_V, self.table.take(np.searchsorted(self.row_N, row_V)))

    def keep(self, is_kept_N: NDArray[np.bool_]) -> Part:
        """A part of it, in memory of its own."""
        return Part(self.stored, self.row_N[is_kept_N], self.table.filter(pa.array(is_kept_N)))


class ViewWindow:
    """Gives the pairs' rows that units of locations need.

    Args:
        locations: of all pairs of the folder.
        max_bytes: of metadata; more only where a single unit needs more.
    """

    def __init__(self, locations: Locations, max_bytes: int = MAX_BYTES) -> None:
        self._locations = locations
        self._max_bytes = max_bytes
        self._parts: dict[int, Part] = {}
        self._num_bytes = 0
        self._first, self._last, self._width = 0, 0, len(locations)
        self._unit = (0, 0)

    def move(self, first: int, last: int) -> None:
        """Say that the locations `first` to `last` are asked for now."""
        self._unit = (first, last)
        if first < self._first or last > self._last:
            self._parts.clear()
            self._num_bytes = 0
            self._first, self._last = first, max(last, min(first + self._width, len(self._locations)))

    def part(self, pair: int) -> Part:
        """The rows of a pair that show what is asked for, and more.

        Raises:
            InputError: the pair cannot be read, or has become shorter.
        """
        part = self._parts.get(pair)
        if part is None:
            part = self._parts[pair] = self._read(pair)
            self._num_bytes += part.table.nbytes
            while self._num_bytes > self._max_bytes and self._narrow():
                part = self._parts[pair]
        return part

    def _read(self, pair: int) -> Part:
        stored = read_pair(self._locations, pair)
        is_near_N = np.zeros(stored.num_rows, dtype=np.bool_)
        is_near_N[: len(self._locations.location_of[pair])] = self._is_near(pair)
        # Lengths are known to `stored`, and the paths are the keys once more.
        needless = {"emb_norm", *(["image_path"] if "key" in stored.table.column_names else [])}
        table = stored.table.select([name for name in stored.table.column_names if name not in needless])
        row_N = np.flatnonzero(is_near_N)
        # An empty slice would hold all of the table.
        return Part(replace(stored, table=stored.table.select([])), row_N, table.filter(pa.array(is_near_N)))

    def _narrow(self) -> bool:
        """Forget what lies behind, else the farther half of what lies ahead; False where neither is there."""
        first, last = self._unit
        if self._first < first:
            self._first = first
        elif self._last > last:
            self._last = max(last, first + (self._last - first) // 2)
            self._width = self._last - first
        else:
            return False
        parts = {pair: part.keep(self._is_near(pair)[part.row_N]) for pair, part in self._parts.items()}
        self._parts = {pair: part for pair, part in parts.items() if len(part.row_N)}
        self._num_bytes = sum(part.table.nbytes for part in self._parts.values())
        return True

    def _is_near(self, pair: int) -> NDArray[np.bool_]:
        """[N] which rows of a pair show locations of the window."""
        location_N = self._locations.location_of[pair]
        is_near_N: NDArray[np.bool_] = (location_N >= self._first) & (location_N < self._last)
        return is_near_N


def read_pair(locations: Locations, pair: int) -> StoredFeatures:
    """A pair with all of its metadata.

    Raises:
        InputError: it cannot be read, or has become shorter.
    """
    stored = read_features(locations.npys[pair])
    if stored.num_rows < len(locations.location_of[pair]):
        raise InputError(f"{stored.npy} has become shorter since it was looked at; write it again")
    return stored
