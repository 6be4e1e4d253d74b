"""Photos of the synthetic Europe: sky, hills, trees, verges, a road with its markings, houses, poles, a car.

The place decides colours and shapes (see world.Looks); weather, light, camera and chance get in the way, as they do.

Shape letters: N photos, S image side.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.demo.world import Floats, Looks, Places, looks_of

HEADINGS = (0, 90, 180, 270)
"""Degrees; one photo of each place towards each."""

Pixels = NDArray[np.float32]

_CHUNK = 64
_JPEG_QUALITY = 88
# Ends of each scale of world.Looks, RGB from 0 to 255.
_PALETTE = {
    "zenith": ((58, 112, 196), (150, 178, 206)),
    "haze": ((206, 220, 236), (238, 214, 176)),
    "stone": ((92, 112, 110), (176, 168, 156)),
    "leaf": ((26, 54, 40), (104, 118, 62)),
    "dry": ((60, 116, 44), (178, 160, 84)),
    "soil": ((72, 58, 44), (196, 182, 148)),
    "clay": ((100, 84, 60), (176, 88, 52)),
    "asphalt": ((58, 58, 62), (148, 144, 136)),
    "wall": ((140, 76, 58), (240, 234, 220)),
    "roof": ((66, 70, 80), (188, 84, 54)),
    "line": ((238, 238, 238), (236, 184, 40)),
    "pole": ((96, 70, 48), (196, 196, 192)),
    "sign": ((242, 206, 36), (24, 70, 170)),
    "plate": ((244, 244, 244), (240, 200, 40)),
}


def draw_photos(looks: Looks, heading_N: Floats, rng: np.random.Generator, side: int = 96) -> NDArray[np.uint8]:
    """One photo for each row of `looks`.

    Args:
        looks: of N places.
        heading_N: [N] degrees clockwise from north that the camera points to.
        rng: weather, light, camera, clutter and noise.
        side: S.

    Returns:
        [N, S, S, 3] RGB.
    """
    num_photos = len(heading_N)
    # Places that look alike on paper differ a little from street to street, and no two photos see the same of them.
    seen = Looks(*(np.clip(getattr(looks, f.name) + rng.normal(0, 0.06, num_photos), 0, 1) for f in fields(Looks)))
    horizon_N = side * rng.normal(0.47, 0.025, num_photos)
    image = _sky(seen, heading_N, horizon_N, rng, side)
    _hills_and_trees(image, seen, horizon_N, rng)
    _ground_and_road(image, seen, horizon_N, rng)
    for row in range(num_photos):
        _furniture(image[row], seen, row, float(horizon_N[row]), rng)
    return _through_the_camera(image, rng)


def make_photos(
    out: Path, places: Places, *, seed: int = 0, side: int = 96, threads: int = 2
) -> tuple[Path, NDArray[np.int64]]:
    """Photograph each place towards each of HEADINGS.

    Args:
        out: folder, made if need be. Photos go to `photos/`, and `photos.csv` lists them: path (from the CSV's folder),
            lat, lon, heading, location (the place's number).
        places: the places.
        seed: of looks, weather and all other chance.
        side: pixels.
        threads: how many draw and write.

    Returns:
        The CSV's path, and [N] the place of each photo, in the CSV's order.
    """
    (out / "photos").mkdir(parents=True, exist_ok=True)
    place_N = np.repeat(np.arange(len(places)), len(HEADINGS))
    heading_N = np.tile(np.array(HEADINGS), len(places))
    names = [f"photos/{place:05d}_{heading:03d}.jpg" for place, heading in zip(place_N, heading_N, strict=True)]
    looks = looks_of(places.point_deg, seed)

    def draw(start: int) -> None:
        rows = slice(start, start + _CHUNK)
        chosen = Looks(*(getattr(looks, f.name)[place_N[rows]] for f in fields(Looks)))
        # Each chunk has a generator of its own, so that the number of threads changes no pixel.
        rng = np.random.default_rng([seed, 3, start])
        images = draw_photos(chosen, heading_N[rows].astype(np.float64), rng, side)
        for name, jpeg in zip(names[rows], _jpegs(images), strict=True):
            (out / name).write_bytes(jpeg)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, range(0, len(place_N), _CHUNK)))
    with open(out / "photos.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "lat", "lon", "heading", "location"])
        for name, place, heading in zip(names, place_N.tolist(), heading_N.tolist(), strict=True):
            lat, lon = places.point_deg[place].tolist()
            rows.writerow([name, f"{lat:.6f}", f"{lon:.6f}", heading, place])
    return out / "photos.csv", place_N


def _sky(seen: Looks, heading_N: Floats, horizon_N: Floats, rng: np.random.Generator, side: int) -> Pixels:
    num_photos = len(heading_N)
    cloud_N = rng.beta(1.2, 2.5, num_photos)
    grey = rng.normal(190, 14, (num_photos, 1))
    top = _mix(_colour(seen, "zenith"), grey, 0.7 * cloud_N)
    low = _mix(_colour(seen, "haze"), grey, 0.5 * cloud_N)
    y = np.arange(side, dtype=np.float32)
    height = np.clip(1 - y / horizon_N[:, None], 0, 1).astype(np.float32)[:, :, None, None]
    # The sun stands in the south: photos towards it have a bright side of the sky.
    x = np.linspace(-1, 1, side, dtype=np.float32)
    facing_N = -np.cos(np.radians(heading_N))
    sun = np.exp(-4 * (x + rng.uniform(-1, 1, (num_photos, 1))) ** 2)
    glow = 22 * facing_N[:, None] * (1 - cloud_N)[:, None] * sun
    sky = low[:, None, None, :] + (top - low)[:, None, None, :] * height
    return np.asarray(sky + glow.astype(np.float32)[:, None, :, None], dtype=np.float32)


def _hills_and_trees(image: Pixels, seen: Looks, horizon_N: Floats, rng: np.random.Generator) -> None:
    num_photos, side = len(image), image.shape[1]
    y = np.arange(side, dtype=np.float32)[None, :, None]
    hill = side * 0.26 * seen.relief * rng.uniform(0.6, 1.3, num_photos)
    ridge = horizon_N[:, None] - hill[:, None] * (0.6 + 0.4 * _profile(num_photos, side, (1, 2, 5), rng))
    # Far hills take on the colour of the air.
    colour = _mix(_colour(seen, "stone"), _colour(seen, "haze"), np.full(num_photos, 0.35))
    _paint(image, y >= ridge[:, None, :], colour)
    # Needle trees are pointed: the darker the leaf, the finer the teeth of the forest.
    tall = side * (0.02 + 0.2 * seen.wood) * rng.uniform(0.5, 1.3, num_photos)
    broad, fine = _profile(num_photos, side, (2, 3, 7), rng), _profile(num_photos, side, (11, 17, 23), rng)
    teeth = (1 - seen.leaf)[:, None]
    crown = horizon_N[:, None] - tall[:, None] * np.clip(0.55 + 0.3 * broad + 0.35 * teeth * fine, 0.05, None)
    green = _mix(_colour(seen, "leaf"), _colour(seen, "dry"), 0.4 * seen.dry)
    _paint(image, y >= crown[:, None, :], green)


def _ground_and_road(image: Pixels, seen: Looks, horizon_N: Floats, rng: np.random.Generator) -> None:
    num_photos, side = len(image), image.shape[1]
    y = np.arange(side, dtype=np.float32)[None, :]
    x = np.arange(side, dtype=np.float32)[None, None, :]
    earth = _mix(_colour(seen, "soil"), _colour(seen, "clay"), 0.6 * seen.clay)
    verge = _mix(_colour(seen, "dry"), earth, rng.uniform(0.35, 0.8, num_photos))
    depth = np.clip((y - horizon_N[:, None]) / (side - horizon_N[:, None]), 0, 1)
    _paint(image, (depth > 0)[:, :, None], verge)
    centre = side * (0.5 + rng.normal(0, 0.08, num_photos)[:, None] + depth * rng.normal(0, 0.12, num_photos)[:, None])
    half = side * depth * rng.uniform(0.3, 0.5, num_photos)[:, None]
    off = np.abs(x - centre[:, :, None])
    _paint(image, (off < half[:, :, None]) & (depth > 0)[:, :, None], _colour(seen, "asphalt"))
    thick = np.maximum(0.06 * half, 0.5)[:, :, None]
    line = _colour(seen, "line")
    edge = np.abs(off - 0.86 * half[:, :, None]) < thick
    _paint(image, edge & (depth > 0.08)[:, :, None], line)
    # Dashes are even on the road, so they shrink with distance: their phase goes with one over depth.
    period = 0.5 + 2.0 * seen.dash
    phase = (period[:, None] / np.maximum(depth, 0.05) + rng.uniform(0, 1, num_photos)[:, None]) % 1
    _paint(image, (off < thick) & ((phase < 0.55) & (depth > 0.08))[:, :, None], line)


def _furniture(image: Pixels, seen: Looks, row: int, horizon: float, rng: np.random.Generator) -> None:
    """Houses, a pole with its sign, now and then a car: rectangles, drawn photo by photo."""
    side = image.shape[0]
    wall, roof, pole, sign, plate = (_one(seen, name, row) for name in ("wall", "roof", "pole", "sign", "plate"))
    for _ in range(rng.integers(1, 4)):
        left, width, tall = rng.uniform(-0.1, 0.95), rng.uniform(0.1, 0.26), rng.uniform(0.07, 0.17)
        base, shade = horizon + rng.uniform(0.0, 0.05) * side, rng.uniform(0.8, 1.08)
        _box(image, base - tall * side, base, left, left + width, wall * shade)
        _box(image, base - 1.45 * tall * side, base - tall * side, left - 0.01, left + width + 0.01, roof * shade)
    at, height = rng.uniform(0.04, 0.96), rng.uniform(0.25, 0.42)
    _box(image, horizon - height * side, horizon + 0.12 * side, at, at + 0.025, pole)
    _box(image, horizon - 0.2 * side, horizon - 0.1 * side, at - 0.045, at + 0.07, sign)
    if rng.random() < 0.4:
        at, low = rng.uniform(0.15, 0.7), horizon + rng.uniform(0.12, 0.34) * side
        _box(image, low - 0.14 * side, low, at, at + 0.2, rng.uniform(20, 235, 3))
        _box(image, low - 0.05 * side, low - 0.015 * side, at + 0.06, at + 0.14, plate)


def _through_the_camera(image: Pixels, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, white balance, haze on the lens, grain."""
    num_photos, side = len(image), image.shape[1]
    gain = (rng.normal(1, 0.1, (num_photos, 1)) * rng.normal(1, 0.025, (num_photos, 3))).astype(np.float32)
    veil = np.abs(rng.normal(0, 8, (num_photos, 1))).astype(np.float32)
    image *= gain[:, None, None, :]
    image += veil[:, None, None, :]
    grain = rng.normal(0, 7, (2 * side, 2 * side, 1)).astype(np.float32)
    for row, (top, left) in enumerate(rng.integers(side, size=(num_photos, 2)).tolist()):
        image[row] += grain[top : top + side, left : left + side]
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _colour(seen: Looks, name: str) -> Pixels:
    """[N, 3] the colour that the look stands for."""
    low, high = np.array(_PALETTE[name], dtype=np.float32)
    return np.asarray(low + (high - low) * getattr(seen, name)[:, None], dtype=np.float32)


def _one(seen: Looks, name: str, row: int) -> Pixels:
    low, high = np.array(_PALETTE[name], dtype=np.float32)
    return np.asarray(low + (high - low) * getattr(seen, name)[row], dtype=np.float32)


def _mix(a: NDArray[np.floating], b: NDArray[np.floating], share_N: Floats) -> Pixels:
    return np.asarray(a + (b - a) * share_N[:, None], dtype=np.float32)


def _profile(num_photos: int, side: int, waves: tuple[int, ...], rng: np.random.Generator) -> Pixels:
    """[N, S] a skyline from -1 to 1: waves of these counts across the image, each photo with its own phases."""
    x = np.linspace(0, 2 * np.pi, side)
    phase = rng.uniform(0, 2 * np.pi, (num_photos, len(waves), 1))
    return np.asarray(np.sin(np.array(waves)[:, None] * x + phase).mean(axis=1), dtype=np.float32)


def _paint(image: Pixels, mask: NDArray[np.bool_], colour_N3: Pixels) -> None:
    np.copyto(image, colour_N3[:, None, None, :], where=mask[..., None])


def _box(image: Pixels, top: float, bottom: float, left: float, right: float, colour: NDArray[np.floating]) -> None:
    """A filled rectangle: rows in pixels, columns as shares of the width; what sticks out is cut off."""
    side = image.shape[0]
    rows, columns = np.clip([top, bottom], 0, side).round().astype(int), np.clip([left, right], 0, 1)
    start, stop = (columns * side).round().astype(int)
    image[rows[0] : rows[1], start:stop] = colour


def _jpegs(images: NDArray[np.uint8]) -> Iterator[bytes]:
    import simplejpeg

    for image in images:
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=_JPEG_QUALITY)
