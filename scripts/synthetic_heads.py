"""A synthetic Europe as stored embeddings, for what trains heads: features of places that carry a noisy position.

A view of a place sees its position some way off, farther at places that tell little; the feature holds random waves of
that position over lengths from a region to the continent (random Fourier features), and beside them what has nothing to
do with the place: a few common directions, like weather and camera, and noise of its own. Written as embedding pairs in
clip-retrieval's layout, so that they are read as anybody's are.

Shape letters: N places, V views, D features.

Source: Rahimi and Recht, "Random Features for Large-Scale Kernel Machines" (NeurIPS 2007).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.demo.world import make_places
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, unit_vectors
from geoloc_batch.records import Sample, Unit
from geoloc_batch.store.tables import embedding_paths, write_embeddings

FIELD = "location"
"""The member of the json that names a view's place."""
_PAIR_PLACES = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What decides the embeddings."""

    num_places: int
    num_views: int = 4
    dim: int = 256
    off_km: float = 80.0
    """How far off a view sees its place along each axis, in the median over places."""
    off_spread: float = 0.8
    """Standard deviation over places of the logarithm of that."""
    wave_km: tuple[float, float] = (150.0, 3000.0)
    """Lengths of the waves, drawn evenly in their logarithm."""
    num_common: int = 32
    """Directions that views differ in whatever their place."""
    nuisance: float = 0.4
    """Amplitude of these and of the noise beside waves of 1."""
    seed: int = 0

    def points_deg(self) -> NDArray[np.float64]:
        """[N, 2] (lat, lon) in degrees."""
        return make_places(self.num_places, self.seed).point_deg

    def features(self) -> Iterator[NDArray[np.float32]]:
        """[n, V, D] raw features, some places at a time."""
        rng = np.random.default_rng([self.seed, 3])
        length_km_D = np.exp(rng.uniform(*np.log(self.wave_km), self.dim))
        wave_3D = (rng.normal(size=(3, self.dim)) / length_km_D).astype(np.float32)
        phase_D = rng.uniform(0, 2 * np.pi, self.dim).astype(np.float32)
        common_MD = (rng.normal(size=(self.num_common, self.dim)) / self.num_common**0.5).astype(np.float32)
        xyz_km_N3 = EARTH_RADIUS_KM * unit_vectors(self.points_deg())
        for start in range(0, self.num_places, _PAIR_PLACES):
            near_n3 = xyz_km_N3[start : start + _PAIR_PLACES]
            off_km_n = self.off_km * np.exp(self.off_spread * rng.normal(size=len(near_n3)))
            seen_nV3 = near_n3[:, None] + off_km_n[:, None, None] * rng.normal(size=(len(near_n3), self.num_views, 3))
            feature_nVD = np.cos(seen_nV3.astype(np.float32) @ wave_3D + phase_D) * np.float32(2**0.5)
            rows = (len(near_n3), self.num_views)
            feature_nVD += self.nuisance * (rng.standard_normal((*rows, self.num_common), np.float32) @ common_MD)
            feature_nVD += self.nuisance * rng.standard_normal((*rows, self.dim), np.float32)
            yield feature_nVD


def write_world(folder: Path, world: World) -> None:
    """Write the views of all places as embedding pairs: key, shard, row, lat, lon, `location`."""
    point_deg_N2 = world.points_deg()
    first = 0
    for index, feature_nVD in enumerate(world.features()):
        unit = Unit(index=index, kind="shard", source=f"{index:06d}.tar")
        samples = []
        for place in range(first, first + len(feature_nVD)):
            lat, lon = point_deg_N2[place].tolist()
            meta = json.dumps({FIELD: f"{place:06d}", "lat": lat, "lon": lon}).encode()
            for view in range(world.num_views):
                samples.append(Sample(unit, unit.source, len(samples), f"{place:06d}_{view}", meta))
        npy, parquet = (folder / path for path in embedding_paths(index))
        for path in (npy, parquet):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_embeddings(npy, parquet, samples, feature_nVD.reshape(-1, world.dim))
        first += len(feature_nVD)


def cells_around(point_deg_N2: NDArray[np.float64], num_cells: int, seed: int = 0) -> Partition:
    """Exactly so many cells: centroids at as many of the places, drawn."""
    chosen = np.sort(np.random.default_rng(seed).choice(len(point_deg_N2), num_cells, replace=False))
    return Partition(ids=np.arange(num_cells), centroids_deg=point_deg_N2[chosen])
