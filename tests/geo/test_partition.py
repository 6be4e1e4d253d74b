"""Partitions: the file as published, its errors, the fingerprint, the nearest cell."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.sphere import haversine_km

Cells = dict[str, dict[str, Any]]


def cells_of(*centroids: tuple[float, float]) -> Cells:
    return {str(i): {"centroid_lat": lat, "centroid_lon": lon} for i, (lat, lon) in enumerate(centroids)}


def write(folder: Path, cells: object) -> Path:
    path = folder / "geocell_info.json"
    path.write_text(cells if isinstance(cells, str) else json.dumps(cells), encoding="utf-8")
    return path


def partition_of(*centroids: tuple[float, float], first_id: int = 0) -> Partition:
    return Partition(ids=np.arange(len(centroids)) + first_id, centroids_deg=np.array(centroids, dtype=np.float64))


def refused(path: Path, words: str) -> str:
    with pytest.raises(PartitionError, match=words) as caught:
        load_partition(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250
    return str(caught.value)


def test_cells_come_in_ascending_order_of_their_ids_as_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "10": {"centroid_lat": 10.5, "centroid_lon": -10.25, "name": "ten"},
            "9": {"centroid_lat": -9, "centroid_lon": 180, "name": "nine"},
            "2": {"centroid_lon": 2.125, "name": "Zürich", "centroid_lat": 90},
        },
    )
    partition = load_partition(path)
    assert partition.ids.tolist() == [2, 9, 10]
    assert partition.centroids_deg.tolist() == [[90, 2.125], [-9, 180], [10.5, -10.25]]
    assert partition.names == ["Zürich", "nine", "ten"]
    assert len(partition) == 3
    assert partition.source == str(path)


def test_a_saved_partition_comes_back_with_all_it_held(tmp_path: Path) -> None:
    cells = cells_of((48.123456789012345, 2 / 3), (-0.1, -179.99999999999997), (90.0, 0.0))
    cells["1"] |= {"h3": "841fb47ffffffff", "count": 17, "country": ["FR", None], "name": "Île"}
    first = load_partition(write(tmp_path, cells))
    first.save(tmp_path / "copy.json")
    second = load_partition(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == cells
    assert second == first
    assert second.details == first.details
    assert second.centroids_deg.tobytes() == first.centroids_deg.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.json", "geocell_info.json"]


def test_names_are_none_unless_every_cell_has_one(tmp_path: Path) -> None:
    cells = cells_of((1, 2), (3, 4))
    assert load_partition(write(tmp_path, cells)).names is None
    cells["0"]["name"] = "one"
    assert load_partition(write(tmp_path, cells)).names is None


def test_a_detail_that_json_cannot_hold_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = write(tmp_path, '{"0": {"centroid_lat": 1, "centroid_lon": 2, "area": NaN}}')
    before = path.read_bytes()
    with pytest.raises(PartitionError, match=r"geocell_info.json: the details of a cell cannot be written as JSON"):
        load_partition(path).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("", r"is not JSON"),
        ("{", r"is not JSON"),
        ("id,lat,lon\n0,1,2\n", r"is not JSON"),
        ("[" * 100_000, r"is not JSON"),
        ("{}", r"holds no cell"),
        ([{"centroid_lat": 1, "centroid_lon": 2}], r"must hold an object of cells, not a list"),
        ("7", r"must hold an object of cells, not a int"),
        ({"0": [1, 2]}, r"cell 0 must be an object with centroid_lat and centroid_lon, not \[1, 2\]"),
        ({"0": list(range(1000))}, r"cell 0 must be an object .* not \[0, 1.*\.\.\.$"),
        ({"5": {"centroid_lat": 1}}, r"cell 5 has no centroid_lon"),
        ({"5": {"lat": 1, "lon": 2}}, r"cell 5 has no centroid_lat"),
        ({"5": {"centroid_lat": 90.5, "centroid_lon": 2}}, r"cell 5 has centroid_lat 90.5, beyond 90"),
        ({"5": {"centroid_lat": 9, "centroid_lon": -180.5}}, r"cell 5 has centroid_lon -180.5, beyond 180"),
        ({"5": {"centroid_lat": math.nan, "centroid_lon": 2}}, r"cell 5 has centroid_lat nan, which is no number"),
        ({"5": {"centroid_lat": 9, "centroid_lon": -math.inf}}, r"cell 5 has centroid_lon -inf, beyond 180"),
        ({"5": {"centroid_lat": True, "centroid_lon": 2}}, r"cell 5 has centroid_lat True, which is no number"),
        ({"5": {"centroid_lat": "48.1", "centroid_lon": 2}}, r"cell 5 has centroid_lat '48.1', which is no number"),
        ({"5": {"centroid_lat": 1, "centroid_lon": None}}, r"cell 5 has centroid_lon None, which is no number"),
        ({"5": {"centroid_lat": 10**400, "centroid_lon": 2}}, r"cell 5 has centroid_lat 1000.*\.\.\., beyond 90"),
        ({"five": {"centroid_lat": 1, "centroid_lon": 2}}, r"'five' is no id of a cell: ids are whole numbers"),
        ({"-1": {"centroid_lat": 1, "centroid_lon": 2}}, r"'-1' is no id of a cell"),
        ({"1.0": {"centroid_lat": 1, "centroid_lon": 2}}, r"'1.0' is no id"),
        ({"٣": {"centroid_lat": 1, "centroid_lon": 2}}, r"is no id"),
        ({"2147483648": {"centroid_lat": 1, "centroid_lon": 2}}, r"'2147483648' is no id .* to 2147483647"),
        ({key: {"centroid_lat": 1, "centroid_lon": 2} for key in ("1", "01")}, r"the id 1 stands twice"),
        (
            '{"3": {"centroid_lat": 1, "centroid_lon": 2}, "3": {"centroid_lat": 1, "centroid_lon": 2}}',
            r"'3' stands twice in one object",
        ),
        (
            '{"3": {"centroid_lat": 1, "centroid_lon": 2, "centroid_lat": 4}}',
            r"'centroid_lat' stands twice in one object",
        ),
    ],
)
def test_a_file_that_is_no_partition_is_refused_by_file_id_and_value(tmp_path: Path, cells: object, words: str) -> None:
    refused(write(tmp_path, cells), words)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.json", r"no such file of cells: .*absent.json; give a geocell_info.json")
    refused(tmp_path, r"cannot be read as a geocell_info.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "bytes.json", r"cannot be read as a geocell_info.json")


@pytest.mark.parametrize(
    ("ids", "centroids", "words"),
    [
        ([], np.empty((0, 2)), "holds no cell"),
        ([0, 1], [[1.0, 2.0]], r"2 ids do not fit centroids of shape \(1, 2\)"),
        ([0], [[1.0, 2.0, 3.0]], r"1 ids do not fit"),
        ([1, 0], [[1.0, 2.0], [3.0, 4.0]], "ids must ascend"),
        ([1, 1], [[1.0, 2.0], [3.0, 4.0]], "without repeats"),
        ([-1, 0], [[1.0, 2.0], [3.0, 4.0]], "from 0 or more"),
        ([0, 4], [[1.0, 2.0], [91.0, 4.0]], r"cell 4 has its centroid at \(91.0, 4.0\)"),
        ([0, 4], [[1.0, math.nan], [1.0, 4.0]], r"cell 0 has its centroid at \(1.0, nan\)"),
    ],
)
def test_a_partition_made_in_memory_is_held_to_the_same(ids: list[int], centroids: Any, words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        Partition(ids=np.array(ids, dtype=np.int64), centroids_deg=np.array(centroids, dtype=np.float64))


def test_details_must_be_of_as_many_cells() -> None:
    with pytest.raises(PartitionError, match="1 ids, but details of 2 cells"):
        Partition(ids=np.arange(1), centroids_deg=np.zeros((1, 2)), details=[{}, {}])


def test_a_partition_cannot_change_and_leaves_its_makers_arrays_alone() -> None:
    ids, centroids = np.arange(2), np.array([[1.0, 2.0], [3.0, 4.0]])
    partition = Partition(ids=ids, centroids_deg=centroids)
    fingerprint = partition.fingerprint
    centroids[0, 0] = 50
    ids[1] = 7
    assert partition.centroids_deg[0, 0] == 1
    assert partition.ids.tolist() == [0, 1]
    assert partition.fingerprint == fingerprint
    with pytest.raises(ValueError, match="read-only"):
        partition.centroids_deg[0, 0] = 50


def test_the_fingerprint_is_the_same_for_the_same_cells_however_they_are_written(tmp_path: Path) -> None:
    cells = cells_of((48.5, 2.0), (0.0, 10.0), (51, 13))
    fingerprint = load_partition(write(tmp_path, cells)).fingerprint
    others: list[object] = [
        dict(reversed(cells.items())),
        json.dumps(cells, indent=3),
        {key: {**cell, "name": "x", "count": 3} for key, cell in cells.items()},
        {f"00{key}": cell for key, cell in cells.items()},
        cells_of((48.5, 2), (-0.0, 1e1), (51.0, 13.0)),
    ]
    for other in others:
        again = load_partition(write(tmp_path, other))
        assert again.fingerprint == fingerprint
        assert again == load_partition(write(tmp_path, cells))
        assert hash(again) == hash(load_partition(write(tmp_path, cells)))
    assert len(fingerprint) == 64


def test_the_fingerprint_of_a_partition_never_changes_between_versions() -> None:
    # It is pinned in runs and written into heads: another value here makes those useless.
    partition = partition_of((48.5, 2.0), (-33.25, 151.125))
    assert partition.fingerprint == "6e088ec05f54a66c71dadaecc2bcd1587686666b286ed3ce49d2ed6e8668a93d"


@pytest.mark.parametrize(
    "centroids",
    [
        [(48.5, 2.0), (0.0, 10.0)],
        [(48.5, 2.0), (0.0, 10.0), (51.0, 13.000000000000002)],
        [(48.5, 2.0), (0.0, 10.0), (13.0, 51.0)],
        [(0.0, 10.0), (48.5, 2.0), (51.0, 13.0)],
        [(48.5, 2.0), (0.0, -10.0), (51.0, 13.0)],
    ],
)
def test_the_fingerprint_changes_with_every_centroid_and_its_place(centroids: list[tuple[float, float]]) -> None:
    base = partition_of((48.5, 2.0), (0.0, 10.0), (51.0, 13.0))
    assert partition_of(*centroids).fingerprint != base.fingerprint
    assert partition_of(*centroids) != base


def test_the_fingerprint_changes_with_the_ids() -> None:
    centroids = [(48.5, 2.0), (0.0, 10.0)]
    assert partition_of(*centroids, first_id=1).fingerprint != partition_of(*centroids).fingerprint


def nearest_by_force(partition: Partition, point_deg_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] kilometres to the nearest centroid, from all distances."""
    return haversine_km(point_deg_N2[:, None], partition.centroids_deg[None]).min(axis=1)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(2)), elements=st.floats(-1, 1)),
    hnp.arrays(np.float64, st.tuples(st.integers(0, 9), st.just(2)), elements=st.floats(-1, 1)),
)
def test_every_point_goes_to_a_centroid_than_which_none_is_nearer(
    centroids: NDArray[np.float64], points: NDArray[np.float64]
) -> None:
    partition = Partition(ids=3 * np.arange(len(centroids)) + 5, centroids_deg=centroids * [90, 180])
    points = points * [90, 180]
    ids = partition.assign(points[:, 0], points[:, 1])
    assert ids.dtype == np.int64
    assert ids.shape == (len(points),)
    chosen = np.searchsorted(partition.ids, ids)
    assert (partition.ids[chosen] == ids).all()
    if len(points):
        own = haversine_km(points, partition.centroids_deg[chosen])
        np.testing.assert_allclose(own, nearest_by_force(partition, points), rtol=0, atol=1e-6)


def test_many_points_all_round_the_globe_agree_with_brute_force() -> None:
    rng = np.random.default_rng(4)
    centroids = rng.uniform([-90, -180], [90, 180], (257, 2))
    # A band along the antimeridian and both caps, where latitude and longitude mislead.
    centroids[:60, 1] = np.where(rng.random(60) < 0.5, 1, -1) * rng.uniform(178, 180, 60)
    centroids[60:90, 0] = np.where(rng.random(30) < 0.5, 1, -1) * rng.uniform(88, 90, 30)
    partition = Partition(ids=np.arange(257), centroids_deg=centroids)
    points = rng.uniform([-90, -180], [90, 180], (3000, 2))
    points[:700, 1] = np.where(rng.random(700) < 0.5, 1, -1) * rng.uniform(179, 180, 700)
    points[700:1400, 0] = np.where(rng.random(700) < 0.5, 1, -1) * rng.uniform(89, 90, 700)
    expected = haversine_km(points[:, None], centroids[None]).argmin(axis=1)
    assert (partition.assign(points[:, 0], points[:, 1]) == expected).all()


@pytest.mark.parametrize(
    ("point", "cell"),
    [((0, -179.9), 0), ((0, 179.9), 0), ((89, -90), 1), ((90, 45), 1), ((0, 178), 0), ((-90, 0), 2), ((5, 5), 2)],
)
def test_the_antimeridian_and_the_poles_are_no_borders(point: tuple[float, float], cell: int) -> None:
    partition = partition_of((0, 179), (87, 90), (0, 0))
    assert partition.assign([point[0]], [point[1]]).tolist() == [cell]


def test_among_cells_at_one_place_the_lowest_id_is_taken() -> None:
    same = [(50.0, 8.0)] * 20 + [(0.0, 180.0), (0.0, -180.0), (90.0, 10.0), (90.0, -60.0), (0.0, 0.0), (-0.0, 0.0)]
    partition = partition_of(*reversed(same), first_id=100)
    points = np.array([(50.0, 8.0), (49.0, 9.0), (0.0, -180.0), (0.0, 180.0), (90.0, 0.0), (0.0, 0.0)])
    assert partition.assign(points[:, 0], points[:, 1]).tolist() == [106, 106, 104, 104, 102, 100]


@pytest.mark.parametrize(
    ("lat", "lon", "words"),
    [
        ([1.0, math.nan, 2.0], [1.0, 1.0, 1.0], r"point 1 is no place on Earth: lat nan, lon 1.0 \(1 such points\)"),
        ([1.0, 91.0, 99.0], [1.0, 1.0, 1.0], r"point 1 is no place on Earth: lat 91.0, lon 1.0 \(2 such points\)"),
        ([1.0], [-180.1], r"point 0 .* lon -180.1"),
        ([1.0], [math.inf], r"point 0 .* lon inf"),
        ([1.0, 2.0], [1.0], r"two lists of one length, got the shapes \(2,\), \(1,\)"),
        (1.0, 1.0, r"two lists of one length"),
    ],
)
def test_a_point_that_is_no_place_is_named_and_gets_no_cell(lat: object, lon: object, words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        partition_of((0, 0), (1, 1)).assign(lat, lon)  # type: ignore[arg-type]


def test_no_slow_library_is_imported_before_it_is_needed() -> None:
    code = (
        "import geoloc_batch.geo.partition, geoloc_batch.geo.cells.commands, geoloc_batch.geo.located, sys; "
        "import geoloc_batch.geo.cells.h3, geoloc_batch.geo.cells.kmeans, geoloc_batch.geo.cells.polygons; "
        "import geoloc_batch.geo.cells.kdtree, geoloc_batch.geo.cells.quadtree, geoloc_batch.geo.cells.map; "
        "slow = ('torch', 'scipy', 'h3', 'shapely', 'faiss', 'pyarrow', 'matplotlib'); "
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
