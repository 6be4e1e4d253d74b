"""Coordinates, distances and means on the sphere."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km, points_deg, spherical_mean, unit_vectors

HALF_WAY_KM = math.pi * EARTH_RADIUS_KM
latitudes = st.floats(-90, 90) | st.sampled_from([-90.0, 0.0, 90.0])
longitudes = st.floats(-180, 180) | st.sampled_from([-180.0, 0.0, 180.0])
points = st.tuples(latitudes, longitudes)


def exact_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The same distance from another formula, the angle between vectors, with 40 digits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        u, v = ([mpmath.radians(mpmath.mpf(degrees)) for degrees in point] for point in (a, b))
        x, y = (
            (mpmath.cos(lat) * mpmath.cos(lon), mpmath.cos(lat) * mpmath.sin(lon), mpmath.sin(lat))
            for lat, lon in (u, v)
        )
        far = mpmath.sqrt(sum((p + q) ** 2 for p, q in zip(x, y, strict=True)))
        near = mpmath.sqrt(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)))
        return float(2 * mpmath.atan2(near, far) * mpmath.mpf(EARTH_RADIUS_KM))


@pytest.mark.parametrize(
    ("point", "vector"),
    [
        ((0, 0), (1, 0, 0)),
        ((0, 90), (0, 1, 0)),
        ((0, 180), (-1, 0, 0)),
        ((0, -180), (-1, 0, 0)),
        ((90, 0), (0, 0, 1)),
        ((-90, 77), (0, 0, -1)),
        ((45, -90), (0, -math.sqrt(0.5), math.sqrt(0.5))),
    ],
)
def test_axes_point_where_the_documentation_says(
    point: tuple[float, float], vector: tuple[float, float, float]
) -> None:
    np.testing.assert_allclose(unit_vectors(point), vector, atol=1e-15)


@settings(deadline=None)
@given(points)
def test_degrees_survive_the_way_to_a_vector_and_back(point: tuple[float, float]) -> None:
    vector = unit_vectors(point)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-15)
    back = points_deg(3.7 * vector)
    assert abs(back[0]) <= 90
    assert abs(back[1]) <= 180
    assert back[0] == pytest.approx(point[0], abs=1e-13)
    # A metre of longitude is any angle near a pole, and -180 is 180.
    assert haversine_km(point, back) < 1e-9


def test_a_point_a_hair_from_the_pole_keeps_its_latitude() -> None:
    latitude = 90 - 1e-9
    assert points_deg(unit_vectors((latitude, 12.0)))[0] == pytest.approx(latitude, abs=2e-14)


def test_leading_shapes_are_kept() -> None:
    grid = np.random.default_rng(0).uniform(-90, 90, (3, 5, 2))
    assert unit_vectors(grid).shape == (3, 5, 3)
    assert points_deg(unit_vectors(grid)).shape == (3, 5, 2)
    distance = haversine_km(grid, grid[0, 0])
    assert distance.shape == (3, 5)
    assert distance[2, 4] == haversine_km(grid[2, 4], grid[0, 0])


@pytest.mark.parametrize("points_", [[1.0, 2.0, 3.0], [[1.0], [2.0]], 5.0])
def test_what_does_not_end_in_lat_and_lon_is_refused(points_: object) -> None:
    with pytest.raises(ValueError, match=r"must end in \(lat, lon\), got the shape"):
        unit_vectors(points_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ((0, 0), (0, 180), 1),
        ((0, -180), (0, 0), 1),
        ((90, 0), (-90, 0), 1),
        ((90, 10), (-90, -55), 1),
        ((41.5, -3), (-41.5, 177), 1),
        ((0, 0), (0, 90), 1 / 2),
        ((0, 0), (90, 123), 1 / 2),
        ((0, -179.5), (0, 179.5), 1 / 180),
        ((10, 20), (11, 20), 1 / 180),
        ((89.5, 0), (89.5, 180), 1 / 180),
        ((90, -170), (90, 33), 0),
        ((0, 180), (0, -180), 0),
        ((-90, 0), (-90, 180), 0),
        ((52.1, 13.3), (52.1, 13.3), 0),
    ],
)
def test_haversine_of_places_with_a_known_distance(
    a: tuple[float, float], b: tuple[float, float], share: float
) -> None:
    assert haversine_km(a, b) == pytest.approx(share * HALF_WAY_KM, rel=1e-14, abs=1e-11)


def test_the_earth_is_a_ball_of_the_radius_that_the_fields_tables_use() -> None:
    assert EARTH_RADIUS_KM == 6371.0
    # From the equator to the pole.
    assert haversine_km((0, 12), (90, 0)) == pytest.approx(10007.543398010286, rel=1e-15)


def test_a_point_is_exactly_nowhere_from_itself_and_a_millimetre_is_a_millimetre() -> None:
    points_N2 = np.random.default_rng(1).uniform([-89, -180], [89, 180], (1000, 2))
    assert (haversine_km(points_N2, points_N2) == 0).all()
    north_N2 = points_N2 + np.array([1e-8, 0])
    step_N = np.radians(north_N2[:, 0] - points_N2[:, 0])
    np.testing.assert_allclose(haversine_km(north_N2, points_N2), EARTH_RADIUS_KM * step_N, rtol=1e-12)


@settings(deadline=None)
@given(points, points)
def test_haversine_agrees_with_forty_digits(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert haversine_km(a, b) == pytest.approx(exact_km(a, b), rel=1e-13, abs=1e-11)


@settings(deadline=None)
@given(points, st.floats(-1e-6, 1e-6), st.floats(-1e-6, 1e-6))
def test_haversine_keeps_its_digits_close_to_antipodes(point: tuple[float, float], up: float, aside: float) -> None:
    other = (max(-90.0, min(90.0, -point[0] + up)), point[1] + aside + (180 if point[1] < 0 else -180))
    assert haversine_km(point, other) == pytest.approx(exact_km(point, other), rel=1e-14)


@settings(deadline=None)
@given(points, points)
def test_distance_is_symmetric_and_at_most_half_way_round(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert haversine_km(a, b) == haversine_km(b, a)
    assert 0 <= haversine_km(a, b) <= HALF_WAY_KM * (1 + 1e-15)


@settings(deadline=None)
@given(points, points, points)
def test_a_detour_is_never_shorter(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> None:
    assert haversine_km(a, c) <= haversine_km(a, b) + haversine_km(b, c) + 1e-10


def test_distance_from_nowhere_is_nan() -> None:
    distance = haversine_km([[math.nan, 1], [1, math.nan], [1, 1]], (0, 0))
    assert np.isnan(distance).tolist() == [True, True, False]


def test_distances_agree_with_the_fields_own_table() -> None:
    table = SHARED_DATA / "golden" / "osv5m_select.csv"
    if not table.is_file():
        pytest.skip(f"real data is absent: {table}")
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    predicted, true, theirs = (
        np.array([[float(row[name]) for name in names] for row in rows])
        for names in (("pred_lat", "pred_lon"), ("true_lat", "true_lon"), ("distance",))
    )
    assert len(rows) == 50
    np.testing.assert_allclose(haversine_km(predicted, true), theirs[:, 0], rtol=1e-9)


@pytest.mark.parametrize(
    ("points_N2", "mean"),
    [
        ([(10, 20)], (10, 20)),
        ([(0, 179), (0, -179)], (0, 180)),
        ([(0, 170), (0, -150)], (0, -170)),
        ([(80, 0), (80, 180)], (90, 0)),
        ([(0, 0), (0, 90), (90, 0)], (math.degrees(math.atan(math.sqrt(0.5))), 45)),
        ([(-90, 5), (-88, 5)], (-89, 5)),
    ],
)
def test_the_mean_lies_between_its_points_on_the_sphere(
    points_N2: list[tuple[float, float]], mean: tuple[float, float]
) -> None:
    assert haversine_km(spherical_mean(points_N2), mean) < 1e-9


def test_weights_pull_the_mean() -> None:
    assert haversine_km(spherical_mean([(0, 0), (0, 90)], [1, 0]), (0, 0)) < 1e-9
    # The vectors add up to (3, 4, 0).
    assert haversine_km(spherical_mean([(0, 0), (0, 90)], [3, 4]), (0, math.degrees(math.atan2(4, 3)))) < 1e-9
    twice = spherical_mean([(50, 8), (50, 8), (41, 12)])
    np.testing.assert_allclose(spherical_mean([(50, 8), (41, 12)], [2, 1]), twice, rtol=1e-14)


@pytest.mark.parametrize(
    ("points_N2", "weights", "words"),
    [
        ([(0, 0), (0, 180)], None, "the 2 points cancel one another"),
        ([(90, 0), (-90, 0)], None, "cancel"),
        ([(0, 0), (0, 120), (0, -120)], None, "the 3 points cancel"),
        ([(30, 40), (31, 40)], [0, 0], "total weight 0.0 is undefined"),
        (np.empty((0, 2)), None, "the mean of 0 points"),
        ([(30, 40), (math.nan, 40)], None, "finite coordinates"),
        ([(30, 40), (30, 41)], [1, math.nan], "finite weights"),
        ([(30, 40), (30, 41)], [2, -1], "not negative"),
    ],
)
def test_a_mean_that_points_nowhere_is_an_error(points_N2: object, weights: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spherical_mean(points_N2, weights)  # type: ignore[arg-type]
