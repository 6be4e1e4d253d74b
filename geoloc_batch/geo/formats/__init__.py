"""Files of cells, one format a file: geocell_info.json, GeoParquet, OSV-5M's quadtree; polygons from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geoloc_batch.whole_file import in_one_move

if TYPE_CHECKING:
    from geoloc_batch.geo.partition import Partition


def read_partition(path: Path) -> Partition:
    """A partition by the end of its file's name; see `load_partition`."""
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".geoparquet"):
        from geoloc_batch.geo.formats.geoparquet import read_geoparquet

        return read_geoparquet(path)
    if suffix == ".csv":
        from geoloc_batch.geo.formats.quadtree_csv import read_quadtree

        return read_quadtree(path)
    from geoloc_batch.geo.formats.geocell_info import read_geocell_info

    return read_geocell_info(path)


def save_partition(partition: Partition, path: Path) -> None:
    """Write a partition by the end of its file's name; see `Partition.save`."""
    if path.suffix.lower() in (".parquet", ".geoparquet"):
        from geoloc_batch.geo.formats.geoparquet import write_geoparquet

        return in_one_move(path, lambda part: write_geoparquet(partition, part))
    if path.suffix.lower() == ".csv":
        from geoloc_batch.errors import PartitionError

        raise PartitionError(f"{path}: cells are written as .json (geocell_info.json) or .parquet, not as CSV")
    from geoloc_batch.geo.formats.geocell_info import geocell_info

    text = geocell_info(partition)
    return in_one_move(path, lambda part: part.write_text(text, encoding="utf-8"))
