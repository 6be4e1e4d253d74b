"""Seconds of contenders that take turns, and the matrix product that shares of a chip's rate are taken of."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import torch

Job = Callable[[], object]

MATMUL = "8192^3 bf16 product"
MATMUL_SIDE = 8192
# 2 FLOP for each of side^3 products and sums.
MATMUL_FLOP = 2.0 * MATMUL_SIDE**3
WARM_UPS = 2
# On CUDA a job is called again and again for as long: starting it may take the processor longer than the device needs.
_REGION_S, _MAX_CALLS = 0.02, 200


def in_turn(jobs: Mapping[str, Job], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of one call of each job, by name, all of them taking turns.

    The first two rounds are not counted: they compile, and fill caches. On a CPU a turn is one call by the clock; on
    CUDA calls in a row for some 20 ms between two events on the stream, and the device has nothing to do before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    calls = dict.fromkeys(jobs, 1)
    for turn in range(repeats + WARM_UPS):
        for name, job in jobs.items():
            spent = _cuda_seconds(job, calls[name]) if device.type == "cuda" else _seconds(job)
            if turn >= WARM_UPS:
                seconds[name].append(spent)
            elif device.type == "cuda":
                calls[name] = min(max(math.ceil(_REGION_S / max(spent, 1e-6)), 1), _MAX_CALLS)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _seconds(job: Job) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def _cuda_seconds(job: Job, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        job()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def matmul(device: torch.device) -> Job:
    """A square bf16 product of random numbers: what a chip gives at best. Of zeros it would give more."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def clocks() -> str:
    """What the driver says of the chip's clock, heat and power; "" where there is no driver to ask."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = "clocks.sm,clocks.max.sm,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[:1]
    except (OSError, subprocess.SubprocessError):
        # It only informs.
        return ""
    return "".join(f"clock, most, heat, power, limits: {line}" for line in told)
