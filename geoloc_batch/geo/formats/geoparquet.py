"""GeoParquet 1.1: one row a cell, for maps and tables as for us.

Columns: id, name (where there are names), centroid_lat, centroid_lon, parent, h3 (an index in hexadecimal), bbox (a
box's bounds), details (JSON), geometry (WKB: polygons; the centroids where the cells have no shapes).

Source: the GeoParquet specification 1.1.0, OGC.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.formats.geocell_info import MAX_ID
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.shapes.h3 import H3Shapes
from geoloc_batch.geo.shapes.polygons import PolygonShapes

# Our own remark in the file's metadata: which shapes the geometry stands for, and the form of the columns.
_REMARK = b"geoloc"
_FORM = 1
_BBOX = ("ymin", "xmin", "ymax", "xmax")  # as BoxShapes: south, west, north, east


def write_geoparquet(partition: Partition, path: Path) -> None:
    """Write the file, byte for byte the same for the same partition.

    Raises:
        PartitionError: a detail is nothing that JSON can hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely

    shapes = partition.shapes
    columns: dict[str, Any] = {"id": pa.array(partition.ids)}
    details = [dict(detail) for detail in partition.details] or [{} for _ in range(len(partition))]
    if partition.names is not None and all(isinstance(detail["name"], str) for detail in details):
        columns["name"] = pa.array([detail.pop("name") for detail in details], pa.string())
    columns["centroid_lat"] = pa.array(partition.centroids_deg[:, 0])
    columns["centroid_lon"] = pa.array(partition.centroids_deg[:, 1])
    if partition.parents is not None:
        columns["parent"] = pa.array(partition.parents)
    if isinstance(shapes, H3Shapes):
        columns["h3"] = pa.array(shapes.names, pa.string())
    if isinstance(shapes, BoxShapes):
        bounds = [pa.array(shapes.box_C4[:, column]) for column in (1, 0, 3, 2)]
        columns["bbox"] = pa.StructArray.from_arrays(bounds, ["xmin", "ymin", "xmax", "ymax"])
    if any(details):
        columns["details"] = pa.array([_json(detail, partition.source) for detail in details], pa.string())
    if shapes is None:
        geometry_C = shapely.points(partition.centroids_deg[:, 1], partition.centroids_deg[:, 0])
    else:
        geometry_C = shapes.geometries()
    wkb_C = shapely.to_wkb(geometry_C, byte_order=1, output_dimension=2)
    columns["geometry"] = pa.array(list(wkb_C), pa.binary())
    remark = {"form": _FORM, "shapes": None if shapes is None else shapes.kind, "fingerprint": partition.fingerprint}
    metadata = {b"geo": json.dumps(_geo(geometry_C, shapes)).encode(), _REMARK: json.dumps(remark).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, compression="zstd")


def read_geoparquet(path: Path) -> Partition:
    """Read what `write_geoparquet` wrote.

    Raises:
        PartitionError: the file cannot be read, or was not written as a partition; names the remedy.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise PartitionError(f"no such file of cells: {path}; give GeoParquet or a geocell_info.json")
    try:
        table = pq.ParquetFile(path).read()
        remark = json.loads((table.schema.metadata or {}).get(_REMARK, b"null"))
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise PartitionError(f"{path} cannot be read as GeoParquet: {error}") from error
    if not isinstance(remark, dict) or remark.get("form") != _FORM:
        raise PartitionError(
            f"{path} is no file of cells that `geoloc cells` wrote; make cells of its polygons by "
            f"`geoloc cells build polygons {path} --out cells.parquet`"
        )
    try:
        return _partition(table, remark.get("shapes"), path)
    except PartitionError as error:
        raise PartitionError(f"{path}: {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError, pa.ArrowException) as error:
        raise PartitionError(f"{path} is a damaged file of cells: {type(error).__name__}: {error}") from error


def _partition(table: Any, kind: str | None, path: Path) -> Partition:
    import pyarrow.compute as pc

    table = table.sort_by("id")
    names = table.column_names
    ids = np.asarray(table["id"])
    if len(ids) and ids[-1] > MAX_ID:
        raise PartitionError(f"{ids[-1]} is no id of a cell: ids are whole numbers from 0 to {MAX_ID}")
    shapes: Shapes | None = None
    if kind == H3Shapes.kind:
        shapes = H3Shapes.from_names(table["h3"].to_pylist())
    elif kind == BoxShapes.kind:
        bounds = [np.asarray(pc.struct_field(table["bbox"], name)) for name in _BBOX]
        shapes = BoxShapes(np.stack(bounds, axis=-1))
    elif kind == PolygonShapes.kind:
        shapes = PolygonShapes(table["geometry"].to_pylist())
    elif kind is not None:
        raise PartitionError(f"shapes of an unknown kind {kind!r}; a later version wrote it")
    details = [json.loads(text) for text in table["details"].to_pylist()] if "details" in names else None
    if "name" in names:
        details = details or [{} for _ in range(len(table))]
        details = [{"name": name, **rest} for name, rest in zip(table["name"].to_pylist(), details, strict=True)]
    return Partition(
        ids=ids,
        centroids_deg=np.stack([np.asarray(table["centroid_lat"]), np.asarray(table["centroid_lon"])], axis=-1),
        details=details or (),
        source=str(path),
        shapes=shapes,
        parents=np.asarray(table["parent"]) if "parent" in names else None,
    )


def _geo(geometry_C: Any, shapes: Shapes | None) -> dict[str, Any]:
    """The metadata that makes it GeoParquet. Coordinates are OGC:CRS84, which is what no `crs` means."""
    import shapely

    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({geometry.geom_type for geometry in geometry_C}),
        "bbox": [float(value) for value in shapely.total_bounds(geometry_C)],
    }
    if isinstance(shapes, BoxShapes):
        column["covering"] = {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}}
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _json(detail: dict[str, Any], source: str) -> str:
    try:
        return json.dumps(detail, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PartitionError(f"{source}: the details of a cell cannot be written as JSON: {error}") from error
