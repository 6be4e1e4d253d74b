"""Distances: their errors against forty digits, gradients, the ops' contracts, the real kernels interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distance_samples import CASES, error_m, exact_km, hard_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_builds import SHARED_BYTES, Kernel, build
from kernel_interpreter import interpreted
from torch import Tensor

from geoloc_kernels import EARTH_RADIUS_KM, great_circle_km, pairwise_km
from geoloc_kernels.great_circle import paired_op, pairwise_backward_op, pairwise_op
from geoloc_kernels.haversine import distance_km

NAN, INF = float("nan"), float("inf")
COUNT = 600

# Metres off, anywhere and within a kilometre.
TOLERANCES = {torch.float32: (3.5, 0.002), torch.float64: (1e-5, 1e-8)}

# Each beside others that are itself by another name, close to it, or its antipode.
SPECIAL_DEG = [
    [0.0, 0.0], [0.0, 180.0], [0.0, -180.0], [90.0, 0.0], [90.0, 77.0], [-90.0, 10.0], [10.0, 180.0], [10.0, -180.0],
    [-10.0, 0.0], [45.0, 540.0], [45.0, 180.0], [-45.0, 0.0], [45.0, 45.0], [89.99999, 3.0], [-89.99999, -177.0],
    [1e-6, 1e-6], [-1e-6, -179.999995],
]  # fmt: skip


def all_pairs_of_blocks(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Distances of mates, by `pairwise_km`."""
    parts = zip(a_deg.split(100), b_deg.split(100), strict=True)
    return torch.cat([pairwise_km(a, b).diagonal() for a, b in parts])


def all_pairs_of_one(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Distances of mates, by `pairwise_km` of nothing else: no closer pair decides how they are taken."""
    return torch.cat([pairwise_km(a, b)[0] for a, b in zip(a_deg.split(1), b_deg.split(1), strict=True)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("way", [great_circle_km, all_pairs_of_blocks, all_pairs_of_one])
def test_a_distance_is_off_by_no_more_than_its_precision_allows(
    way: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, case: str
) -> None:
    a_deg, b_deg = hard_pairs(case, COUNT, dtype)
    check_error(way(a_deg, b_deg), a_deg, b_deg)


def check_error(km: Tensor, a_deg: Tensor, b_deg: Tensor) -> None:
    exact = exact_km(a_deg, b_deg)
    off_m = error_m(km, exact)
    anywhere, close = TOLERANCES[km.dtype]
    is_close = torch.tensor([distance <= 1 for distance in exact])
    assert off_m.max() <= anywhere
    assert not is_close.any() or off_m[is_close].max() <= close


@given(
    st.lists(st.tuples(st.floats(-90, 90), st.floats(-720, 720)), min_size=1, max_size=5),
    st.lists(st.tuples(st.floats(-90, 90), st.floats(-720, 720)), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_all_pairs_are_the_pairs_one_by_one(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    a_deg, b_deg = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    km = pairwise_km(a_deg, b_deg)
    assert (km - distance_km(a_deg[:, None], b_deg[None])).abs().max() < 1e-8
    assert torch.equal(km.T, pairwise_km(b_deg, a_deg))
    assert (pairwise_km(a_deg, a_deg).diagonal() == 0).all()


def test_blocks_leave_no_seam() -> None:
    generator = torch.Generator().manual_seed(0)
    a_deg, b_deg = (torch.rand(n, 2, generator=generator).mul(180).sub(90).double() for n in (70, 9001))
    assert (pairwise_km(a_deg, b_deg) - distance_km(a_deg[:, None], b_deg[None])).abs().max() < 1e-8
    paired = great_circle_km(a_deg[:, None], b_deg[None, :2001])
    assert torch.equal(paired, distance_km(a_deg[:, None], b_deg[None, :2001]))
    points = [a_deg.requires_grad_(), b_deg.requires_grad_()]
    grads = torch.autograd.grad(pairwise_km(*points).square().sum(), points)
    expected = torch.autograd.grad(great_circle_km(a_deg[:, None], b_deg[None]).square().sum(), points)
    for grad, other in zip(grads, expected, strict=True):
        assert torch.allclose(grad, other)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_one_place_by_two_names_is_no_distance(dtype: torch.dtype) -> None:
    names = [([10, 180], [10, -180]), ([90, 5], [90, -120]), ([-90, 0], [-90, 180]), ([45, 540], [45, -180])]
    a_deg, b_deg = (torch.tensor(side, dtype=dtype) for side in zip(*names, strict=True))
    assert great_circle_km(a_deg, b_deg).tolist() == [0, 0, 0, 0]
    assert pairwise_km(a_deg, b_deg).diagonal().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_points_that_are_not_finite_give_nan_and_leave_others_alone(dtype: torch.dtype) -> None:
    a_deg = torch.tensor([[1, NAN], [NAN, 1], [INF, 2], [3, -INF], [1, 2]], dtype=dtype)
    b_deg = torch.tensor([[1, 3], [-1.00001, -178]], dtype=dtype)
    paired, pairwise = great_circle_km(a_deg, b_deg[0]), pairwise_km(a_deg, b_deg)
    assert paired.isnan().tolist() == [True, True, True, True, False]
    assert torch.equal(pairwise.isnan(), paired.isnan()[:, None].expand(5, 2))
    # Nearly the antipode, in the block of the NaN: the definition's digits all the same.
    off_m = error_m(pairwise[4:, 1], exact_km(a_deg[4:], b_deg[1:]))
    assert off_m <= {torch.float32: 1, torch.float64: 1e-5}[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("num_a", "num_b"), [(0, 3), (3, 0), (1, 1), (1, 5)])
def test_no_points_and_one_point_work(num_a: int, num_b: int, dtype: torch.dtype) -> None:
    a_deg, b_deg = torch.zeros(num_a, 2, dtype=dtype), torch.ones(num_b, 2, dtype=dtype)
    km = pairwise_km(a_deg, b_deg)
    assert km.shape == (num_a, num_b)
    assert km.dtype == dtype
    assert great_circle_km(a_deg, a_deg).shape == (num_a,)


def test_points_need_not_be_contiguous() -> None:
    a_deg, b_deg = hard_pairs("random", 60, torch.float64)
    apart = torch.stack([a_deg, b_deg], dim=-1)[::2]
    assert torch.equal(great_circle_km(apart[..., 0], apart[..., 1]), great_circle_km(a_deg, b_deg)[::2])
    assert torch.equal(pairwise_km(apart[..., 0], apart[..., 1]), pairwise_km(a_deg[::2], b_deg[::2]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_ops_keep_their_promises_for_points_in_any_layout() -> None:
    sides = [side.reshape(5, 3, 2).transpose(0, 1) for side in hard_pairs("random", 15, torch.float64)]
    columns = [side.T.contiguous().T for side in hard_pairs("random", 7, torch.float64)]
    torch.library.opcheck(paired_op, tuple(sides))
    torch.library.opcheck(pairwise_op, tuple(columns))
    torch.library.opcheck(pairwise_backward_op, (torch.ones(7, 7, dtype=torch.float64), *columns))


@pytest.mark.slow
def test_points_in_any_layout_go_through_whole_compiled_graphs() -> None:
    def total(a_deg: Tensor, b_deg: Tensor) -> Tensor:
        return great_circle_km(a_deg, b_deg).mean() + pairwise_km(a_deg.flatten(0, -2), b_deg.flatten(0, -2)).mean()

    sides = [side.reshape(5, 3, 2).transpose(0, 1) for side in hard_pairs("random", 15, torch.float64)]
    columns = [side.T.contiguous().T for side in hard_pairs("random", 7, torch.float64)]
    compiled = torch.compile(total, fullgraph=True)
    for points in (sides, columns):
        points = [side.detach().requires_grad_() for side in points]
        own = torch.autograd.grad(total(*points), points)
        for grad, expected in zip(torch.autograd.grad(compiled(*points), points), own, strict=True):
            assert torch.allclose(grad, expected, rtol=1e-12)


def test_gradients_between_the_closest_points_that_float32_can_tell_apart_are_finite() -> None:
    a_deg = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1e-38]], requires_grad=True)
    b_deg = torch.tensor([[1e-38, 0.0], [0.0, 1e-40], [1e-38, 0.0]])
    (grad,) = torch.autograd.grad(great_circle_km(a_deg, b_deg).sum(), a_deg)
    assert grad.isfinite().all()
    assert (grad.norm(dim=1) <= 111.2).all()


def test_gradients_are_those_of_differences() -> None:
    a_deg, b_deg = (side.requires_grad_() for side in hard_pairs("random", 12, torch.float64))
    assert torch.autograd.gradcheck(great_circle_km, (a_deg, b_deg))
    assert torch.autograd.gradcheck(pairwise_km, (a_deg, b_deg[:5].detach().requires_grad_()))
    assert torch.autograd.gradcheck(great_circle_km, (a_deg, b_deg[:1].detach().requires_grad_()))


@pytest.mark.parametrize("case", ["close", "antipodes"])
def test_float32_gradients_keep_their_direction_where_distances_are_small(case: str) -> None:
    a_deg, b_deg = hard_pairs(case, 300, torch.float32)
    if case == "antipodes":
        # Closer than that, longitudes 180 degrees apart differ by a rounding error of a metre.
        missed = great_circle_km(a_deg.double(), b_deg.double()) < torch.pi * EARTH_RADIUS_KM - 10
        a_deg, b_deg = a_deg[missed], b_deg[missed]
    grads = []
    for dtype in (torch.float32, torch.float64):
        point = a_deg.clone().to(dtype).requires_grad_()
        great_circle_km(point, b_deg.to(dtype)).sum().backward()
        assert point.grad is not None
        grads.append(point.grad.double())
    # Of 111 km a degree.
    assert (grads[0] - grads[1]).abs().max() < 0.03


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_are_finite_at_every_special_place(dtype: torch.dtype) -> None:
    a_deg = torch.tensor(SPECIAL_DEG, dtype=dtype, requires_grad=True)
    b_deg = torch.tensor(SPECIAL_DEG, dtype=dtype, requires_grad=True)
    paired = great_circle_km(a_deg[:, None], b_deg[None])
    pairwise = pairwise_km(a_deg, b_deg)
    assert paired.isfinite().all()
    assert pairwise.isfinite().all()
    limit = len(SPECIAL_DEG) * EARTH_RADIUS_KM * torch.pi / 180 * 1.001
    one_by_one = torch.autograd.grad(paired.sum(), (a_deg, b_deg))
    for grad, other in zip(torch.autograd.grad(pairwise.sum(), (a_deg, b_deg)), one_by_one, strict=True):
        assert grad.isfinite().all()
        assert grad.abs().max() <= limit
        assert (grad - other).abs().max() < 1e-3
    self_grad = torch.autograd.grad(great_circle_km(a_deg, a_deg.detach()).sum(), a_deg)[0]
    assert (self_grad == 0).all()


# opcheck itself reads the gradients of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_the_ops_keep_their_contracts() -> None:
    a_deg, b_deg = hard_pairs("random", 12, torch.float64)
    a_deg, b_deg, some_deg = a_deg.requires_grad_(), b_deg.requires_grad_(), b_deg[:5].detach().requires_grad_()
    torch.library.opcheck(paired_op, (a_deg, b_deg))
    torch.library.opcheck(pairwise_op, (a_deg, some_deg))
    grad = torch.ones(12, 5, dtype=torch.float64)
    torch.library.opcheck(pairwise_backward_op, (grad, a_deg.detach(), some_deg.detach()))


def test_a_loss_of_distances_compiles_in_one_graph() -> None:
    def loss(a_deg: Tensor, b_deg: Tensor) -> Tensor:
        return great_circle_km(a_deg, b_deg).mean() + pairwise_km(a_deg, b_deg).square().mean()

    a_deg, b_deg = (side.requires_grad_() for side in hard_pairs("random", 12, torch.float32))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(a_deg, b_deg)
    plain = loss(a_deg, b_deg)
    assert torch.equal(compiled, plain)
    expected = torch.autograd.grad(plain, (a_deg, b_deg))
    for grad, other in zip(torch.autograd.grad(compiled, (a_deg, b_deg)), expected, strict=True):
        assert torch.allclose(grad, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("a_deg", "b_deg", "words"),
    [
        (torch.zeros(3, 3), torch.zeros(3, 2), "a_deg must be .* got the shape"),
        (torch.zeros(3, 2), torch.zeros(4, 2), "do not pair"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64), "in one precision"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), "b_deg must be float32 or float64, got torch.int64"),
        (torch.zeros(3, 2, device="meta"), torch.zeros(3, 2), "is on meta"),
    ],
)
def test_points_that_cannot_meet_are_refused(a_deg: Tensor, b_deg: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        great_circle_km(a_deg, b_deg)


def test_all_pairs_takes_lists_of_points_alone() -> None:
    with pytest.raises(ValueError, match="a_deg_N2 must be"):
        pairwise_km(torch.zeros(2), torch.zeros(3, 2))


def test_the_kernels_round_no_worse_than_the_definition(tmp_path: Path) -> None:
    pairs = [hard_pairs(case, COUNT, dtype) for dtype in TOLERANCES for case in CASES]
    special = [torch.tensor(SPECIAL_DEG, dtype=dtype) for dtype in TOLERANCES]
    calls = [("triton_great_circle.launch_paired", pair) for pair in pairs]
    calls += [("triton_great_circle.launch_pairwise", (points, points[:-1])) for points in special]
    lost = torch.tensor([[NAN, 1], [1, NAN], [INF, 1], [1, -INF], [1, 2]])
    calls += [("triton_great_circle.launch_paired", (lost, lost.flip(0))) for lost in (lost, lost.double())]
    ragged = torch.stack(hard_pairs("random", 67, torch.float32), dim=-1)[..., 0]
    calls += [("triton_great_circle.launch_pairwise", (ragged, points)) for points in (ragged[:0], ragged[:1], ragged)]
    results = iter(interpreted(calls, tmp_path))
    for a_deg, b_deg in pairs:
        check_error(next(results), a_deg, b_deg)
    for points in special:
        km = next(results)
        assert (km - distance_km(points[:, None], points[None, :-1])).abs().max() < 0.004
        assert (km.diagonal() == 0).all()
    for _ in TOLERANCES:
        assert next(results).isnan().tolist() == [True, True, True, True, True]
    assert next(results).shape == (67, 0)
    assert (next(results) - distance_km(ragged[:, None], ragged[None, :1])).abs().max() < 0.007
    assert (next(results) - distance_km(ragged[:, None], ragged[None])).abs().max() < 0.007


def kernels_of(dtype: torch.dtype, capability: int) -> list[Kernel]:
    triton_great_circle = pytest.importorskip("geoloc_kernels.triton_great_circle")
    sine, arc = triton_great_circle.polynomials(dtype)
    pointer = {torch.float32: "*fp32", torch.float64: "*fp64"}[dtype]
    points = dict.fromkeys(["a_ptr", "b_ptr", "km_ptr"], pointer)
    is_single = dtype == torch.float32
    paired = {"SINE": sine, "ARC": arc, "P": 1024 if is_single else 512}
    pairwise = {"SINE": sine, "ARC": arc, "R": 32, "C": 128 if is_single else 64}
    return [
        Kernel("triton_great_circle.paired_kernel", points | {"num_pairs": "i64"}, paired, capability),
        Kernel(
            "triton_great_circle.pairwise_kernel",
            points | {"num_rows": "i32", "num_columns": "i32"}, pairwise, capability,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(torch.float32, 90, marks=pytest.mark.slow),
        pytest.param(torch.float64, 90, marks=pytest.mark.slow),
        pytest.param(torch.float32, 80, marks=pytest.mark.slow),
        pytest.param(torch.float64, 80, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_fit_a_chip(dtype: torch.dtype, capability: int) -> None:
    for made in build(kernels_of(dtype, capability)):
        assert made.stack_bytes <= 16
        assert made.registers <= 255
        assert made.shared_bytes <= SHARED_BYTES[capability]
