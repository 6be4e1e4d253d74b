"""What `bench_kernels` measures of heads: soft-max and top-k of all logits against the op; time and memory.

CPU: 200,000 cells, 1,024 features, 256 rows, k = 10, in float32. Naive: the layer norm, the linear layer, soft-max,
top-k, and nothing else; the op gives the log-sum-exp, the mean vector and the entropy as well. Interleaved, medians of
wall time. Memory: the peak of the resident set over what it was before the call (VmHWM, reset by clear_refs), each in
a process of its own that has made a small call before. FLOPs: 2 B C D, of which the soft-max is some 2 %.

CUDA: bfloat16 features and weights. Eager gives all that the op gives; some 50 GB at 16,384 rows and 200,000 cells.
FLOPs are judged by the 8192^3 product in turn with the op. Bytes at 64 rows: the weight, 2 C D, once.

Shape letters: B rows, D features, C cells, K kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from report import Bar, bar
from torch import Tensor
from torch.nn import functional
from turns import MATMUL_FLOP, Job, clocks, in_turn, matmul

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


def head_bars(is_quick: bool, repeats: int) -> list[Bar]:
    """The head's figures on this machine; those of another have no value."""
    if torch.cuda.is_available():
        return cuda_bars(CUDA_TINY if is_quick else CUDA_CASES, repeats)
    rows, cells = (16, 3000) if is_quick else (256, 200_000)
    return [*cpu_bars(rows, cells, repeats), *cuda_null_bars(CUDA_CASES)]


def cpu_bars(num_rows: int, num_cells: int, repeats: int) -> list[Bar]:
    """Time and memory over naive soft-max and top-k."""
    cpu = torch.device("cpu")
    peak = {name: _peak_of(name, num_rows, num_cells) for name in ("op", "naive")}
    say(f"memory above the inputs: op {peak['op']:.1f} MB, naive {peak['naive']:.1f} MB")
    bars = []
    for cells, rows, k, floor in ((num_cells, num_rows, 10, 1.1), (min(1898, num_cells), 64, 5, None)):
        work = make_work(rows, cells, k, torch.float32, "cpu")
        check(work)
        op_s, naive_s = in_turn({"op": work.op, "naive": work.naive}, cpu, repeats).values()
        say(f"{rows} rows, {cells} cells: op {1e3 * op_s:.1f} ms, naive {1e3 * naive_s:.1f} ms")
        bars.append(bar(f"CPU, {cells} cells: time / naive", op_s / naive_s, "ratio", floor, 1.0, is_lower=True))
    memory = bar(f"CPU, {num_cells} cells: memory / naive", peak["op"] / peak["naive"], "ratio", 0.05, is_lower=True)
    return [memory, *bars]


class CudaCase(NamedTuple):
    """A size on CUDA, and what is asked of it."""

    num_rows: int
    num_cells: int
    k: int
    floors: dict[str, float]
    """By what is measured, in the order of the bars."""


EAGER, COMPILED = "eager / op", "compiled / op"
PRODUCT, OWN_PRODUCT = "share of the 8192^3 product's rate", "share of the rate of a product of this depth"
MEMORY, BANDWIDTH = "memory / eager", "share of the copy's bandwidth"
LARGE_FLOORS = {EAGER: 2.5, COMPILED: 1.5, PRODUCT: 0.55, MEMORY: 0.01}
CUDA_CASES = (
    CudaCase(16384, 200_000, 10, LARGE_FLOORS),
    CudaCase(16384, 1898, 8, {EAGER: 4.0, COMPILED: 2.5}),
    CudaCase(64, 200_000, 10, {BANDWIDTH: 0.75}),
)
CUDA_TINY = (
    CudaCase(256, 20_000, 10, LARGE_FLOORS),
    CudaCase(256, 1898, 8, {EAGER: 4.0, COMPILED: 2.5}),
    CudaCase(64, 20_000, 10, {BANDWIDTH: 0.75}),
)


def cuda_null_bars(cases: Sequence[CudaCase]) -> list[Bar]:
    """The bars of CUDA where there is none."""
    return [_cuda_bar(case, what, None) for case in cases for what in case.floors]


def cuda_bars(cases: Sequence[CudaCase], repeats: int, device: str = "cuda") -> list[Bar]:
    """Speed over eager and compiled PyTorch, shares of the chip's rates, memory over eager."""
    bars = []
    for case in cases:
        work = make_work(case.num_rows, case.num_cells, case.k, torch.bfloat16, device)
        check(work)
        measure = _bandwidth if BANDWIDTH in case.floors else _speeds
        bars += [_cuda_bar(case, what, value) for what, value in measure(work, case, repeats).items()]
        del work
        if device == "cuda":
            # The next one's memory is counted from nothing.
            torch.cuda.empty_cache()
    return bars


def _cuda_bar(case: CudaCase, what: str, value: float | None) -> Bar:
    named = f"CUDA, {case.num_rows} x {case.num_cells}: {what}"
    return bar(named, value, "ratio", case.floors.get(what), is_lower=what == MEMORY)


def _speeds(work: Work, case: CudaCase, repeats: int) -> dict[str, float]:
    device = work.feature_BD.device
    # Fixed sizes: a graph for any size, which the second case would get otherwise, is a slower contender.
    jobs: dict[str, Job] = {"op": work.op, "eager": work.eager, "compiled": torch.compile(work.eager, dynamic=False)}
    if PRODUCT in case.floors:
        some_DC = work.weight_CD[:8192].T
        jobs |= {"product": matmul(device), "own product": lambda: (work.feature_BD @ some_DC,)}
    seconds = in_turn(jobs, device, repeats)
    told = ", ".join(f"{name} {1e3 * spent:.3f}" for name, spent in seconds.items())
    say(f"{case.num_rows} x {case.num_cells}, ms: {told}. {clocks()}")
    found = {EAGER: seconds["eager"] / seconds["op"], COMPILED: seconds["compiled"] / seconds["op"]}
    if PRODUCT in case.floors:
        flops_s = 2 * case.num_rows * case.num_cells * DIM / seconds["op"]
        found[PRODUCT] = flops_s / (MATMUL_FLOP / seconds["product"])
        # Of DIM products a sum instead of 8192.
        found[OWN_PRODUCT] = flops_s / (2 * case.num_rows * some_DC.shape[1] * DIM / seconds["own product"])
        say(f"{flops_s / 1e12:.0f} TFLOP/s of {MATMUL_FLOP / seconds['product'] / 1e12:.0f}")
    if MEMORY in case.floors and device.type == "cuda":
        found[MEMORY] = _cuda_peak(work.op) / _cuda_peak(work.eager)
    return found


def _bandwidth(work: Work, case: CudaCase, repeats: int) -> dict[str, float]:
    target = torch.empty_like(work.weight_CD)
    jobs: dict[str, Job] = {"op": work.op, "copy": lambda: (target.copy_(work.weight_CD),)}
    op_s, copy_s = in_turn(jobs, work.feature_BD.device, repeats).values()
    num_bytes = work.weight_CD.numel() * work.weight_CD.element_size()
    # A copy reads and writes.
    op_tb_s, copy_tb_s = num_bytes / op_s / 1e12, 2 * num_bytes / copy_s / 1e12
    say(f"{case.num_rows} x {case.num_cells}: op {1e6 * op_s:.0f} us, {op_tb_s:.2f} of {copy_tb_s:.2f} TB/s")
    return {BANDWIDTH: op_tb_s / copy_tb_s}


def _cuda_peak(job: Callable[[], Answer]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
