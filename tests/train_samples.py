"""Embeddings with a known answer, for the tests of training: the features say which anchor a place is nearest to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from store_samples import write_pair

from geoloc_batch.geo.partition import Partition
from geoloc_batch.records import Sample, Unit
from geoloc_batch.run.workers import StopSignal

DIM, NUM_CELLS = 24, 9


@dataclass(frozen=True)
class World:
    """A folder of embeddings, cells for it, and what is true of its photos."""

    emb: Path
    cells: Path
    point_deg_L2: NDArray[np.float64]
    feature_ND: NDArray[np.float32]
    """[N, D] raw, in the order of the files."""
    place_N: NDArray[np.int64]


def make_partition(num_cells: int = NUM_CELLS) -> Partition:
    """Centroids on a grid, several hundred km apart."""
    row, column = np.divmod(np.arange(num_cells), 3)
    return Partition(
        ids=np.arange(num_cells), centroids_deg=np.stack([40.0 + 5 * row, 1.0 + 9 * column], axis=1).astype(np.float64)
    )


def make_world(
    folder: Path, *, num_places: int = 270, views: Sequence[int] = (1, 2, 4, 7), seed: int = 0, noise: float = 0.3
) -> World:
    """Places around the centroids, their photos in two pairs, mixed. Lengths of features differ from photo to photo."""
    rng = np.random.default_rng(seed)
    partition = make_partition()
    cell_L = np.arange(num_places) % NUM_CELLS
    point_L2 = partition.centroids_deg[cell_L] + rng.uniform(-0.5, 0.5, (num_places, 2))
    look_CD = rng.normal(0, 1, (NUM_CELLS, DIM))
    place_N = rng.permutation(np.repeat(np.arange(num_places), np.resize(views, num_places)))
    feature_ND = look_CD[cell_L[place_N]] + rng.normal(0.2, noise, (len(place_N), DIM))
    feature_ND = (feature_ND * rng.uniform(0.3, 20, (len(place_N), 1))).astype(np.float32)
    half = len(place_N) // 2
    for index, rows in enumerate((range(half), range(half, len(place_N)))):
        metas = [
            {"lat": point_L2[place_N[row], 0], "lon": point_L2[place_N[row], 1], "spot": int(place_N[row])}
            for row in rows
        ]
        write_photos(folder / "emb", index, metas, feature_ND[rows.start : rows.stop])
    partition.save(folder / "cells.json")
    return World(folder / "emb", folder / "cells.json", point_L2, feature_ND, place_N)


def write_photos(emb: Path, index: int, metas: Sequence[dict[str, object]], feature_ND: NDArray[np.float32]) -> Path:
    """One embedding pair; photos without coordinates have a json without them."""
    emb.mkdir(parents=True, exist_ok=True)
    unit = Unit(index=index, kind="shard", source=f"shards/{index}.tar")
    samples = [
        Sample(unit, unit.source, row, f"{index}/{row}", json.dumps(meta).encode()) for row, meta in enumerate(metas)
    ]
    return write_pair(emb, samples, feature_ND, index)


def flags_of(world: World, out: Path, *more: object) -> list[str]:
    """Arguments of a quick `geoloc train` on one CPU thread's arithmetic."""
    given = ["train", world.emb, "--cells", world.cells, "--out", out, "--precision", "fp32", "--epochs", 12]
    return [str(each) for each in (*given, "--lr", 0.02, *more)]


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """As if SIGTERM came after so many batches."""
    count = itertools.count()
    monkeypatch.setattr(StopSignal, "is_set", lambda self: next(count) >= num_batches)
