"""Places of photos, or of the locations that they show: read back from OUT, and as a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from geoloc_batch.run.config import PhotoPlace, Summary
from geoloc_batch.store.tables import NUM_VIEWS


def format_table(summary: Summary) -> str:
    """The places of a summary as lines for a terminal, and how many photos, or locations, are not among them."""
    places = summary.places
    if not places:
        return "no photo was located"
    is_grouped = any(place.num_views is not None for place in places)
    photos = f"  {'photos':>6}" if is_grouped else ""
    name = "location" if is_grouped else "photo"
    width = max(len(name), *(len(place.photo) for place in places))
    lines = [f"{name:<{width}}{photos}  {'lat':>9}  {'lon':>10}  {'sure':>6}  {'spread':>8}  cell"]
    for place in places:
        if place.error:
            lines.append(f"{place.photo:<{width}}  {place.error}")
        else:
            photos = f"  {place.num_views:6}" if place.num_views is not None else ""
            lines.append(
                f"{place.photo:<{width}}{photos}  {place.lat:9.4f}  {place.lon:10.4f}  {place.prob:6.1%}  "
                f"{place.spread_km:5.0f} km  {place.cell}  {place.head}".rstrip()
            )
    # Not by their names: a photo may have been given twice.
    per_head = Counter(place.head for place in places if not place.error)
    num_errors = sum(bool(place.error) for place in places)
    more = summary.rows + summary.errors - num_errors - max(per_head.values(), default=0)
    if more > 0:
        remedy = "all of them are in the predictions of --out" if summary.out else "pass --out to keep all of them"
        lines.append(f"... and {more} more; {remedy}")
    return "\n".join(lines)


def read_errors(out: Path) -> Iterator[list[PhotoPlace]]:
    """Every photo that has no place."""
    for path in sorted(out.glob("errors/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield [PhotoPlace(photo=row["key"], error=f"{row['stage']}: {row['message']}")]


def read_places(out: Path, max_photos: int) -> Iterator[list[PhotoPlace]]:
    """The first photos, or locations where these have the rows, each with what every head says of it."""
    trees: dict[Path, list[Path]] = {}
    for path in sorted(out.glob("**/predictions/*.parquet")):
        trees.setdefault(path.parents[1].relative_to(out), []).append(path)
    photos: dict[tuple[str, int], list[PhotoPlace]] = {}
    for tree, paths in trees.items():
        for row in _first_rows(paths, max_photos):
            num_views = row.get(NUM_VIEWS)
            place = PhotoPlace(
                # The path of a location's only photo would be no name of it.
                photo=str((num_views is None and row.get("meta_path")) or row["key"]),
                num_views=num_views,
                head="" if tree == Path() else tree.as_posix(),
                lat=row["lat"],
                lon=row["lon"],
                cell=row["cell"],
                prob=row["prob"],
                spread_km=row["spread_km"],
            )
            photos.setdefault((row["shard"], row["row"]), []).append(place)
    yield from photos.values()


def _first_rows(paths: Sequence[Path], max_rows: int) -> Iterator[dict[str, Any]]:
    for path in paths:
        rows = pq.read_table(path).slice(0, max_rows).to_pylist()
        yield from rows
        max_rows -= len(rows)
        if not max_rows:
            return
