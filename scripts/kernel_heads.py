"""What `bench_kernels` measures of heads: soft-max and top-k of all logits against the op; time and memory.

CPU: 200,000 cells, 1,024 features, 256 rows, k = 10, in float32. Naive: the layer norm, the linear layer, soft-max,
top-k, and nothing else; the op gives the log-sum-exp, the mean vector and the entropy as well. Interleaved, medians of
wall time. Memory: the peak of the resident set over what it was before the call (VmHWM, reset by clear_refs), each in
a process of its own that has made a small call before. FLOPs: 2 B C D, of which the soft-max is some 2 %.

CUDA: bfloat16 features and weights. Eager gives all that the op gives. Bytes at 64 rows: the weight, 2 C D, once.

Shape letters: B rows, D features, C cells, K kept.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from report import Bar, bar
from torch import Tensor
from torch.nn import functional

from geoloc_kernels.fold import fold_layer_norm
from geoloc_kernels.head import HeadTopk, PreparedHead, prepare_head

DIM = 1024
Answer = tuple[Tensor, ...]


class Work(NamedTuple):
    """A head and rows to ask it about."""

    feature_BD: Tensor
    head: PreparedHead
    weight_CD: Tensor
    bias_C: Tensor
    xyz_C3: Tensor
    k: int

    def op(self) -> Answer:
        """What is measured."""
        return self.head.topk(self.feature_BD, self.k)

    def naive(self) -> Answer:
        """Probabilities and cells of the best, by a soft-max and top-k of all."""
        normed_BD = functional.layer_norm(self.feature_BD, (DIM,))
        prob_BK, id_BK = functional.linear(normed_BD, self.weight_CD, self.bias_C).softmax(dim=-1).topk(self.k)
        return id_BK, prob_BK

    def eager(self) -> Answer:
        """All that the op gives, as one would write it down."""
        normed_BD = functional.layer_norm(self.feature_BD, (DIM,))
        logit_BC = functional.linear(normed_BD, self.weight_CD, self.bias_C).float()
        lse_B = logit_BC.logsumexp(dim=-1)
        prob_BC = (logit_BC - lse_B[:, None]).exp()
        logit_BK, id_BK = logit_BC.topk(self.k)
        return id_BK, logit_BK, lse_B, prob_BC @ self.xyz_C3, lse_B - (prob_BC * logit_BC).sum(dim=-1)


def make_work(num_rows: int, num_cells: int, k: int, dtype: torch.dtype, device: str) -> Work:
    """Logits with a standard deviation of 2, as a trained head's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    ones, zeros = torch.ones(DIM, device=device), torch.zeros(DIM, device=device)
    # Neighbours are alike: a base for every 16 cells, so that the best of a row stand together.
    near_CD = normal(-(-num_cells // 16), DIM).repeat_interleave(16, dim=0)[:num_cells]
    near_CD.add_(normal(num_cells, DIM)).mul_((2 / DIM) ** 0.5)
    weight_CD, bias_C = fold_layer_norm(ones, zeros, near_CD, normal(num_cells))
    xyz_C3 = functional.normalize(normal(num_cells, 3), dim=1)
    # Rounded at once, so that a linear layer of this type has the same bias.
    weight_CD, bias_C = weight_CD.to(dtype), bias_C.to(dtype)
    head = prepare_head(weight_CD, bias_C.float(), xyz_C3)
    return Work(normal(num_rows, DIM).to(dtype), head, weight_CD, bias_C, xyz_C3, k)


def check(work: Work) -> None:
    """The best of float64, and its log-sum-exp, of some rows; otherwise there is nothing to time."""
    found = work.head.topk(work.feature_BD, work.k)
    found = HeadTopk(*(part[:16] for part in found))
    feature_BD = work.feature_BD[:16].double()
    rstd_B1 = (feature_BD.var(dim=1, correction=0, keepdim=True) + 1e-5).rsqrt()
    logit_BC = (feature_BD @ work.weight_CD.double().T) * rstd_B1 + work.bias_C.double()
    best_BK = logit_BC.topk(work.k).values
    assert (logit_BC.gather(1, found.id_BK) - best_BK).abs().max() < 1e-4
    assert (found.lse_B - logit_BC.logsumexp(dim=1)).abs().max() < 1e-4


def head_bars(num_rows: int = 256, num_cells: int = 200_000, repeats: int = 7) -> list[Bar]:
    """The head's figures on this machine; those that need CUDA have no value without it."""
    return [*cpu_bars(num_rows, num_cells, repeats), *cuda_bars(repeats)]


def cpu_bars(num_rows: int, num_cells: int, repeats: int) -> list[Bar]:
    """Time and memory over naive soft-max and top-k."""
    peak = {name: _peak_of(name, num_rows, num_cells) for name in ("op", "naive")}
    say(f"memory above the inputs: op {peak['op']:.1f} MB, naive {peak['naive']:.1f} MB")
    bars = []
    for cells, rows, k, floor in ((num_cells, num_rows, 10, 1.1), (min(1898, num_cells), 64, 5, None)):
        work = make_work(rows, cells, k, torch.float32, "cpu")
        check(work)
        op_s, naive_s = medians([work.op, work.naive], repeats)
        say(f"{rows} rows, {cells} cells: op {1e3 * op_s:.1f} ms, naive {1e3 * naive_s:.1f} ms")
        bars.append(bar(f"CPU, {cells} cells: time / naive", op_s / naive_s, "ratio", floor, 1.0, is_lower=True))
    memory = bar(f"CPU, {num_cells} cells: memory / naive", peak["op"] / peak["naive"], "ratio", 0.05, is_lower=True)
    return [memory, *bars]


def cuda_bars(repeats: int) -> list[Bar]:
    """Speed over eager and compiled PyTorch, shares of the chip's rates, memory over eager."""
    cases: list[tuple[int, int, int, float, float]] = [(16384, 200_000, 10, 2.5, 1.5), (16384, 1898, 8, 4.0, 2.5)]
    bars: list[Bar] = []
    for num_rows, num_cells, k, over_eager, over_compiled in cases:
        named = f"CUDA, {num_rows} x {num_cells}"
        speed: list[float | None] = [None, None, None, None]
        if torch.cuda.is_available():
            speed = [*_cuda_speeds(num_rows, num_cells, k, repeats)]
        bars += [
            bar(f"{named}: eager / op", speed[0], "ratio", over_eager),
            bar(f"{named}: compiled / op", speed[1], "ratio", over_compiled),
        ]
        if num_cells > 8192:
            bars += [
                bar(f"{named}: share of the matrix product's rate", speed[2], "ratio", 0.55),
                bar(f"{named}: memory / eager", speed[3], "ratio", 0.01, is_lower=True),
            ]
    share = _cuda_bandwidth_share(repeats) if torch.cuda.is_available() else None
    return [*bars, bar("CUDA, 64 x 200000: share of the copy's bandwidth", share, "ratio", 0.75)]


def _cuda_speeds(num_rows: int, num_cells: int, k: int, repeats: int) -> tuple[float, float, float, float]:
    work = make_work(num_rows, num_cells, k, torch.bfloat16, "cuda")
    check(work)
    compiled = torch.compile(work.eager)
    some_DC = work.weight_CD[:8192].T
    jobs = [work.op, work.eager, compiled, lambda: (work.feature_BD @ some_DC,)]
    op_s, eager_s, compiled_s, product_s = medians(jobs, repeats)
    product_flops_s = 2 * num_rows * min(num_cells, 8192) * DIM / product_s
    flops_s = 2 * num_rows * num_cells * DIM / op_s
    say(f"{num_rows} x {num_cells}: op {1e3 * op_s:.2f} ms, eager {1e3 * eager_s:.2f}, compiled {1e3 * compiled_s:.2f}")
    say(f"{flops_s / 1e12:.0f} TFLOP/s of {product_flops_s / 1e12:.0f}")
    memory = _cuda_peak(work.op) / _cuda_peak(work.eager)
    return eager_s / op_s, compiled_s / op_s, flops_s / product_flops_s, memory


def _cuda_bandwidth_share(repeats: int) -> float:
    work = make_work(64, 200_000, 10, torch.bfloat16, "cuda")
    check(work)
    target = torch.empty_like(work.weight_CD)
    op_s, copy_s = medians([work.op, lambda: (target.copy_(work.weight_CD),)], repeats)
    num_bytes = work.weight_CD.numel() * work.weight_CD.element_size()
    # A copy reads and writes.
    op_tb_s, copy_tb_s = num_bytes / op_s / 1e12, 2 * num_bytes / copy_s / 1e12
    say(f"64 x 200000: op {1e6 * op_s:.0f} us, {op_tb_s:.2f} of {copy_tb_s:.2f} TB/s")
    return op_tb_s / copy_tb_s


def _cuda_peak(job: Callable[[], Answer]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def medians(jobs: list[Callable[[], Answer]], repeats: int) -> list[float]:
    """Seconds of each job, interleaved, after two calls that don't count."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 2):
        for job, taken in zip(jobs, seconds, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def added_mb(name: str, num_rows: int, num_cells: int) -> float:
    """MB of the resident set's peak in one call, over what it was before."""
    work = make_work(num_rows, num_cells, 10, torch.float32, "cpu")
    # What libraries load or keep at their first call is not the call's.
    getattr(make_work(8, 3000, 10, torch.float32, "cpu"), name)()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    getattr(work, name)()
    return _status_mb("VmHWM") - before


def _peak_of(name: str, num_rows: int, num_cells: int) -> float:
    command = [sys.executable, __file__, name, str(num_rows), str(num_cells)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(added_mb(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
