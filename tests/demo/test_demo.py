"""The demo: a synthetic Europe whose photos tell where they are, and the pipeline on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geoloc_batch.cli import main
from geoloc_batch.demo.photos import HEADINGS, make_photos
from geoloc_batch.demo.world import looks_of, make_places


def test_the_same_seed_gives_the_same_photos_whatever_the_number_of_threads(tmp_path: Path) -> None:
    places = make_places(20, seed=3)
    for threads in (1, 2):
        make_photos(tmp_path / str(threads), places, seed=3, side=48, threads=threads)
    names = sorted(path.name for path in (tmp_path / "1" / "photos").iterdir())
    assert len(names) == 20 * len(HEADINGS)
    for name in names:
        assert (tmp_path / "1" / "photos" / name).read_bytes() == (tmp_path / "2" / "photos" / name).read_bytes()
    make_photos(tmp_path / "other", places, seed=4, side=48)
    other = tmp_path / "other" / "photos" / names[0]
    assert other.read_bytes() != (tmp_path / "1" / "photos" / names[0]).read_bytes()


def test_places_lie_in_europe_and_neighbours_look_alike() -> None:
    places = make_places(500, seed=0)
    lat, lon = places.point_deg.T
    assert (lat > 30).all()
    assert (lat < 75).all()
    assert (lon > -20).all()
    assert (lon < 45).all()
    near = looks_of(places.point_deg + 0.01, seed=0)
    here = looks_of(places.point_deg, seed=0)
    far = looks_of(places.point_deg[::-1], seed=0)
    assert np.abs(here.soil - near.soil).max() < 0.02
    assert np.abs(here.soil - far.soil).mean() > 0.1


def test_the_table_names_each_photo_with_its_place(tmp_path: Path) -> None:
    places = make_places(5, seed=0)
    table, place_N = make_photos(tmp_path, places, side=32)
    lines = table.read_text().splitlines()
    assert lines[0] == "path,lat,lon,heading,location"
    assert place_N.tolist() == [place for place in range(5) for _ in HEADINGS]
    path, lat, lon, heading, location = lines[6].split(",")
    assert (float(lat), float(lon)) == pytest.approx(places.point_deg[1].tolist(), abs=1e-6)
    assert (heading, location) == ("90", "1")
    with Image.open(tmp_path / path) as photo:
        assert photo.size == (32, 32)


def test_the_demo_beats_the_commonest_cell_and_may_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--places", "500"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[1] for line in lines if line.startswith("geoloc ")]
    assert commands == ["pack", "embed", "cells", "train", "predict", "evaluate"]
    first = json.loads(lines[-1])
    assert first["images"] == 2000
    assert first["better"] == pytest.approx(first["guess_km"] / first["median_km"], abs=0.01)
    assert first["better"] > 2
    with Image.open(out / "figure.png") as figure:
        assert figure.size[0] > 1000
    assert main(["verify", str(out / "emb")]) == 0
    assert main(["verify", str(out / "pred")]) == 0
    evaluated = json.loads((out / "scores" / "metrics.json").read_text())
    assert (evaluated["rows"], evaluated["median_km"]) == (
        first["test_places"],
        pytest.approx(first["median_km"], abs=0.05),
    )
    capsys.readouterr()
    assert main([*arguments, "--places", "60"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 240


@pytest.mark.parametrize("mark", ["", "{}"])
def test_the_demo_leaves_a_folder_of_something_else_alone(
    mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    if mark:
        (tmp_path / "demo.json").write_text(mark)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "photos").is_dir()


def test_too_few_places_are_misuse(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path / "x"), "--places", "3"]) == 2
