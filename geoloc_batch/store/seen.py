"""Seen: which photos the files of a run hold, to find those that stand twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geoloc_batch.records import Unit


class Seen:
    """Row numbers and keys of every shard, gathered from all units: a large tar is several units."""

    def __init__(self) -> None:
        self._rows: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._key_hashes: dict[str, list[NDArray[np.int64]]] = defaultdict(list)

    def add(self, unit: Unit, table: pa.Table, *, are_rows: bool) -> None:
        """Note a table with the columns key, shard and row.

        Error rows count by row alone: the later of two equal keys is one, and rightly so. What stands in an embedding
        pair was named by whoever wrote it: there a photo counts twice where one pair has it twice.
        """
        rows = table["row"].to_numpy().astype(np.int64)
        if unit.kind == "shard":
            # By its pinned name: a run from another folder may have spelt it in another way.
            self._rows[unit.source].append(rows)
            if are_rows:
                # Eight bytes a key: the keys of millions of photos need not fit into memory.
                keys = table["key"].to_pylist()
                self._key_hashes[unit.source].append(np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys)))
            return
        shards = table["shard"].to_numpy(zero_copy_only=False)
        for shard in sorted(set(shards.tolist())):
            self._rows[f"{unit.source}: {shard}"].append(rows[shards == shard])

    def doubles(self) -> Iterator[tuple[str, int, str]]:
        """(shard, how many, of what) for each shard of which something stands more than once."""
        for what, gathered in (("photos", self._rows), ("keys", self._key_hashes)):
            for shard, parts in gathered.items():
                values = np.concatenate(parts)
                doubled = len(values) - len(np.unique(values))
                if doubled:
                    yield shard, doubled, what
