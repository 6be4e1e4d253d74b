"""The kernels: distances and nearest centroids here, heads by `kernel_heads`; errors first, then speed.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --only distances     # or heads
    python scripts/bench_kernels.py --quick              # tiny: shows that it runs, judges nothing

Errors are against forty digits, over pairs that are hard: random, close and nearly antipodal ones, sixths of them near
the poles, the antimeridian and the equator. Speeds are interleaved, medians of wall time.

CPU (where there is no CUDA): all pairs of 4,000 and 4,000 points in float64 against scikit-learn's haversine_distances;
the nearest of 200,000 centroids for 100,000 points against a flat scan by faiss (timed on 1,000 points) and scipy's
cKDTree as it is; the first call builds the tree, and is the one that is judged.
    pairwise: 8 bytes written a pair, and some 16 FLOPs and one arc sine; the rest is page faults of the result.
CUDA: all pairs of 16,384 and 16,384 points in float32 against the definition, eager and compiled, and against filling
as much memory; pairs one by one; the nearest of 200,000 for 2,000,000 points.
    pairwise: 4 bytes written a pair, some 85 FLOPs: 0.8 ps by an H200's memory, 2.6 ps by its arithmetic.
    paired: 20 bytes a pair. Nearest: 8 FLOPs a chord, of the few tiles of centroids that can be near.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from report import Bar, bar, report, unjudged
from torch import Tensor
from turns import Job, clocks, in_turn

from geoloc_kernels import great_circle_km, nearest, nearest_tree, pairwise_km
from geoloc_kernels.haversine import distance_km

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from distance_samples import CASES, error_m, exact_km, hard_pairs

LIBRARIES = ("torch", "triton", "scikit-learn", "scipy", "faiss-gpu", "faiss-cpu")


def main() -> int:
    """Measure what was asked for, print; exit 0 when every bar is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("distances", "heads"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    bars: list[Bar] = []
    if options.only != "distances":
        bars += head_figures(options.quick, options.repeats)
    if options.only != "heads":
        bars += distance_bars("cuda" if has_cuda else "cpu", options.quick, options.repeats)
    gpu = torch.cuda.get_device_name() if has_cuda else None
    return report("kernels", unjudged(bars) if options.quick else bars, LIBRARIES, gpu=gpu)


def head_figures(is_quick: bool, repeats: int) -> list[Bar]:
    """The head's, on this machine."""
    from kernel_heads import head_bars

    return head_bars(is_quick, 1 if is_quick else repeats)


def distance_bars(device: str, is_quick: bool, repeats: int) -> list[Bar]:
    """Errors, and the speeds of a device; those of the other have no value."""
    bars = error_bars(device, 60 if is_quick else 3000)
    speed = cuda_bars if device == "cuda" else cpu_bars
    found = {row["name"]: row for row in speed(is_quick, 1 if is_quick else repeats)}
    absent = [row | {"value": None, "met": None} for row in FLOORS if row["name"] not in found]
    return [*bars, *found.values(), *absent]


FLOORS = [
    bar("CPU, pairwise float64: scikit-learn / ours", None, "ratio", 5),
    bar("CPU, nearest of 200k: faiss flat / ours, tree built", None, "ratio", 100),
    bar("CPU, nearest of 200k: points for which faiss knows a nearer one", None, "points", 0, is_lower=True),
    bar("CUDA, pairwise float32: eager / ours", None, "ratio", 8),
    bar("CUDA, nearest of 200k", None, "M points/s", 5),
]


def judged(name: str, value: float) -> Bar:
    """A figure with the floor that is set above."""
    row = next(row for row in FLOORS if row["name"] == name)
    return bar(name, value, row["unit"].partition(",")[0], row["floor"], is_lower="lower" in row["unit"])


def error_bars(device: str, count: int) -> list[Bar]:
    """How far distances are off; the float64 ones in millimetres."""
    bars = []
    for dtype, unit, scale, limits in (
        (torch.float32, "m", 1.0, (3.5, 0.002)),
        (torch.float64, "mm", 1e3, (10.0, 10.0)),
    ):
        pairs = [hard_pairs(case, count, dtype) for case in CASES]
        # Forty digits take their time.
        exact = [exact_km(*points_deg) for points_deg in pairs]
        for name, way in (("paired", great_circle_km), ("pairwise", all_pairs_of_blocks)):
            anywhere = close = 0.0
            for (a_deg, b_deg), exact_N in zip(pairs, exact, strict=True):
                off_N = error_m(way(a_deg.to(device), b_deg.to(device)).cpu(), exact_N) * scale
                is_close_N = torch.tensor([km <= 1 for km in exact_N])
                anywhere = max(anywhere, float(off_N.max()))
                close = max(close, float(off_N[is_close_N].max()) if is_close_N.any() else 0.0)
            told = f"{device}, {name} {str(dtype).removeprefix('torch.')}: error"
            bars.append(bar(f"{told} anywhere", anywhere, unit, limits[0], is_lower=True))
            bars.append(bar(f"{told} within 1 km", close, unit, limits[1], is_lower=True))
    return bars


def all_pairs_of_blocks(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Distances of mates, by `pairwise_km`."""
    parts = zip(a_deg.split(250), b_deg.split(250), strict=True)
    return torch.cat([pairwise_km(a, b).diagonal() for a, b in parts])


def cpu_bars(is_quick: bool, repeats: int) -> list[Bar]:
    """Against scikit-learn, faiss and scipy."""
    import faiss
    from scipy.spatial import cKDTree
    from sklearn.metrics.pairwise import haversine_distances

    count, num_centroids, num_points, num_scanned = (
        (200, 2000, 1000, 100) if is_quick else (4000, 200_000, 100_000, 1000)
    )
    threads = torch.get_num_threads()
    a_deg, b_deg = spread(count, 0), spread(count, 1)
    a_rad, b_rad = a_deg.deg2rad().numpy(), b_deg.deg2rad().numpy()
    theirs, ours = medians([lambda: haversine_distances(a_rad, b_rad), lambda: pairwise_km(a_deg, b_deg)], repeats)
    say(f"pairwise, {threads} threads: ours {1e9 * ours / count**2:.2f} ns, scikit-learn {1e9 * theirs / count**2:.2f}")

    centroid_deg, point_deg = spread(num_centroids, 2), spread(num_points, 3)
    centroid_N3, point_N3 = (unit_vectors_of(deg) for deg in (centroid_deg, point_deg))
    flat = faiss.IndexFlatL2(3)
    flat.add(centroid_N3.float().numpy())
    some = point_N3[:num_scanned].float().numpy()
    faiss.omp_set_num_threads(threads)

    def with_tree() -> Tensor:
        nearest_tree._last = None
        return nearest(point_deg, centroid_deg).id_NK

    def plain_tree() -> None:
        cKDTree(centroid_N3.numpy()).query(point_N3.numpy(), workers=threads)

    jobs: list[Job] = [
        with_tree, lambda: nearest(point_deg, centroid_deg), plain_tree, lambda: flat.search(some, 1)
    ]  # fmt: skip
    first, again, plain, scan = medians(jobs, min(repeats, 3))
    first, again, plain, scan = first / num_points, again / num_points, plain / num_points, scan / num_scanned
    told = f"with its tree {1e6 * first:.2f} us a point, again {1e6 * again:.2f}"
    say(f"nearest: {told}; plain cKDTree {1e6 * plain:.2f}; faiss flat {1e6 * scan:.0f}")
    ids, other = with_tree()[:num_scanned, 0], torch.from_numpy(flat.search(some, 1)[1])[:, 0]
    # In float32 two centroids may be equally far: where faiss names another, it must not be nearer.
    squares = [(point_N3[:num_scanned] - centroid_N3[which]).square().sum(dim=1) for which in (ids, other)]
    say(f"nearest: faiss names the same centroid for {float((ids == other).double().mean()):.2%} of the points")
    return [
        judged("CPU, pairwise float64: scikit-learn / ours", theirs / ours),
        judged("CPU, nearest of 200k: faiss flat / ours, tree built", scan / first),
        bar("CPU, nearest of 200k: faiss flat / ours, asked again", scan / again, "ratio"),
        bar("CPU, nearest of 200k: plain cKDTree / ours, tree built", plain / first, "ratio"),
        judged("CPU, nearest of 200k: points for which faiss knows a nearer one", int((squares[1] < squares[0]).sum())),
    ]


def cuda_bars(is_quick: bool, repeats: int) -> list[Bar]:
    """Against eager and compiled PyTorch, and against the chip's memory."""
    count, num_centroids, num_points, num_pairs = (
        (500, 2000, 10_000, 10_000) if is_quick else (16_384, 200_000, 2_000_000, 20_000_000)
    )
    bars = pairwise_bars(count, repeats)
    centroid_deg, point_deg = (spread(n, seed).cuda() for n, seed in ((num_centroids, 2), (num_points, 3)))
    [found] = medians([lambda: nearest(point_deg, centroid_deg)], repeats)
    ids = nearest(point_deg[:1000], centroid_deg).id_NK.cpu()
    assert torch.equal(ids, nearest(point_deg[:1000].cpu(), centroid_deg.cpu()).id_NK)
    bars.append(judged("CUDA, nearest of 200k", num_points / found / 1e6))
    # More than the L2 cache holds.
    a_deg, b_deg = (spread(num_pairs, seed).float().cuda() for seed in (4, 5))
    source, copy = torch.empty(2, 10 * num_pairs, device="cuda", dtype=torch.uint8)
    pairs, copied = medians([lambda: great_circle_km(a_deg, b_deg), lambda: copy.copy_(source)], repeats)
    return [*bars, bar("CUDA, paired float32: share of copying's bandwidth", copied / pairs, "ratio")]


def pairwise_bars(count: int, repeats: int) -> list[Bar]:
    """All pairs of `count` and `count` points on CUDA."""
    a_deg, b_deg = (spread(count, seed).float().cuda() for seed in (0, 1))
    target = torch.empty(count, count, device="cuda")
    compiled = torch.compile(distance_km, dynamic=False)
    jobs: list[Job] = [
        lambda: pairwise_km(a_deg, b_deg),
        lambda: distance_km(a_deg[:, None], b_deg[None]),
        lambda: compiled(a_deg[:, None], b_deg[None]),
        lambda: target.fill_(1.0),
    ]
    ours, eager, one_graph, fill = medians(jobs, repeats)
    say(f"pairwise: {1e12 * ours / count**2:.2f} ps a pair, {4 * count**2 / ours / 1e12:.2f} TB/s. {clocks()}")
    return [
        judged("CUDA, pairwise float32: eager / ours", eager / ours),
        bar("CUDA, pairwise float32: compiled / ours", one_graph / ours, "ratio"),
        bar("CUDA, pairwise float32: share of filling's bandwidth", fill / ours, "ratio"),
    ]


def spread(count: int, seed: int) -> Tensor:
    """[count, 2] points, evenly over the sphere, float64."""
    generator = torch.Generator().manual_seed(seed)
    height, turn = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return torch.stack([torch.rad2deg(torch.asin(2 * height - 1)), 360 * turn - 180], dim=1)


def unit_vectors_of(point_deg: Tensor) -> Tensor:
    """[count, 3] float64, without the package's help."""
    lat, lon = point_deg.deg2rad().T
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1)


def medians(jobs: Sequence[Job], repeats: int) -> list[float]:
    """Seconds of each job, all of them taking turns on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = in_turn({str(number): job for number, job in enumerate(jobs)}, device, repeats)
    return [found[str(number)] for number in range(len(jobs))]


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
