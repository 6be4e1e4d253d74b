"""A map of cells as a PNG: degrees of longitude and latitude, over the borders of a file or a plain grid.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.cells.show import count_points
from geoloc_batch.geo.partition import Partition
from geoloc_batch.whole_file import in_one_move

_MARGIN = 0.03
_STEPS_DEG = (0.5, 1, 2, 5, 10, 20, 30, 60)


def draw_map(
    partition: Partition, path: Path, *, outlines: str = "", point_deg_N2: NDArray[np.float64] | None = None
) -> None:
    """Draw the cells, coloured by their number of points where that is known, and their centroids.

    Args:
        partition: the cells.
        path: the PNG.
        outlines: a GeoJSON or GeoParquet file of borders; without one only a grid lies under the cells.
        point_deg_N2: [N, 2] (lat, lon) in degrees: counted for the colours.

    Raises:
        InputError: the outlines cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    borders = _borders(outlines) if outlines else []
    counts, _ = count_points(partition, point_deg_N2)
    west, south, east, north = _extent(partition)
    aspect = 1 / max(np.cos(np.radians((south + north) / 2)), 0.2)
    width, height = (east - west), (north - south) * aspect
    scale = 12 / max(width, height)
    figure = Figure(figsize=(max(width * scale, 4) + 1.5, max(height * scale, 3) + 0.8), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(west, east), ylim=(south, north), aspect=aspect)
    _grid(axes, west, east, south, north)
    if partition.shapes is not None:
        rings, owner = _rings(partition.shapes.geometries())
        cells = PolyCollection(rings, linewidths=0.3, edgecolors="#33415580", zorder=2)
        if counts is None:
            cells.set_facecolor("#7aa6c233")
        else:
            cells.set(array=np.maximum(counts, 1)[owner], norm=LogNorm(1, max(int(counts.max()), 2)), alpha=0.6)
            figure.colorbar(cells, ax=axes, shrink=0.7, label="points per cell")
        axes.add_collection(cells)
    if borders:
        axes.add_collection(LineCollection(borders, colors="#444444", linewidths=0.5, zorder=3))
    size = float(np.clip(3000 / len(partition), 0.3, 12))
    place: dict[str, Any] = {
        "x": partition.centroids_deg[:, 1],
        "y": partition.centroids_deg[:, 0],
        "linewidths": 0,
        "zorder": 4,
    }
    if counts is not None and partition.shapes is None:
        dots = axes.scatter(s=4 * size, c=np.maximum(counts, 1), norm="log", **place)
        figure.colorbar(dots, ax=axes, shrink=0.7, label="points per cell")
    else:
        axes.scatter(s=size, c="#b3261e", **place)
    kind = "centroids alone" if partition.shapes is None else partition.shapes.kind
    axes.set_title(f"{len(partition):,} cells ({kind})", fontsize=10)
    in_one_move(path, lambda part: canvas.print_figure(part, format="png"))


def _extent(partition: Partition) -> tuple[float, float, float, float]:
    """West, south, east, north of what is drawn, with a margin."""
    import shapely

    lat_C, lon_C = partition.centroids_deg.T
    bounds = np.array([[lon_C.min(), lat_C.min(), lon_C.max(), lat_C.max()]])
    if partition.shapes is not None:
        bounds = np.concatenate([bounds, shapely.bounds(partition.shapes.geometries())])
    west, south = (float(value) for value in bounds[:, :2].min(axis=0))
    east, north = (float(value) for value in bounds[:, 2:].max(axis=0))
    margin = max(_MARGIN * max(east - west, north - south), 0.05)
    return max(west - margin, -180), max(south - margin, -90), min(east + margin, 180), min(north + margin, 90)


def _rings(geometry_C: NDArray[np.object_]) -> tuple[list[NDArray[np.float64]], NDArray[np.intp]]:
    """The outer rings as (lon, lat), and the cell of each."""
    import shapely

    parts, owner = shapely.get_parts(geometry_C, return_index=True)
    return [shapely.get_coordinates(ring) for ring in shapely.get_exterior_ring(parts)], owner


def _borders(path: str) -> list[NDArray[np.float64]]:
    import shapely

    from geoloc_batch.geo.formats.polygon_file import read_geometries

    geometries = [geometry for geometry in read_geometries(Path(path)) if geometry is not None]
    lines = shapely.get_parts(np.array(geometries, dtype=object))
    is_polygon = shapely.get_type_id(lines) == 3
    rings = [*shapely.get_rings(lines[is_polygon]), *lines[shapely.get_type_id(lines) == 1]]
    return [shapely.get_coordinates(ring) for ring in rings]


def _grid(axes: Any, west: float, east: float, south: float, north: float) -> None:
    """Parallels and meridians, about six each way."""
    for low, high, set_ticks in ((west, east, axes.set_xticks), (south, north, axes.set_yticks)):
        step = next((step for step in _STEPS_DEG if (high - low) / step <= 8), _STEPS_DEG[-1])
        set_ticks(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step)
    axes.grid(color="#bbbbbb", linewidth=0.4, zorder=0)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("longitude", fontsize=8)
    axes.set_ylabel("latitude", fontsize=8)
