"""Settings of `geoloc cells`; the docstrings under the fields are the help text. Free of slow imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.bbox import REGIONS, Box
from geoloc_batch.geo.home import expand_home

PATHS = ("out", "points", "file", "source", "map", "outlines")
"""Settings that may begin with ~, the user's home."""


def box_of(bbox: tuple[float, ...] | None, region: str) -> Box | None:
    """The box that --bbox or --region names, None where neither is given; a ConfigError where both are."""
    if bbox is not None and region:
        raise ConfigError("give either --bbox or --region, not both")
    if region:
        if region not in REGIONS:
            raise ConfigError(f"--region knows {' and '.join(REGIONS)}, not {region!r}; give --bbox")
        return REGIONS[region]
    if bbox is None:
        return None
    # A TOML file may hold a list of any length.
    if len(bbox) != 4:
        given = " ".join(f"{value:g}" for value in bbox) or "none"
        raise ConfigError(f"--bbox takes four numbers, SOUTH WEST NORTH EAST in degrees, got {given}")
    south, west, north, east = bbox
    return Box(south=south, west=west, north=north, east=east)


@dataclass(frozen=True, kw_only=True, slots=True)
class PointsConfig:
    """Which positions, and where the cells go."""

    out: str
    """File of the cells: .json (geocell_info.json, what heads come with) or .parquet (GeoParquet, for maps too)."""
    lat: str = ""
    """Column of the latitudes, where it is not called lat, latitude or true_lat."""
    lon: str = ""
    """Column of the longitudes, where it is not called lon, lng, long, longitude or true_lon."""
    bbox: tuple[float, float, float, float] | None = None
    """SOUTH WEST NORTH EAST in degrees: leave out the points beyond."""
    region: str = ""
    """The same by name: europe (34 to 72 N, 25 W to 45 E) or world."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("--out must not be empty: name the file of the cells, such as cells.json")
        if self.out.lower().endswith(".csv"):
            raise ConfigError(f"--out {self.out}: cells are written as .json or .parquet, not as CSV")
        box_of(self.bbox, self.region)
        expand_home(self, PATHS)

    @property
    def box(self) -> Box | None:
        """The box that --bbox or --region names."""
        return box_of(self.bbox, self.region)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig(PointsConfig):
    """Cells of a regular kind, made where points are."""

    points: Positional[Annotated[str, arg(metavar="POINTS")]]
    """Positions: a CSV or Parquet table with lat and lon, a folder of embeddings, or shards whose json has them."""
    min_points: int = 1
    """Leave out cells with fewer points; their points belong to the nearest centroid."""
    centroid: Literal["mean", "geometric"] = "mean"
    """Centroids: the spherical mean of a cell's points, or the middle of its outline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class H3Config(TreeConfig):
    """Cells of Uber's hexagonal grid that hold a point."""

    res: int = 4
    """Resolution of the grid, 0 to 15; 4 has cells about 45 km wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KdtreeConfig(TreeConfig):
    """Boxes of a k-d tree: cut at the median until each holds few points."""

    max_points: int = 39
    """Cut boxes that hold more points. The published heads have 19, 39, 78 and 155."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuadtreeConfig(TreeConfig):
    """Boxes of OpenStreetView-5M's quadtree: cut into four while they hold many points."""

    max_points: int = 1000
    """Cut boxes that hold this many points or more."""
    depth: int = 10
    """How often at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KmeansConfig(PointsConfig):
    """Cells of spherical k-means: each point belongs to the nearest centroid."""

    points: Positional[Annotated[str, arg(metavar="POINTS")]]
    """Positions: a table, a folder of embeddings or shards, as for the other kinds."""
    k: int = 2000
    """Number of cells to begin with."""
    min_points: int = 10
    """Merge smaller cells into their nearest neighbours, the smallest first."""
    rounds: int = 20
    """Rounds of k-means on a sample of 256 points a cell; exact ones on all points follow."""
    seed: int = 0
    """Seed of the points that the cells start from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolygonsConfig(PointsConfig):
    """One cell for each polygon of a file: countries, provinces, districts."""

    file: Positional[Annotated[str, arg(metavar="FILE")]]
    """Polygons in degrees: GeoJSON, or GeoParquet where the name ends in .parquet."""
    points: Positional[Annotated[str, arg(metavar="POINTS")]] = ""
    """Positions for the centroids, as the other kinds take them. Without them all polygons become cells,
    with the middles of their outlines as centroids."""
    id_field: str = ""
    """Property that tells the polygons apart, where it is not called id, code, ISO_A3 or the like."""
    name_field: str = ""
    """Property with their names, where it is not called name, ADMIN or the like."""
    min_points: int | None = None
    """Leave out cells with fewer points; their points belong to the nearest centroid. Where there are POINTS: 1."""
    centroid: Literal["mean", "geometric"] = "mean"
    """Centroids: the spherical mean of a cell's points, or the middle of its outline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NutsConfig(PolygonsConfig):
    """One cell for each of Eurostat's NUTS regions; its parent is the region of the level above."""

    level: int = 3
    """0 (countries) to 3 (districts). The file may hold several levels."""


BuildConfig = H3Config | KmeansConfig | KdtreeConfig | QuadtreeConfig | PolygonsConfig | NutsConfig

BUILD_KINDS: dict[str, type[BuildConfig]] = {
    "h3": H3Config,
    "kmeans": KmeansConfig,
    "kdtree": KdtreeConfig,
    "nuts": NutsConfig,
    "polygons": PolygonsConfig,
    "quadtree": QuadtreeConfig,
}
"""What `geoloc cells build KIND` knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowConfig:
    """Say how many cells there are, how large they are and how many points they hold; draw them on a map."""

    file: Positional[Annotated[str, arg(metavar="FILE")]]
    """Cells: geocell_info.json, GeoParquet that `geoloc cells` wrote, or OpenStreetView-5M's quadtree CSV."""
    points: str = ""
    """Count these positions in the cells: a CSV or Parquet table with lat and lon, embeddings, or shards."""
    map: str = ""
    """Draw a PNG map to this file."""
    outlines: str = ""
    """Draw the borders of this GeoJSON or GeoParquet file under the cells, such as Natural Earth's countries."""
    lat: str = ""
    """Column of the latitudes, where it is not called lat, latitude or true_lat."""
    lon: str = ""
    """Column of the longitudes, where it is not called lon, lng, long, longitude or true_lon."""

    def __post_init__(self) -> None:
        if self.outlines and not self.map:
            raise ConfigError("--outlines is for a map; give --map FILE.png as well")
        expand_home(self, PATHS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Write cells in another format: the ends of the names choose, .json or .parquet."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Cells: geocell_info.json, GeoParquet that `geoloc cells` wrote, or OpenStreetView-5M's quadtree CSV."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The file to write."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("OUT must not be empty: name the file to write, such as cells.parquet")
        expand_home(self, PATHS)


@dataclass(frozen=True, kw_only=True, slots=True)
class CeilingConfig:
    """Say how near a head could come on these cells that never mistakes one."""

    file: Positional[Annotated[str, arg(metavar="FILE")]]
    """Cells: geocell_info.json, GeoParquet that `geoloc cells` wrote, or OpenStreetView-5M's quadtree CSV."""
    points: Positional[Annotated[str, arg(metavar="POINTS")]]
    """Positions to locate: a CSV or Parquet table with lat and lon, embeddings, or shards."""
    lat: str = ""
    """Column of the latitudes, where it is not called lat, latitude or true_lat."""
    lon: str = ""
    """Column of the longitudes, where it is not called lon, lng, long, longitude or true_lon."""
    bbox: tuple[float, float, float, float] | None = None
    """SOUTH WEST NORTH EAST in degrees: leave out the points beyond."""
    region: str = ""
    """The same by name: europe or world."""

    def __post_init__(self) -> None:
        box_of(self.bbox, self.region)
        expand_home(self, PATHS)
