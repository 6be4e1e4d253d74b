"""Partition: the cells that a head chooses among, and which of them a point belongs to.

Shape letters: C cells, N points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.points import check_points, one_name
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.sphere import unit_vectors

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

# Names the canonical form that is hashed. Cells with shapes or parents hash that hash under another name.
_FINGERPRINT_FORM = b"geoloc partition: int64 ids, float64 lat lon\n"
_SHAPED_FORM = b"geoloc partition with shapes or parents: plain sha256, kind, shapes, int64 parents\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """The cells of N points, and how each was found."""

    ids: NDArray[np.int64]
    """[N] ids of the cells."""
    inside: NDArray[np.bool_]
    """[N] whether the cell's shape holds the point; False where the nearest centroid decided."""

    @property
    def num_outside(self) -> int:
        """How many points no shape holds: all of them where the partition has no shapes."""
        return int((~self.inside).sum())

    def complaint(self, partition: Partition) -> str:
        """One line where points fell back to the nearest centroid although there are shapes; empty otherwise."""
        if partition.shapes is None or not self.num_outside:
            return ""
        return (
            f"{partition.source}: {self.num_outside} of {len(self.ids)} points lie in no cell and belong to the cell "
            f"with the nearest centroid"
        )


@dataclass(frozen=True, eq=False)
class Partition:
    """C cells, each with an id and a centroid, in ascending order of id. Two are equal when their fingerprints are.

    Raises:
        PartitionError: ids are not ascending, lengths disagree, or a centroid is no place on Earth.
    """

    ids: NDArray[np.int64]
    """[C] ids, not negative, ascending."""
    centroids_deg: NDArray[np.float64]
    """[C, 2] (lat, lon) in degrees."""
    details: Sequence[Mapping[str, Any]] = ()
    """The other fields of each cell, as they stand in its file; () where there are none."""
    source: str = field(default="the partition")
    """What error messages call it: the path of its file."""
    shapes: Shapes | None = None
    """The outlines of the cells in the order of `ids`; None where only centroids are known."""
    parents: NDArray[np.int64] | None = None
    """[C] for each cell the id of the cell of a coarser partition that it is part of, not negative."""

    def __post_init__(self) -> None:
        # Copies: the caller's arrays stay writable, and nobody changes these.
        for name, dtype in (("ids", np.int64), ("centroids_deg", np.float64), ("parents", np.int64)):
            if getattr(self, name) is not None:
                own = np.array(getattr(self, name), dtype=dtype)
                own.setflags(write=False)
                object.__setattr__(self, name, own)
        num_cells = len(self.ids)
        if num_cells == 0:
            raise PartitionError(f"{self.source} holds no cell")
        if self.ids.shape != (num_cells,) or self.centroids_deg.shape != (num_cells, 2):
            raise PartitionError(
                f"{self.source}: {num_cells} ids do not fit centroids of shape {self.centroids_deg.shape}"
            )
        for what, values in (("details", self.details or None), ("shapes", self.shapes), ("parents", self.parents)):
            if values is not None and len(values) != num_cells:
                raise PartitionError(f"{self.source}: {num_cells} ids, but {what} of {len(values)} cells")
        if self.ids[0] < 0 or (np.diff(self.ids) <= 0).any():
            raise PartitionError(f"{self.source}: ids must ascend from 0 or more without repeats")
        if self.parents is not None and self.parents.min() < 0:
            raise PartitionError(f"{self.source}: parents must be ids, 0 or more, got {self.parents.min()}")
        bad_C = ~(np.abs(self.centroids_deg) <= [90.0, 180.0]).all(axis=1)
        if bad_C.any():
            worst = int(np.argmax(bad_C))
            lat, lon = (float(value) for value in self.centroids_deg[worst])
            raise PartitionError(f"{self.source}: cell {self.ids[worst]} has its centroid at ({lat}, {lon})")

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of ids, centroids, shapes and parents. Layout, key order and details of the file don't count."""
        digest = hashlib.sha256(_FINGERPRINT_FORM)
        digest.update(self.ids.astype("<i8").tobytes())
        # -0.0 is the same place as 0.0.
        digest.update((self.centroids_deg + 0.0).astype("<f8").tobytes())
        if self.shapes is None and self.parents is None:
            return digest.hexdigest()
        shaped = hashlib.sha256(_SHAPED_FORM + digest.digest())
        if self.shapes is not None:
            shaped.update(b"shapes " + self.shapes.kind.encode() + b"\n" + self.shapes.canonical_bytes())
        if self.parents is not None:
            shaped.update(b"parents\n" + self.parents.astype("<i8").tobytes())
        return shaped.hexdigest()

    @property
    def names(self) -> list[str] | None:
        """[C] the cells' names, or None where the file gives no `name` to one of them."""
        if not self.details or any("name" not in detail for detail in self.details):
            return None
        return [str(detail["name"]) for detail in self.details]

    def assign(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int64]:
        """The cell of each point: the one that holds it where there are shapes, else the nearest centroid's.

        Args:
            lat: [N] degrees.
            lon: [N] degrees.

        Returns:
            [N] ids. `locate` says which of them come from the nearest centroid.

        Raises:
            PartitionError: a coordinate is NaN, infinite or out of range; the first such point is named.
        """
        return self.locate(lat, lon).ids

    def locate(self, lat: ArrayLike, lon: ArrayLike) -> Assigned:
        """As `assign`, and which points no shape holds: they belong to the nearest centroid."""
        point_deg_N2 = check_points(lat, lon)
        if self.shapes is None:
            return Assigned(ids=self._nearest(point_deg_N2), inside=np.zeros(len(point_deg_N2), dtype=np.bool_))
        row_N = self.shapes.find(point_deg_N2)
        inside_N = row_N >= 0
        id_N = np.asarray(self.ids[row_N], dtype=np.int64)
        id_N[~inside_N] = self._nearest(point_deg_N2[~inside_N])
        return Assigned(ids=id_N, inside=inside_N)

    def nearest(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int64]:
        """The cell with the nearest centroid, whatever the shapes; the lowest id among centroids at one place.

        Arguments, answer and errors as in `assign`.
        """
        return self._nearest(check_points(lat, lon))

    def centroids_of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """[N, 2] (lat, lon) of the centroids of cells by their ids, which must be ids of this partition."""
        row_N = np.searchsorted(self.ids, ids)
        assert (self.ids[row_N] == ids).all()
        return np.asarray(self.centroids_deg[row_N])

    def save(self, path: str | Path) -> None:
        """Write the partition in one move: GeoParquet for a name that ends in .parquet, else geocell_info.json.

        Raises:
            PartitionError: a detail is nothing that JSON can hold, such as NaN.
        """
        from geoloc_batch.geo.formats import save_partition

        save_partition(self, Path(path))

    def _nearest(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.int64]:
        _, nearest_N = self._tree.query(unit_vectors(point_deg_N2))
        return np.asarray(self.ids[self._first_of_place[nearest_N]], dtype=np.int64)

    @cached_property
    def _tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        return cKDTree(unit_vectors(self.centroids_deg))

    @cached_property
    def _first_of_place(self) -> NDArray[np.intp]:
        """[C] the lowest row that has the same centroid: the tree may answer any of them."""
        place_C2 = one_name(self.centroids_deg)
        _, first, inverse = np.unique(place_C2, axis=0, return_index=True, return_inverse=True)
        return np.asarray(first[inverse.reshape(-1)])


def load_partition(path: str | Path) -> Partition:
    """Read a partition: a geocell_info.json, GeoParquet as `Partition.save` writes it, or OSV-5M's quadtree CSV.

    Args:
        path: the file, told apart by the end of its name: .parquet, .csv, anything else is JSON.

    Returns:
        The partition, in ascending order of id, with the shapes and parents that the file holds.

    Raises:
        PartitionError: the file cannot be read, or a cell in it cannot be one; names the file, the id and the value.
    """
    from geoloc_batch.geo.formats import read_partition

    return read_partition(Path(path))
