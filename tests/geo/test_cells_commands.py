"""`geoloc cells`: build, show, convert, ceiling, as their functions answer them and as flags are parsed."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tyro
from PIL import Image
from tyro.conf import OmitArgPrefixes, UseAppendAction

from geoloc_batch.errors import ConfigError, InputError, OutputError
from geoloc_batch.geo.cells import config as configs
from geoloc_batch.geo.cells.commands import build, convert, measure_ceiling, show
from geoloc_batch.geo.partition import load_partition
from geoloc_batch.geo.points import Points, points_of


def parse(kind: type, *arguments: object) -> object:
    return tyro.cli(kind, args=[str(each) for each in arguments], config=(OmitArgPrefixes, UseAppendAction))


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """500 points in Europe, 20 in Australia, one without a place."""
    rng = np.random.default_rng(0)
    lat = [*rng.uniform(40, 60, 500), *rng.uniform(-30, -20, 20), np.nan]
    lon = [*rng.uniform(0, 30, 500), *rng.uniform(120, 140, 20), 5.0]
    pq.write_table(pa.table({"lat": lat, "lon": lon}), tmp_path / "points.parquet")
    return tmp_path / "points.parquet"


@pytest.fixture
def regions(tmp_path: Path) -> Path:
    boxes = {
        "West": shapely.box(0, 30, 15, 70),
        "East": shapely.box(15, 30, 29, 70),
        "Sea": shapely.box(-20, 0, -10, 9),
    }
    features = [
        {"type": "Feature", "properties": {"name": name}, "id": row, "geometry": shapely.geometry.mapping(box)}
        for row, (name, box) in enumerate(boxes.items())
    ]
    path = tmp_path / "regions.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "flags", "shapes"),
    [
        ("h3", ["--res", 2], "h3"),
        ("kmeans", ["--k", 20], None),
        ("kdtree", ["--max-points", 39], "box"),
        ("quadtree", ["--max-points", 50, "--depth", 6], "box"),
        ("polygons", [], "polygon"),
    ],
)
def test_cells_are_built_shown_converted_and_measured(
    tmp_path: Path, points: Path, regions: Path, kind: str, flags: list[object], shapes: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / f"{kind}.json"
    inputs = [regions, points] if kind == "polygons" else [points]
    with caplog.at_level(logging.WARNING, "geoloc_batch"):
        built = build(parse(configs.BUILD_KINDS[kind], *inputs, *flags, "--region", "europe", "--out", out))  # type: ignore[arg-type]
    assert "1 of 521 rows have no usable position (1 NaN)" in caplog.text
    partition = load_partition(out)
    assert (built.points, built.beyond_box, built.bad_points) == (500, 20, {"NaN": 1})
    assert (built.cells, built.fingerprint) == (len(partition), partition.fingerprint)
    assert built.cells > 1
    outside = int((pq.read_table(points)["lon"].to_numpy()[:500] > 29).sum()) if kind == "polygons" else 0
    assert built.outside == outside
    assert (f"{outside} of 500 points lie in no cell" in caplog.text) == (outside > 0)

    shown = show(parse(configs.ShowConfig, out))  # type: ignore[arg-type]
    assert (shown.cells, shown.shapes, shown.points, shown.empty_cells) == (built.cells, shapes, 500 - outside, 0)
    assert shown.points_per_cell is not None
    assert shown.points_per_cell.mean == pytest.approx((500 - outside) / built.cells, abs=1e-3)
    assert (shown.area_km2 is None) == (shapes is None)
    counted = show(configs.ShowConfig(file=str(out), points=str(points)))
    assert counted.points == 520

    converted = convert(parse(configs.ConvertConfig, out, tmp_path / "cells.parquet"))  # type: ignore[arg-type]
    assert (converted.fingerprint, converted.shapes) == (built.fingerprint, shapes)
    measured = measure_ceiling(parse(configs.CeilingConfig, converted.out, points, "--region", "europe"))  # type: ignore[arg-type]
    assert measured.points == 500
    assert measured.outside == (500 if shapes is None else outside)
    for answer in (built, shown, counted, converted, measured):
        assert json.loads(json.dumps(dataclasses.asdict(answer))) is not None


def test_polygons_need_no_points(tmp_path: Path, regions: Path) -> None:
    built = build(configs.PolygonsConfig(file=str(regions), out=str(tmp_path / "cells.json")))
    assert (built.cells, built.points, built.outside) == (3, 0, 0)
    assert load_partition(built.out).names == ["West", "East", "Sea"]


@pytest.mark.parametrize("outlines", [False, True])
def test_a_map_is_drawn(tmp_path: Path, points: Path, regions: Path, outlines: bool) -> None:
    for kind, flags in (("kmeans", {"k": 10}), ("h3", {"res": 1})):
        out = tmp_path / f"{kind}.json"
        build(configs.BUILD_KINDS[kind](points=str(points), out=str(out), **flags))  # type: ignore[arg-type]
        target = tmp_path / f"{kind}.png"
        shown = show(configs.ShowConfig(file=str(out), map=str(target), outlines=str(regions) if outlines else ""))
        assert shown.map == str(target)
        with Image.open(target) as image:
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 50
        assert image.width > 800
    plain = target.read_bytes()
    show(configs.ShowConfig(file=str(out), map=str(target), outlines="" if outlines else str(regions)))
    assert target.read_bytes() != plain


def test_other_rooms_can_lend_their_reader_of_points(tmp_path: Path) -> None:
    def read(points: str, lat: str, lon: str) -> Points:
        assert (points, lat, lon) == ("emb/", "gps_lat", "")
        return points_of([48.0, 49.0], [11.0, 12.0], points)

    config = configs.H3Config(points="emb/", lat="gps_lat", out=str(tmp_path / "cells.json"))
    assert build(config, read).points == 2


def test_mistakes_are_told_before_the_work(tmp_path: Path, points: Path) -> None:
    with pytest.raises(ConfigError, match="either --bbox or --region"):
        configs.H3Config(points="p", out="o.json", region="europe", bbox=(1, 2, 3, 4))
    with pytest.raises(ConfigError, match="--region knows europe and world, not 'asia'; give --bbox"):
        configs.CeilingConfig(file="f", points="p", region="asia")
    with pytest.raises(ConfigError, match="not as CSV"):
        configs.H3Config(points="p", out="cells.csv")
    with pytest.raises(ConfigError, match="--out must not be empty"):
        configs.H3Config(points="p", out="")
    with pytest.raises(ConfigError, match="--outlines is for a map"):
        configs.ShowConfig(file="f", outlines="o")
    with pytest.raises(OutputError, match="does not exist; make"):
        build(configs.H3Config(points="absent", out=str(tmp_path / "no" / "cells.json")))
    far = configs.H3Config(points=str(points), out=str(tmp_path / "cells.json"), bbox=(70.0, 0.0, 80.0, 1.0))
    with pytest.raises(InputError, match=r"none of the 520 positions .* lies within south 70, west 0"):
        build(far)
    empty = tmp_path / "empty.csv"
    empty.write_text("lat,lon\n,\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds no position; .* 1 of 1 rows have no usable position"):
        build(configs.H3Config(points=str(empty), out=str(tmp_path / "cells.json")))


def test_four_numbers_of_a_box_are_parsed_with_their_signs() -> None:
    config = parse(configs.H3Config, "p.csv", "--bbox", 34, -25, 72, 45, "--out", "o.json", "--centroid", "geometric")
    assert isinstance(config, configs.H3Config)
    assert config.bbox == (34, -25, 72, 45)
    assert config.box is not None
    assert config.box.west == -25
    nuts = parse(configs.NutsConfig, "n.geojson", "--out", "o.json", "--level", 2)
    assert isinstance(nuts, configs.NutsConfig)
    assert (nuts.file, nuts.points, nuts.level, nuts.min_points) == ("n.geojson", "", 2, None)


@pytest.mark.parametrize("out", [".", "..", "folder", "folder/"])
def test_a_folder_in_place_of_a_file_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    # None of the inputs is there: to read one would be another error.
    with pytest.raises(OutputError, match=rf"^--out {out} is a folder; name a file"):
        build(configs.KdtreeConfig(points="absent.csv", out=out))
    with pytest.raises(OutputError, match=rf"^--map {out} is a folder; name a file"):
        show(configs.ShowConfig(file="absent.json", map=out))
    with pytest.raises(OutputError, match=rf"^OUT {out} is a folder; name a file"):
        convert(configs.ConvertConfig(source="absent.json", out=out))
    with pytest.raises(ConfigError, match="OUT must not be empty"):
        configs.ConvertConfig(source="absent.json", out="")


@pytest.mark.parametrize("bbox", [(), (45.0, 5.0, 50.0), (45.0, 5.0, 50.0, 9.0, 1.0)])
def test_a_box_of_another_length_is_refused(bbox: tuple[float, ...]) -> None:
    for kind, values in (
        (configs.KdtreeConfig, {"points": "p", "out": "o.json"}),
        (configs.CeilingConfig, {"file": "f"}),
    ):
        with pytest.raises(ConfigError, match=r"--bbox takes four numbers, SOUTH WEST NORTH EAST in degrees, got "):
            kind(**{"points": "p", **values, "bbox": bbox})  # type: ignore[arg-type]


def test_a_tilde_that_the_shell_left_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    built = configs.PolygonsConfig(file="~/f.json", points="~/p.csv", out="~/o.json")
    shown = configs.ShowConfig(file="~/f.json", points="~/p.csv", map="~/m.png", outlines="~/l.json")
    converted = configs.ConvertConfig(source="~/f.json", out="~/o.json")
    measured = configs.CeilingConfig(file="~/f.json", points="~/p.csv")
    paths = [
        value
        for config in (built, shown, converted, measured)
        for value in dataclasses.asdict(config).values()
        if isinstance(value, str) and "/" in value
    ]
    assert len(paths) == 11
    assert {Path(path).parent for path in paths} == {tmp_path}
