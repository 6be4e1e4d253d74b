"""Scattered locations: those with a row in more than one unit, because their photos lie in several shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit
from geoloc_batch.store.tables import predictions_path


@dataclass(frozen=True, slots=True)
class Scattered:
    """Locations with more than one row."""

    count: int
    first: str
    """The name of the first of them."""
    shards: tuple[str, ...]
    """Where that one's rows come from."""


def find_scattered(out: Path, units: Sequence[Unit], tree: str = "") -> Scattered | None:
    """Look through the keys of grouped predictions; None where each location has one row.

    Args:
        out: of a run.
        units: in the order of the plan; those that are not done count for nothing.
        tree: the folder of one of several heads.

    Raises:
        InputError: a table cannot be read.
    """
    # Eight bytes a key: the names of millions of locations need not fit into memory.
    hashes = [np.fromiter(map(hash, _keys(out, unit, tree)), dtype=np.int64) for unit in units]
    found, counts = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *hashes]), return_counts=True)
    doubled = set(found[counts > 1].tolist())
    if not doubled:
        return None
    holders: dict[str, list[str]] = defaultdict(list)
    for unit, of_unit in zip(units, hashes, strict=True):
        if not doubled.isdisjoint(of_unit.tolist()):
            for key in _keys(out, unit, tree):
                if hash(key) in doubled:
                    holders[key].append(unit.shard)
    scattered = {key: shards for key, shards in holders.items() if len(shards) > 1}
    if not scattered:
        return None
    first, shards = next(iter(scattered.items()))
    return Scattered(len(scattered), first, tuple(dict.fromkeys(shards)))


def _keys(out: Path, unit: Unit, tree: str) -> list[str]:
    path = out / predictions_path(unit.index, tree)
    try:
        keys: list[str] = pq.ParquetFile(path).read(["key"])["key"].to_pylist()
        return keys
    except FileNotFoundError:
        # A unit without a good photo, or one that is not done.
        return []
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}; see `geoloc verify`") from error
