"""geocell_info.json: {"id": {"centroid_lat", "centroid_lon", ...}}, as the published heads have it.

Shapes and parents are fields of every cell: `h3` (an index), `min_lat`, `min_lon`, `max_lat`, `max_lon` (a box) or
`geometry` (GeoJSON), and `parent`. A field that only some cells have is a detail like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.shapes.h3 import H3Shapes
from geoloc_batch.geo.shapes.polygons import PolygonShapes

_ID = re.compile(r"[0-9]{1,12}")
_CENTROID_FIELDS = {"centroid_lat": 90.0, "centroid_lon": 180.0}
BOX_FIELDS = ("min_lat", "min_lon", "max_lat", "max_lon")
MAX_ID = int(np.iinfo(np.int32).max)


def geocell_info(partition: Partition) -> str:
    """The file's text.

    Raises:
        PartitionError: a detail is nothing that JSON can hold, such as NaN.
    """
    cells = {}
    shape_fields = _shape_fields(partition.shapes)
    for row, (cell_id, (lat, lon)) in enumerate(
        zip(partition.ids.tolist(), partition.centroids_deg.tolist(), strict=True)
    ):
        cell = {"centroid_lat": lat, "centroid_lon": lon, **(partition.details[row] if partition.details else {})}
        if partition.parents is not None:
            cell["parent"] = int(partition.parents[row])
        cells[str(cell_id)] = cell | (shape_fields[row] if shape_fields else {})
    try:
        return json.dumps(cells, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PartitionError(f"{partition.source}: the details of a cell cannot be written as JSON: {error}") from error


def read_geocell_info(path: Path) -> Partition:
    """Read the file.

    Args:
        path: {"id": {"centroid_lat": degrees, "centroid_lon": degrees, ...}}, ids in any order.

    Raises:
        PartitionError: the file cannot be read, is no such JSON, a cell lacks a centroid that is a place on Earth,
            or the cells' shapes cannot be such; names the file, the id and the value.
    """
    try:
        text = path.read_text(encoding="utf-8")
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


def _from_cells(cells: Mapping[str, Any], path: Path) -> Partition:
    by_id: dict[int, Mapping[str, Any]] = {}
    for key, cell in cells.items():
        if not _ID.fullmatch(key) or int(key) > MAX_ID:
            raise PartitionError(f"{path}: {key[:50]!r} is no id of a cell: ids are whole numbers from 0 to {MAX_ID}")
        if int(key) in by_id:
            raise PartitionError(f"{path}: the id {int(key)} stands twice")
        if not isinstance(cell, dict):
            raise PartitionError(
                f"{path}: cell {key} must be an object with centroid_lat and centroid_lon, not {_short(cell)}"
            )
        by_id[int(key)] = cell
    ids = sorted(by_id)
    centroids = [[_degrees(by_id[i], i, name, path) for name in _CENTROID_FIELDS] for i in ids]
    ordered = [by_id[i] for i in ids]
    shapes, shape_names = _read_shapes(ordered, path)
    parents = _read_parents(ordered, path)
    taken = {*_CENTROID_FIELDS, *shape_names, *(("parent",) if parents is not None else ())}
    details = [{name: value for name, value in cell.items() if name not in taken} for cell in ordered]
    return Partition(
        ids=np.array(ids, dtype=np.int64),
        centroids_deg=np.array(centroids, dtype=np.float64),
        details=details if any(details) else (),
        source=str(path),
        shapes=shapes,
        parents=parents,
    )


def _shape_fields(shapes: Shapes | None) -> list[dict[str, Any]] | None:
    if isinstance(shapes, H3Shapes):
        return [{"h3": name} for name in shapes.names]
    if isinstance(shapes, BoxShapes):
        return [dict(zip(BOX_FIELDS, box, strict=True)) for box in shapes.box_C4.tolist()]
    if isinstance(shapes, PolygonShapes):
        import shapely

        # Python's own writer of floats: each comes back as the same bits.
        return [{"geometry": shapely.geometry.mapping(geometry)} for geometry in shapes.geometries()]
    return None


def _read_shapes(cells: Sequence[Mapping[str, Any]], path: Path) -> tuple[Shapes | None, Sequence[str]]:
    """The shapes that every cell has, the most exact kind first, and the fields they were read from."""
    try:
        if all("geometry" in cell for cell in cells):
            return PolygonShapes.of(np.array([_geometry(cell["geometry"]) for cell in cells], dtype=object)), (
                "geometry",
            )
        if all(isinstance(cell.get("h3"), str) for cell in cells):
            return H3Shapes.from_names([cell["h3"] for cell in cells]), ("h3",)
        if all(name in cell for cell in cells for name in BOX_FIELDS):
            return BoxShapes([[_number(cell[name], name) for name in BOX_FIELDS] for cell in cells]), BOX_FIELDS
    except PartitionError as error:
        raise PartitionError(f"{path}: {error}") from error
    return None, ()


def _read_parents(cells: Sequence[Mapping[str, Any]], path: Path) -> NDArray[np.int64] | None:
    given = [cell.get("parent") for cell in cells]
    parents = [parent for parent in given if isinstance(parent, int) and not isinstance(parent, bool)]
    if len(parents) != len(given):
        return None
    outside = [parent for parent in parents if not 0 <= parent <= MAX_ID]
    if outside:
        raise PartitionError(f"{path}: {_short(outside[0])} is no id of a parent: ids are from 0 to {MAX_ID}")
    return np.array(parents, dtype=np.int64)


def _geometry(value: Any) -> Any:
    import shapely

    try:
        return shapely.geometry.shape(value)
    except (shapely.errors.ShapelyError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise PartitionError(f"the geometry {_short(value)} is no GeoJSON: {error}") from error


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e6:
        raise PartitionError(f"{name} is {_short(value)}, which is no number of degrees")
    return float(value)


def _degrees(cell: Mapping[str, Any], cell_id: int, name: str, path: Path) -> float:
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


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PartitionError(f"{path}: {twice!r} stands twice in one object")
    return found
