"""The nearest centroids: the tree, the definition and the interpreted kernel find the same; ties, edges, contracts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from distance_samples import hard_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_builds import SHARED_BYTES, Kernel, build
from kernel_interpreter import interpreted
from torch import Tensor

from geoloc_kernels import nearest, pairwise_km
from geoloc_kernels import nearest_tree as tree_file
from geoloc_kernels.nearest import nearest_definition, nearest_op, place_keys, placed_centroids, placed_points

NAN, INF = float("nan"), float("inf")


def crowd(count: int, seed: int = 0) -> Tensor:
    """Points of which many are one: a third of them stand on few places."""
    points = hard_pairs("random", count, torch.float64)[0][torch.randperm(count, generator=generator(seed))]
    third = count // 3
    points[:third] = points[torch.randint(0, max(1, third // 8), (third,), generator=generator(seed + 1))]
    return points


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_sorting(point_deg: Tensor, centroid_deg: Tensor, k: int) -> Tensor:
    """The ids by all distances in float64, in the order of (distance, id)."""
    vectors = [placed_points(points)[0] for points in (point_deg, centroid_deg)]
    squares = (vectors[0][:, None] - vectors[1][None]).square().sum(dim=-1)
    return squares.argsort(dim=1, stable=True)[:, :k]


@pytest.mark.parametrize("k", [1, 2, 5, 40, 500])
@pytest.mark.parametrize("num_centroids", [1, 2, 33, 400])
def test_ids_are_those_of_sorted_distances(num_centroids: int, k: int) -> None:
    point_deg, centroid_deg = crowd(150), crowd(num_centroids, seed=3)
    point_deg[: min(50, num_centroids)] = centroid_deg[:50]
    expected = by_sorting(point_deg, centroid_deg, k)
    id_NK, km_NK = nearest(point_deg, centroid_deg, k)
    assert torch.equal(id_NK, expected)
    assert torch.equal(nearest_definition(point_deg, centroid_deg, k), expected)
    assert (km_NK - pairwise_km(point_deg, centroid_deg).gather(1, id_NK)).abs().max() < 1e-8
    assert (km_NK.diff(dim=1) >= -1e-9).all()


def test_the_definition_finds_the_same_over_many_blocks() -> None:
    point_deg, centroid_deg = crowd(23), crowd(40_000, seed=5)
    centroid_deg[39_990:] = centroid_deg[:10]
    point_deg[:10] = centroid_deg[:10]
    for k in (1, 3, 12):
        assert torch.equal(nearest_definition(point_deg, centroid_deg, k), nearest(point_deg, centroid_deg, k).id_NK)


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-3, 3)), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-3, 3)), min_size=1, max_size=30),
    st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_the_lowest_id_comes_first_among_equals(
    points: list[tuple[int, int]], centroids: list[tuple[int, int]], k: int
) -> None:
    # Duplicates on a coarse grid: whole groups are equally near, and more of them than are kept.
    point_deg, centroid_deg = torch.tensor(points) * 45.0, torch.tensor(centroids) * torch.tensor([40.0, 50.0])
    id_NK = nearest(point_deg, centroid_deg, k).id_NK
    square_NC = (placed_points(point_deg)[0][:, None] - placed_points(centroid_deg)[0][None]).square().sum(dim=-1)
    for row, ids in enumerate(id_NK.tolist()):
        found = square_NC[row, ids]
        assert len(set(ids)) == len(ids) == min(k, len(centroids))
        assert (found.diff() >= -1e-12).all()
        assert found[-1] <= square_NC[row].sort().values[len(ids) - 1] + 1e-12
        for place in set(centroids):
            same = [i for i, centroid in enumerate(centroids) if centroid == place]
            kept = [i for i in ids if i in same]
            assert kept == same[: len(kept)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_nobodys_neighbour(dtype: torch.dtype) -> None:
    point_deg = torch.tensor([[0, 0], [NAN, 0], [0, INF], [10, 10]], dtype=dtype)
    centroid_deg = torch.tensor([[NAN, 0], [9, 9], [INF, 1], [1, 1]], dtype=dtype)
    for ids in (nearest(point_deg, centroid_deg, 3).id_NK, nearest_definition(point_deg, centroid_deg, 3)):
        assert ids.tolist() == [[3, 1, -1], [-1, -1, -1], [-1, -1, -1], [1, 3, -1]]
    km_NK = nearest(point_deg, centroid_deg, 3).km_NK
    assert km_NK.dtype == dtype
    assert km_NK.isnan().tolist() == [[False, False, True], [True] * 3, [True] * 3, [False, False, True]]
    assert nearest(point_deg, centroid_deg[:1]).id_NK.tolist() == [[-1]] * 4


def test_points_across_the_antimeridian_and_at_poles_find_each_other() -> None:
    centroid_deg = torch.tensor([[0.0, 179.9], [0.0, -179.8], [89.9, 0.0], [-89.9, 120.0]])
    point_deg = torch.tensor([[0.0, -179.99], [0.0, 179.0], [89.95, 180.0], [-90.0, 0.0], [0.0, 540.0]])
    assert nearest(point_deg, centroid_deg).id_NK.flatten().tolist() == [0, 0, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_points_give_no_rows(dtype: torch.dtype) -> None:
    found = nearest(torch.empty(0, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype), 2)
    assert found.id_NK.shape == found.km_NK.shape == (0, 2)


def test_points_need_not_be_contiguous() -> None:
    point_deg, centroid_deg = crowd(90), crowd(60, seed=1)
    apart = torch.stack([point_deg, point_deg], dim=-1)[::3, :, 0]
    assert torch.equal(
        nearest(apart, centroid_deg.T.contiguous().T, 4).id_NK, nearest(point_deg, centroid_deg, 4)[0][::3]
    )


def test_a_tree_of_other_centroids_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_file, "_last", None)
    point_deg, centroid_deg = crowd(30), crowd(60, seed=1)
    first = nearest(point_deg, centroid_deg, 2).id_NK
    kept = tree_file._last
    assert torch.equal(nearest(point_deg, centroid_deg.clone(), 2).id_NK, first)
    assert tree_file._last is kept
    centroid_deg.copy_(centroid_deg.flip(0))
    assert torch.equal(nearest(point_deg, centroid_deg, 2).id_NK, by_sorting(point_deg, centroid_deg, 2))


def test_without_scipy_the_definition_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    point_deg, centroid_deg = crowd(30), crowd(60, seed=1)
    expected = nearest(point_deg, centroid_deg, 3).id_NK
    monkeypatch.delitem(sys.modules, "geoloc_kernels.nearest_tree")
    monkeypatch.delattr("geoloc_kernels.nearest_tree")
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    assert torch.equal(nearest(point_deg, centroid_deg, 3).id_NK, expected)


@pytest.mark.parametrize(
    ("point_deg", "centroid_deg", "k", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(0, 2), 1, "centroids_deg_C2 is empty"),
        (torch.zeros(3, 2), torch.zeros(4, 2), 0, "k must be at least 1, got 0"),
        (torch.zeros(2), torch.zeros(4, 2), 1, "points_deg_N2 must be"),
        (torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.float64), 1, "in one precision"),
        (torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.float16), 1, "must be float32 or float64"),
    ],
)
def test_questions_without_an_answer_are_refused(point_deg: Tensor, centroid_deg: Tensor, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nearest(point_deg, centroid_deg, k)


def test_kilometres_have_a_gradient_and_the_graph_is_whole() -> None:
    point_deg, centroid_deg = crowd(8).requires_grad_(), crowd(30, seed=1).requires_grad_()
    compiled = torch.compile(nearest, fullgraph=True, backend="aot_eager")
    for found in (nearest(point_deg, centroid_deg, 2), compiled(point_deg, centroid_deg, 2)):
        assert torch.equal(found.id_NK, by_sorting(point_deg.detach(), centroid_deg.detach(), 2))
        grads = torch.autograd.grad(found.km_NK.sum(), (point_deg, centroid_deg))
        expected = torch.autograd.grad(
            pairwise_km(point_deg, centroid_deg).gather(1, found.id_NK).sum(), (point_deg, centroid_deg)
        )
        for grad, other in zip(grads, expected, strict=True):
            assert torch.allclose(grad, other)


@pytest.mark.parametrize(("num_points", "k"), [(7, 3), (7, 50), (0, 1), (1, 1)])
def test_the_op_keeps_its_contract(num_points: int, k: int) -> None:
    torch.library.opcheck(nearest_op, (crowd(7)[:num_points], crowd(9, seed=1), k))


def test_keys_bring_neighbours_together() -> None:
    vector_N3 = placed_points(crowd(500))[0]
    key_N = place_keys(vector_N3)
    assert (key_N >= 0).all()
    # Bit by bit: x lowest, then y, then z.
    for row in range(0, 500, 50):
        cells = ((vector_N3[row] + 1) * 2**20).long().tolist()
        bits = [(cell >> bit & 1) << (3 * bit + axis) for axis, cell in enumerate(cells) for bit in range(21)]
        assert key_N[row] == sum(bits)
    steps = [vector_N3[order].diff(dim=0).norm(dim=1).mean() for order in (key_N.argsort(), torch.arange(500))]
    assert steps[0] < 0.3 * steps[1]


def test_the_kernel_finds_what_the_definition_finds(tmp_path: Path) -> None:
    cases = [(1, 1, 1), (0, 5, 2), (37, 1, 3), (40, 700, 1), (33, 700, 5), (17, 33, 32), (20, 20_000, 10)]
    questions = []
    for num_points, num_centroids, k in cases:
        point_deg, centroid_deg = crowd(num_points), crowd(num_centroids, seed=1)
        if num_centroids >= 700:
            centroid_deg[300:400], centroid_deg[9] = centroid_deg[5], NAN
            point_deg[:4] = centroid_deg[5]
        if num_centroids > 10_000:
            # Points of one town: programs look at few of the 313 tiles, whose bounds they take in two turns.
            point_deg = torch.tensor([48.0, 2.0]) + point_deg / 400
        questions.append((point_deg, centroid_deg, k))
    # Two rows of 64, east and west of one point: a tile each, the nearest in turns from the one and from the other.
    way_deg = 10 + torch.arange(128, dtype=torch.float64) / 100
    east_and_west = torch.stack([torch.zeros(128), way_deg * torch.tensor([1.0, -1.0]).repeat(64)], dim=1)
    questions.append((torch.zeros(1, 2, dtype=torch.float64), east_and_west, 6))
    calls = [
        ("triton_nearest.launch_nearest", (placed_points(point_deg)[0], placed_centroids(centroid_deg), k))
        for point_deg, centroid_deg, k in questions
    ]
    for question, found in zip(questions, interpreted(calls, tmp_path), strict=True):
        assert torch.equal(found, nearest_definition(*question))


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.slow)]
)
def test_the_kernel_fits_a_chip(capability: int) -> None:
    from geoloc_kernels.triton_nearest import warps_for

    types = dict.fromkeys(["point_ptr", "centroid_ptr", "ball_ptr"], "*fp64") | {"id_ptr": "*i32"}
    types |= dict.fromkeys(["order_ptr", "out_ptr"], "*i64") | dict.fromkeys(["num_points", "num_tiles"], "i32")
    kernels = []
    for k in (1, 2, 3, 5, 10, 32):
        slots = 1 << (k - 1).bit_length()
        constants = {"k": k, "K": slots, "Q": 16, "T": 64, "S": 256}
        kernel = Kernel("triton_nearest.nearest_kernel", types, constants, capability, warps_for(slots))
        kernels.append(kernel._replace(divisible=[*types][:6]))
    for kernel, made in zip(kernels, build(kernels), strict=True):
        assert made.stack_bytes <= 16, kernel
        assert made.registers <= 255, kernel
        assert made.shared_bytes <= SHARED_BYTES[capability], kernel
