"""Assigning positions to cells, and making cells: a million positions.

    python scripts/bench_cells.py
    python scripts/bench_cells.py --data ../shared/data --points 1000000 --repeats 3

Positions: those of real photos, drawn with replacement and moved by some 5 km, where the folder of data has them;
else crowds of a made-up Earth. Partitions: H3 at resolution 4; OSV-5M's quadtree and the NUTS-3 regions where the
folder has them, else a quadtree and a net of polygons made here of about as many cells. Interleaved, medians of wall
time. First 2,000 positions are compared with the definition: every closed box, every polygon, the grid's own answer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h3
import numpy as np
import shapely
from numpy.typing import NDArray
from report import bar, report, unjudged

from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.cells.kmeans import build_kmeans
from geoloc_batch.geo.cells.polygons import build_polygons
from geoloc_batch.geo.cells.quadtree import build_quadtree
from geoloc_batch.geo.formats.polygon_file import Polygons, read_polygons
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.points import read_points

# Seconds for a million positions on two cores.
FLOORS = {"h3": 3.0, "quadtree": 10.0, "nuts": 10.0, "kmeans": 60.0}
K = 2000


def main() -> int:
    """Compare, measure, print; exit 0 when every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    points = draw_points(options.data, options.points, rng)
    partitions = make_partitions(options.data, points, rng)
    compare(partitions, points[:2000])
    lat, lon = points.T
    jobs: dict[str, Callable[[], object]] = {
        name: (lambda cells=cells: cells.assign(lat, lon)) for name, cells in partitions.items()
    }
    jobs["nearest of the quadtree's centroids"] = lambda: partitions["quadtree"].nearest(lat, lon)
    seconds: dict[str, list[float]] = {name: [] for name in [*jobs, "kmeans"]}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            seconds[name].append(clock(name, job))
    seconds["kmeans"].append(clock("kmeans", lambda: check_kmeans(points)))
    bars = [
        bar(name, round(statistics.median(times), 3), "s", FLOORS.get(name), is_lower=True)
        for name, times in seconds.items()
    ]
    # The floors are for a million positions: fewer prove nothing.
    bars = bars if options.points >= 1_000_000 else unjudged(bars)
    return report("cells", bars, ("numpy", "h3", "shapely"))


def clock(name: str, job: Callable[[], object]) -> float:
    """Wall seconds of a job; the processor's go to stderr with them."""
    start, start_cpu = time.perf_counter(), time.process_time()
    job()
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"{name}: {wall:.2f} s, processor {cpu:.2f} s", file=sys.stderr)
    return wall


def draw_points(data: Path, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[count, 2] (lat, lon)."""
    gallery = data / "golden" / "gps_gallery_100k.csv"
    if gallery.is_file():
        around = read_points(gallery).point_deg
    else:
        print(f"{gallery} is absent: made-up positions", file=sys.stderr)
        crowd = rng.uniform([-40, -180], [65, 180], (300, 2))
        around = crowd[rng.integers(0, 300, 100_000)] + rng.normal(0, 2, (100_000, 2))
    points = around[rng.integers(0, len(around), count)] + rng.normal(0, 0.05, (count, 2))
    return np.stack([points[:, 0].clip(-90, 90), (points[:, 1] + 180) % 360 - 180], axis=-1)


def make_partitions(data: Path, points: NDArray[np.float64], rng: np.random.Generator) -> dict[str, Partition]:
    """The three kinds of shapes."""
    sample = points[rng.permutation(len(points))[:100_000]]
    quadtree, nuts = data / "partitions" / "osv5m_quadtree_10_1000.csv", data / "polygons" / "nuts3_2021_60m.geojson"
    boxes = load_partition(quadtree) if quadtree.is_file() else build_quadtree(sample, 20, 12)[0]
    polygons = read_polygons(nuts) if nuts.is_file() else net_of_polygons(rng)
    partitions = {"h3": build_h3(sample, 4)[0], "quadtree": boxes, "nuts": build_polygons(polygons)[0]}
    for name, cells in partitions.items():
        print(f"{name}: {len(cells)} cells, {cells.locate(*sample.T).num_outside} of 100,000 outside", file=sys.stderr)
    return partitions


def net_of_polygons(rng: np.random.Generator) -> Polygons:
    """1,500 Voronoi cells with bent edges, on the land of nowhere."""
    seeds = shapely.multipoints(rng.uniform([-25, 34], [45, 72], (1500, 2)))
    cells = shapely.get_parts(shapely.voronoi_polygons(seeds, extend_to=shapely.box(-25, 34, 45, 72)))
    cells = shapely.segmentize(shapely.intersection(cells, shapely.box(-25, 34, 45, 72)), 0.1)
    ids = tuple(str(row) for row in range(len(cells)))
    return Polygons(ids=ids, names=ids, geometries=cells, without_geometry=(), source="a made-up net")


def compare(partitions: dict[str, Partition], points: NDArray[np.float64]) -> None:
    """Cells by their definition; otherwise there is nothing to time."""
    for name, cells in partitions.items():
        assert cells.shapes is not None
        found = cells.locate(*points.T)
        if name == "h3":
            known = {index: row for row, index in enumerate(cells.shapes.names)}  # type: ignore[attr-defined]
            row = np.array([known.get(h3.latlng_to_cell(lat, lon, 4), -1) for lat, lon in points.tolist()])
        else:
            geometry_C = cells.shapes.geometries()
            at = shapely.points(points[:, 1], points[:, 0])
            row = np.full(len(points), -1)
            for cell in range(len(cells))[::-1]:
                shapely.prepare(geometry_C[cell])
                row[shapely.intersects(geometry_C[cell], at)] = cell
        # A shared edge may name either side; points that were drawn lie on none.
        assert (found.inside == (row >= 0)).all(), name
        assert (found.ids[found.inside] == cells.ids[row[found.inside]]).all(), name


def check_kmeans(points: NDArray[np.float64]) -> None:
    """Make the cells; each point must be in the nearest one's, and each cell hold enough."""
    cells, cell_N = build_kmeans(points, min(K, len(points) // 50))
    assert np.bincount(cell_N).min() >= 10
    print(f"kmeans: {len(cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
