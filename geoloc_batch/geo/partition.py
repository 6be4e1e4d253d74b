"""Partition: the cells that a head chooses among. Reads and writes geocell_info.json.

Shape letters: C cells, N points.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.sphere import unit_vectors

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

_ID = re.compile(r"[0-9]{1,12}")
_CENTROID_FIELDS = {"centroid_lat": 90.0, "centroid_lon": 180.0}
# Names the canonical form that is hashed; later forms (shapes, parents) take another name.
_FINGERPRINT_FORM = b"geoloc partition: int64 ids, float64 lat lon\n"


@dataclass(frozen=True, eq=False)
class Partition:
    """C cells, each with an id and a centroid, in ascending order of id. Two are equal when their fingerprints are.

    Raises:
        PartitionError: ids are not ascending, shapes disagree, or a centroid is no place on Earth.
    """

    ids: NDArray[np.int64]
    """[C] ids, not negative, ascending."""
    centroids_deg: NDArray[np.float64]
    """[C, 2] (lat, lon) in degrees."""
    details: Sequence[Mapping[str, Any]] = ()
    """The other fields of each cell, as they stand in its file; () where there are none."""
    source: str = field(default="the partition")
    """What error messages call it: the path of its file."""

    def __post_init__(self) -> None:
        # Copies: the caller's arrays stay writable, and nobody changes these.
        for name, dtype in (("ids", np.int64), ("centroids_deg", np.float64)):
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
        if self.details and len(self.details) != num_cells:
            raise PartitionError(f"{self.source}: {num_cells} ids, but details of {len(self.details)} cells")
        if self.ids[0] < 0 or (np.diff(self.ids) <= 0).any():
            raise PartitionError(f"{self.source}: ids must ascend from 0 or more without repeats")
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
        """sha256 (hex) of the ids and centroids. Layout, key order and details of the file don't count."""
        digest = hashlib.sha256(_FINGERPRINT_FORM)
        digest.update(self.ids.astype("<i8").tobytes())
        # -0.0 is the same place as 0.0.
        digest.update((self.centroids_deg + 0.0).astype("<f8").tobytes())
        return digest.hexdigest()

    @property
    def names(self) -> list[str] | None:
        """[C] the cells' names, or None where the file gives no `name` to one of them."""
        if not self.details or any("name" not in detail for detail in self.details):
            return None
        return [str(detail["name"]) for detail in self.details]

    def assign(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int64]:
        """The cell with the nearest centroid for each point.

        Args:
            lat: [N] degrees.
            lon: [N] degrees.

        Returns:
            [N] ids. Among centroids at exactly one place the lowest id.

        Raises:
            PartitionError: a coordinate is NaN, infinite or out of range; the first such point is named.
        """
        point_deg_N2 = check_points(lat, lon)
        _, nearest_N = self._tree.query(unit_vectors(point_deg_N2))
        return np.asarray(self.ids[self._first_of_place[nearest_N]], dtype=np.int64)

    @cached_property
    def _tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        return cKDTree(unit_vectors(self.centroids_deg))

    @cached_property
    def _first_of_place(self) -> NDArray[np.intp]:
        """[C] the lowest row that has the same centroid: the tree may answer any of them."""
        place_C2 = self.centroids_deg + 0.0
        place_C2[place_C2[:, 1] == -180, 1] = 180
        place_C2[np.abs(place_C2[:, 0]) == 90, 1] = 0
        _, first, inverse = np.unique(place_C2, axis=0, return_index=True, return_inverse=True)
        return np.asarray(first[inverse.reshape(-1)])

    def save(self, path: str | Path) -> None:
        """Write geocell_info.json: {"id": {"centroid_lat", "centroid_lon", and the details}}, in one move.

        Raises:
            PartitionError: a detail is nothing that JSON can hold, such as NaN.
        """
        cells = {}
        for row, (cell_id, (lat, lon)) in enumerate(zip(self.ids.tolist(), self.centroids_deg.tolist(), strict=True)):
            details = self.details[row] if self.details else {}
            cells[str(cell_id)] = {"centroid_lat": lat, "centroid_lon": lon, **details}
        try:
            text = json.dumps(cells, indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PartitionError(f"{self.source}: the details of a cell cannot be written as JSON: {error}") from error
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def load_partition(path: str | Path) -> Partition:
    """Read a geocell_info.json.

    Args:
        path: the file: {"id": {"centroid_lat": degrees, "centroid_lon": degrees, ...}}, ids in any order.

    Returns:
        The partition, in ascending order of id; further fields of the cells are its details.

    Raises:
        PartitionError: the file cannot be read, is no such JSON, or a cell lacks a centroid that is a place on
            Earth; names the file, the id and the value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PartitionError(f"no such file of cells: {path}; give a geocell_info.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PartitionError(f"{path} cannot be read as a geocell_info.json: {error}") from error
    try:
        cells = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except PartitionError:
        raise
    except (ValueError, RecursionError) as error:
        raise PartitionError(f"{path} is not JSON: {error}") from error
    if not isinstance(cells, dict):
        raise PartitionError(f"{path} must hold an object of cells, not a {type(cells).__name__}")
    if not cells:
        raise PartitionError(f"{path} holds no cell")
    return _from_cells(cells, path)


def check_points(lat: ArrayLike, lon: ArrayLike) -> NDArray[np.float64]:
    """[N, 2] of N latitudes and longitudes, after a look at each.

    Raises:
        PartitionError: the two differ in shape, or a point is NaN, infinite or out of range (the first is named).
    """
    lat_N, lon_N = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if lat_N.ndim != 1 or lat_N.shape != lon_N.shape:
        raise PartitionError(
            f"lat and lon must be two lists of one length, got the shapes {lat_N.shape}, {lon_N.shape}"
        )
    bad_N = ~((np.abs(lat_N) <= 90) & (np.abs(lon_N) <= 180))
    if bad_N.any():
        first = int(np.argmax(bad_N))
        raise PartitionError(
            f"point {first} is no place on Earth: lat {lat_N[first]}, lon {lon_N[first]} "
            f"({int(bad_N.sum())} such points)"
        )
    return np.stack([lat_N, lon_N], axis=-1)


def _from_cells(cells: Mapping[str, Any], path: str | Path) -> Partition:
    by_id: dict[int, Mapping[str, Any]] = {}
    for key, cell in cells.items():
        if not _ID.fullmatch(key) or int(key) > np.iinfo(np.int32).max:
            raise PartitionError(f"{path}: {key[:50]!r} is no id of a cell: ids are whole numbers from 0 to 2147483647")
        if int(key) in by_id:
            raise PartitionError(f"{path}: the id {int(key)} stands twice")
        if not isinstance(cell, dict):
            raise PartitionError(
                f"{path}: cell {key} must be an object with centroid_lat and centroid_lon, not {_short(cell)}"
            )
        by_id[int(key)] = cell
    ids = sorted(by_id)
    centroids = [[_degrees(by_id[i], i, name, path) for name in _CENTROID_FIELDS] for i in ids]
    details = [{name: value for name, value in by_id[i].items() if name not in _CENTROID_FIELDS} for i in ids]
    return Partition(
        ids=np.array(ids, dtype=np.int64),
        centroids_deg=np.array(centroids, dtype=np.float64),
        details=details if any(details) else (),
        source=str(path),
    )


def _degrees(cell: Mapping[str, Any], cell_id: int, name: str, path: str | Path) -> float:
    if name not in cell:
        raise PartitionError(f"{path}: cell {cell_id} has no {name}")
    value, limit = cell[name], _CENTROID_FIELDS[name]
    # Only NaN differs from itself.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise PartitionError(f"{path}: cell {cell_id} has {name} {_short(value)}, which is no number")
    if abs(value) > limit:
        raise PartitionError(f"{path}: cell {cell_id} has {name} {_short(value)}, beyond {limit:g}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: list[tuple[str, Any]], path: str | Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PartitionError(f"{path}: {twice!r} stands twice in one object")
    return found
