"""Polygons with ids and names from GeoJSON and GeoParquet files: regions, countries.

Shape letters: P polygons.

Source: RFC 7946 (GeoJSON); the GeoParquet specification 1.1.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import InputError

_ID_NAMES = ("id", "nuts_id", "code", "iso_a3", "adm0_a3", "fid", "shapeid", "gid")
_NAME_NAMES = ("name", "name_latn", "nuts_name", "admin", "shapename")
_DEGREES = ("EPSG:4326", "OGC:CRS84", "EPSG::4326", "CRS84", "EPSG:4258", "EPSG::4258")


@dataclass(frozen=True, kw_only=True, slots=True)
class Polygons:
    """P polygons, in the order of their ids: numbers by value, others as text."""

    ids: tuple[str, ...]
    """[P] as they stand in the file, each once."""
    names: tuple[str, ...]
    """[P] the ids again where the file has no names."""
    geometries: NDArray[np.object_]
    """[P] shapely geometries in (lon, lat)."""
    without_geometry: tuple[str, ...]
    """The ids of rows that have none; they are left out."""
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.intp]) -> Polygons:
        """The polygons named by `rows`."""
        return Polygons(
            ids=tuple(self.ids[row] for row in rows),
            names=tuple(self.names[row] for row in rows),
            geometries=self.geometries[rows],
            without_geometry=self.without_geometry,
            source=self.source,
        )


def read_polygons(path: str | Path, *, id_field: str = "", name_field: str = "") -> Polygons:
    """Read a file of polygons.

    Args:
        path: GeoJSON, or GeoParquet (a name that ends in .parquet) with WKB geometries; both in degrees.
        id_field: the property (or column) with the ids; without it the first of id, NUTS_ID, code, ISO_A3, ADM0_A3,
            FID, shapeID and GID (in capitals or not) that all rows have, each value once; else GeoJSON's own ids.
        name_field: likewise for names: name, NAME_LATN, NUTS_NAME, ADMIN, shapeName; else the ids.

    Raises:
        InputError: the file cannot be read, is in another coordinate system, or has no such ids or names.
    """
    path = Path(path)
    rows, geometries = _read(path)
    if not rows:
        raise InputError(f"{path} holds no polygon")
    ids = _values(rows, id_field, _ID_NAMES, "--id-field", path)
    if len(set(ids)) < len(ids):
        twice = next(value for value in ids if ids.count(value) > 1)
        raise InputError(f"{path}: the id {twice!r} stands on {ids.count(twice)} polygons; give another --id-field")
    names = _values(rows, name_field, _NAME_NAMES, "--name-field", path, otherwise=ids)
    order = sorted(range(len(ids)), key=(lambda row: int(ids[row])) if _are_numbers(ids) else ids.__getitem__)
    present = [row for row in order if geometries[row] is not None]
    if not present:
        raise InputError(f"{path}: none of {len(rows)} rows has a geometry")
    return Polygons(
        ids=tuple(ids[row] for row in present),
        names=tuple(names[row] for row in present),
        geometries=geometries[np.array(present)],
        without_geometry=tuple(ids[row] for row in order if geometries[row] is None),
        source=str(path),
    )


def read_geometries(path: Path) -> NDArray[np.object_]:
    """The geometries alone, None where a row has none; errors as in `read_polygons`."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[Mapping[str, Any]], NDArray[np.object_]]:
    if not path.is_file():
        raise InputError(f"no such file of polygons: {path}; give GeoJSON or GeoParquet")
    return _from_geoparquet(path) if path.suffix.lower() in (".parquet", ".geoparquet") else _from_geojson(path)


def _from_geojson(path: Path) -> tuple[list[Mapping[str, Any]], NDArray[np.object_]]:
    import shapely

    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        features = document["features"]
        crs = ((document.get("crs") or {}).get("properties") or {}).get("name", "CRS84")
        rows: list[Mapping[str, Any]] = [
            {"": feature.get("id"), **(feature.get("properties") or {})} for feature in features
        ]
        shapes = [shapely.geometry.shape(each["geometry"]) if each.get("geometry") else None for each in features]
    except RecursionError:
        raise InputError(f"{path} is no GeoJSON FeatureCollection: its brackets are nested too deeply") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} is no GeoJSON FeatureCollection: {type(error).__name__}: {error}") from error
    if not str(crs).endswith(_DEGREES):
        raise InputError(f"{path} is in {crs}; give polygons in degrees (EPSG:4326), longitude first")
    geometries: NDArray[np.object_] = np.empty(len(shapes), dtype=object)
    geometries[:] = shapes
    return rows, geometries


def _from_geoparquet(path: Path) -> tuple[list[Mapping[str, Any]], NDArray[np.object_]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely

    try:
        file = pq.ParquetFile(path)
        geo = json.loads((file.schema_arrow.metadata or {})[b"geo"])
        primary = geo["primary_column"]
        about = geo["columns"][primary]
        others = [
            field.name
            for field in file.schema_arrow
            if field.name != primary and field.name not in geo["columns"] and not pa.types.is_nested(field.type)
        ]
        table = file.read(columns=[*others, primary])
        geometries = shapely.from_wkb(np.array(table[primary].to_pylist(), dtype=object))
    except RecursionError:
        raise InputError(f"{path} is no GeoParquet: the brackets of its metadata are nested too deeply") from None
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} is no GeoParquet with WKB geometries: {type(error).__name__}: {error}") from error
    crs = about.get("crs", {"id": {"authority": "OGC", "code": "CRS84"}})
    name = (
        "unknown coordinates"
        if not crs
        else "{authority}:{code}".format(**crs.get("id", {"authority": "", "code": ""}))
    )
    if not name.endswith(_DEGREES):
        raise InputError(f"{path} is in {name}; give polygons in degrees (OGC:CRS84 or EPSG:4326)")
    return table.select(others).to_pylist(), np.asarray(geometries, dtype=object)


def _values(
    rows: list[Mapping[str, Any]],
    given: str,
    usual: tuple[str, ...],
    flag: str,
    path: Path,
    otherwise: list[str] | None = None,
) -> list[str]:
    """One property of all rows, as text."""
    known = [name for name in rows[0] if name]
    if given:
        missing = sum(row.get(given) is None for row in rows)
        if missing:
            raise InputError(
                f"{path}: {missing} of {len(rows)} rows have no {flag} {given!r}; there are {', '.join(known[:30])}"
            )
        return [str(row[given]) for row in rows]
    for name in (*(each for wish in usual for each in known if each.lower() == wish), ""):
        if all(row.get(name) is not None for row in rows):
            values = [str(row[name]) for row in rows]
            # Ids must tell polygons apart; -99 and its like for "none" do not.
            if otherwise is not None or len(set(values)) == len(values):
                return values
    if otherwise is not None:
        return otherwise
    raise InputError(f"{path}: no property tells the polygons apart; give {flag}, one of {', '.join(known[:30])}")


def _are_numbers(ids: list[str]) -> bool:
    return all(value.isascii() and value.isdigit() for value in ids)
