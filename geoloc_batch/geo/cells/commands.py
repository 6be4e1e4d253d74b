"""What `geoloc cells build | show | convert | ceiling` do. Each answers what goes into the last line of stdout.

Shape letters: N points.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.geo.bbox import Box
from geoloc_batch.geo.ceiling import Ceiling, ceiling
from geoloc_batch.geo.cells.config import (
    BuildConfig,
    CeilingConfig,
    ConvertConfig,
    H3Config,
    KdtreeConfig,
    KmeansConfig,
    NutsConfig,
    PolygonsConfig,
    QuadtreeConfig,
    ShowConfig,
    box_of,
)
from geoloc_batch.geo.cells.show import Shown, describe
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.points import Points, read_points

logger = logging.getLogger(__name__)

Reader = Callable[[str, str, str], Points]
"""(POINTS, column of latitudes, column of longitudes) to positions; rooms above know more kinds of POINTS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What `geoloc cells build` ends with."""

    cells: int
    points: int
    """Positions that were used."""
    bad_points: dict[str, int]
    """Rows without a usable position, by reason."""
    beyond_box: int
    """Positions that --bbox or --region left out."""
    outside: int
    """Of `points`: those that no cell's shape holds, so that the nearest centroid decides."""
    fingerprint: str
    seconds: float
    out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What `geoloc cells convert` ends with."""

    cells: int
    shapes: str | None
    fingerprint: str
    out: str


def read_table(points: str, lat: str, lon: str) -> Points:
    """The reader of CSV and Parquet tables."""
    return read_points(points, lat=lat, lon=lon)


def build(config: BuildConfig, read: Reader = read_table) -> Built:
    """`geoloc cells build KIND`: make cells and write them.

    Raises:
        InputError: the points or polygons cannot be read.
        PartitionError: no cells can be made of them as asked.
        OutputError: --out is a folder, or its folder is missing.
    """
    start = time.perf_counter()
    _check_out(f"--out {config.out}", config.out)
    points, point_deg_N2 = None, None
    num_all = 0
    if config.points:
        points = _read(config.points, config.lat, config.lon, read)
        num_all = len(points)
        point_deg_N2 = _within(points, config.box)
    partition, id_N = _make(config, point_deg_N2)
    partition.save(config.out)
    num_points = 0 if point_deg_N2 is None else len(point_deg_N2)
    outside = 0
    if point_deg_N2 is not None and partition.shapes is not None:
        found = partition.locate(point_deg_N2[:, 0], point_deg_N2[:, 1])
        assert (found.ids == id_N).all()
        outside = found.num_outside
        if outside:
            logger.warning("%s", found.complaint(partition))
    return Built(
        cells=len(partition),
        points=num_points,
        bad_points={} if points is None else points.num_bad,
        beyond_box=num_all - num_points,
        outside=outside,
        fingerprint=partition.fingerprint,
        seconds=round(time.perf_counter() - start, 3),
        out=config.out,
    )


def show(config: ShowConfig, read: Reader = read_table) -> Shown:
    """`geoloc cells show FILE`: describe cells, and draw them where --map asks for it.

    Raises:
        PartitionError: the cells cannot be read.
        InputError: the points or outlines cannot be read.
        OutputError: --map is a folder, or its folder is missing.
    """
    if config.map:
        _check_out(f"--map {config.map}", config.map)
    partition = load_partition(config.file)
    point_deg_N2 = None
    if config.points:
        point_deg_N2 = _read(config.points, config.lat, config.lon, read).point_deg
    shown = describe(partition, point_deg_N2, map_file=config.map)
    if config.map:
        from geoloc_batch.geo.cells.map import draw_map

        draw_map(partition, Path(config.map), outlines=config.outlines, point_deg_N2=point_deg_N2)
    return shown


def convert(config: ConvertConfig) -> Converted:
    """`geoloc cells convert IN OUT`: the same cells, with the same fingerprint, in another format.

    Raises:
        PartitionError: the cells cannot be read, or the name of OUT is of no format that is written.
        OutputError: OUT is a folder, or its folder is missing.
    """
    _check_out(f"OUT {config.out}", config.out)
    partition = load_partition(config.source)
    partition.save(config.out)
    assert load_partition(config.out) == partition
    kind = None if partition.shapes is None else partition.shapes.kind
    return Converted(cells=len(partition), shapes=kind, fingerprint=partition.fingerprint, out=config.out)


def measure_ceiling(config: CeilingConfig, read: Reader = read_table) -> Ceiling:
    """`geoloc cells ceiling FILE POINTS`: the best that any head could reach.

    Raises:
        PartitionError: the cells cannot be read.
        InputError: the points cannot be read, or there are none.
    """
    partition = load_partition(config.file)
    points = _read(config.points, config.lat, config.lon, read)
    point_deg_N2 = _within(points, box_of(config.bbox, config.region))
    found = ceiling(partition, point_deg_N2)
    if partition.shapes is not None and found.outside:
        logger.warning("%d of %d points lie in no cell of %s", found.outside, found.points, config.file)
    return found


def _make(config: BuildConfig, point_deg_N2: NDArray[np.float64] | None) -> tuple[Partition, NDArray[np.int64]]:
    if isinstance(config, PolygonsConfig):
        return _make_of_polygons(config, point_deg_N2)
    assert point_deg_N2 is not None
    if isinstance(config, H3Config):
        from geoloc_batch.geo.cells.h3 import build_h3

        return build_h3(point_deg_N2, config.res, min_points=config.min_points, centroid=config.centroid)
    if isinstance(config, KmeansConfig):
        from geoloc_batch.geo.cells.kmeans import build_kmeans

        return build_kmeans(
            point_deg_N2, config.k, min_points=config.min_points, rounds=config.rounds, seed=config.seed
        )
    if isinstance(config, KdtreeConfig):
        from geoloc_batch.geo.cells.kdtree import build_kdtree

        return build_kdtree(
            point_deg_N2,
            config.max_points,
            bbox=config.box,
            min_points=config.min_points,
            centroid=config.centroid,
        )
    if isinstance(config, QuadtreeConfig):
        from geoloc_batch.geo.cells.quadtree import build_quadtree

        return build_quadtree(
            point_deg_N2,
            config.max_points,
            config.depth,
            bbox=config.box,
            min_points=config.min_points,
            centroid=config.centroid,
        )
    assert_never(config)


def _make_of_polygons(
    config: PolygonsConfig, point_deg_N2: NDArray[np.float64] | None
) -> tuple[Partition, NDArray[np.int64]]:
    from geoloc_batch.geo.cells.polygons import build_nuts, build_polygons
    from geoloc_batch.geo.formats.polygon_file import read_polygons

    polygons = read_polygons(config.file, id_field=config.id_field, name_field=config.name_field)
    if polygons.without_geometry:
        logger.warning(
            "%s: %d rows have no geometry and are left out, such as %s",
            config.file,
            len(polygons.without_geometry),
            polygons.without_geometry[0],
        )
    if isinstance(config, NutsConfig):
        return build_nuts(polygons, point_deg_N2, config.level, min_points=config.min_points, centroid=config.centroid)
    return build_polygons(polygons, point_deg_N2, min_points=config.min_points, centroid=config.centroid)


def _read(points: str, lat: str, lon: str, read: Reader) -> Points:
    found = read(points, lat, lon)
    if found.bad:
        logger.warning("%s", found.complaint())
    if not len(found):
        raise InputError(f"{points} holds no position; {found.complaint() or 'it has no rows'}")
    return found


def _within(points: Points, box: Box | None) -> NDArray[np.float64]:
    point_deg_N2 = points.point_deg
    if box is None:
        return point_deg_N2
    kept = point_deg_N2[box.holds(point_deg_N2)]
    if not len(kept):
        raise InputError(
            f"none of the {len(points)} positions of {points.source} lies within south {box.south:g}, west "
            f"{box.west:g}, north {box.north:g}, east {box.east:g}; give another --bbox or --region"
        )
    return kept


def _check_out(given: str, out: str) -> None:
    """Before the work, not after it."""
    if Path(out).is_dir():
        raise OutputError(f"{given} is a folder; name a file")
    folder = Path(out).parent
    if not folder.is_dir():
        raise OutputError(f"the folder of {given} does not exist; make {folder} first")
