"""The encoder against open_clip and transformers, on weights and pixels made here.

    python scripts/bench_encoder.py
    python scripts/bench_encoder.py --quick    # tiny models: shows that it runs, judges nothing

Fidelity first: our features against open_clip's forward in fp32 on the same weights; where they are off, nothing is
timed. Then everything in one run, interleaved, medians, one batch of random pixels. The baselines are given floats that
are normalised already; ours starts from bytes. transformers computes with weights of its own, of the same shapes.

On a CPU: a ViT of 4 layers x 384 in fp32, and ViT-B/32 in fp32 and bf16; batches of 32; and how long a process takes
to its first batch, compiled, without a compile cache and with a filled one. On CUDA: ViT-L/14-336, bf16 and fp8 (where
there is hardware for it), batch 256, and TFLOP/s over those of an 8192^3 bf16 matrix product in the same run. What a
machine cannot measure is null.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from encoder_models import (
    BASE,
    FIDELITY,
    LARGE,
    SMALL,
    TINY,
    Case,
    encoder_of,
    fidelity,
    make_clip,
    make_pixels,
    normalized,
)
from report import bar, report, unjudged
from torch import Tensor

from geoloc_batch.model.arithmetic import DTYPES, FP8_CAPABILITY, fix_summation_order
from geoloc_batch.model.clip import Clip
from geoloc_batch.model.encoder import Encoder

MATMUL_SIDE = 8192
WARM = "a process to its first compiled batch: warm / cold compile cache"


def main() -> int:
    """Compare, measure, print; exit 0 when every bar that could be measured is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first-batch", metavar="CACHE", help="compile with this cache, encode one batch, and no more")
    options = parser.parse_args()
    fix_summation_order()
    if options.first_batch:
        first_batch(TINY if options.quick else SMALL, options.first_batch)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.quick:
        bars = unjudged(measure(TINY, device, repeats=1))
    elif device.type == "cuda":
        has_fp8 = torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
        large = replace(LARGE, precisions=("bf16", "fp8")) if has_fp8 else LARGE
        bars = cuda_bars(large, device, options.repeats) + cpu_bars(None, None)
    else:
        small, base = (measure(case, device, repeats=options.repeats) for case in (SMALL, BASE))
        bars = [*small, *base, *cpu_bars(small, base), *cuda_bars(None, device, 0)]
    warm = None if device.type == "cuda" else warm_start(options.quick)
    bars.append(bar(WARM, warm, "ratio", *((None, None) if options.quick else (0.5, 0.35)), is_lower=True))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return report("encoder", bars, ("torch", "open_clip_torch"), gpu=gpu)


def measure(case: Case, device: torch.device, *, repeats: int) -> list[dict[str, Any]]:
    """Images per second of everything, by name; fidelity first, and nothing else where it fails."""
    clip = make_clip(case)
    pixels = make_pixels(case).to(device)
    errors = {precision: fidelity(clip, case, pixels, precision) for precision in case.precisions}
    bars = [
        # Floors are lower limits: the bar is how many times the error fits into what is allowed.
        bar(f"{case.name}: allowed / measured error, {precision}", round(FIDELITY[precision] / error, 1), "ratio", 1.0)
        for precision, error in errors.items()
    ]
    good = tuple(precision for precision, row in zip(errors, bars, strict=True) if row["met"])
    if len(good) < len(errors):
        print(f"{case.name}: features are off ({errors}), {good or 'nothing'} is timed", file=sys.stderr)
    if case.precisions[0] not in good:
        return bars
    case = replace(case, precisions=good)
    runs = {**our_runs(clip, case, device, pixels), **baselines(clip, case, device, pixels)}
    seconds = interleaved(runs, device, repeats)
    rates = {name: (1 if "batch 1" in name else case.batch) / spent for name, spent in seconds.items()}
    for name, rate in rates.items():
        print(f"{case.name}: {name:32s} {rate:9.1f} images/s", file=sys.stderr)
        bars.append(bar(f"{case.name}: {name}", round(rate, 2), "images/s"))
    return bars


def cpu_bars(small: list[dict[str, Any]] | None, base: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The ratios that are asked for on two cores."""
    eager = ratio(small, ["ours fp32"], "transformers fp32")
    best = ratio(base, ["ours fp32", "ours bf16", "ours fp32 compiled", "ours bf16 compiled"], "open_clip fp32")
    return [
        bar("ViT 4x384, fp32: ours eager / transformers eager", eager, "ratio", 1.15, 1.35),
        bar("ViT-B/32: best of ours / open_clip fp32 eager", best, "ratio", 1.8, 2.5),
    ]


def cuda_bars(case: Case | None, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The figures that are asked for on CUDA; null elsewhere."""
    bars = measure(case, device, repeats=repeats) if case else None
    share, rate = None, rate_of(bars, "ours bf16 compiled")
    if case and rate:
        matmul_flops = matmul_rate(device)
        share = round(rate * case.flop() / matmul_flops, 3)
        print(f"8192^3 bf16: {matmul_flops / 1e12:.0f} TFLOP/s", file=sys.stderr)
    return [
        *(bars or []),
        bar("ViT-L/14-336, bf16: TFLOP/s / same-run 8192^3 matmul", share, "ratio", 0.58, 0.65),
        bar(
            "ViT-L/14-336, bf16: ours compiled / transformers sdpa eager",
            ratio(bars, ["ours bf16 compiled"], "transformers bf16"),
            "ratio",
            1.25,
            1.45,
        ),
        bar(
            "ViT-L/14-336: fp8 / bf16, ours compiled",
            ratio(bars, ["ours fp8 compiled"], "ours bf16 compiled"),
            "ratio",
            1.2,
            1.3,
        ),
    ]


def warm_start(is_quick: bool) -> float | None:
    """Seconds of a process to its first compiled batch, with a filled compile cache over without one."""
    command = [sys.executable, __file__, *["--quick"] * is_quick, "--first-batch"]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            before, started = os.times(), time.perf_counter()
            subprocess.run([*command, folder], check=True, stdout=sys.stderr)
            seconds.append(time.perf_counter() - started)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"{name} start: {seconds[-1]:.1f} s to the first batch, {spent:.1f} s of CPU", file=sys.stderr)
    return round(seconds[1] / seconds[0], 3)


def first_batch(case: Case, cache: str) -> None:
    """What a process of a run does before anything can be counted."""
    encoder = Encoder(
        make_clip(case),
        tap="projected",
        precision=case.precisions[0],
        batch_size=case.batch,
        compiled=True,
        device=torch.device("cpu"),
        compile_cache=cache,
    )
    encoder.encode(make_pixels(case))


def rate_of(bars: list[dict[str, Any]] | None, name: str) -> float | None:
    """Images per second of one run; None where it did not run."""
    return next((float(row["value"]) for row in bars or [] if row["name"].endswith(f": {name}")), None)


def ratio(bars: list[dict[str, Any]] | None, ours: list[str], theirs: str) -> float | None:
    """The best of some rates over another; None where one is missing."""
    rates = [rate for rate in (rate_of(bars, name) for name in ours) if rate is not None]
    against = rate_of(bars, theirs)
    return round(max(rates) / against, 3) if rates and against else None


def our_runs(clip: Clip, case: Case, device: torch.device, pixels: Tensor) -> dict[str, Callable[[], object]]:
    """Ours, by precision, eager and compiled."""
    runs: dict[str, Callable[[], object]] = {}
    for precision in case.precisions:
        for compiled in (False, True) if "ours" in case.compiled else (False,):
            encoder = encoder_of(clip, case, device, precision, compiled=compiled)
            runs[f"ours {precision}{' compiled' * compiled}"] = lambda encoder=encoder: encoder.encode(pixels)
    return runs


def baselines(clip: Clip, case: Case, device: torch.device, pixels: Tensor) -> dict[str, Callable[[], object]]:
    """open_clip's and transformers' own forward in the first precision, and the quick start's loop in fp32."""
    precision = case.precisions[0]
    dtype = DTYPES[precision]
    floats = normalized(pixels).to(dtype)
    models = {"open_clip": copy.deepcopy(clip.module.visual).to(device, dtype)}
    theirs = transformers_model(case)
    if theirs is None:
        print("transformers is not installed: its rows are null", file=sys.stderr)
    else:
        models["transformers"] = theirs.to(device, dtype)
    runs: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        runs[f"{name} {precision}"] = lambda model=model: model(floats)
        if name in case.compiled:
            fast = torch.compile(model, dynamic=False)
            runs[f"{name} {precision} compiled"] = lambda fast=fast: fast(floats)
    alone = copy.deepcopy(theirs if theirs is not None else clip.module.visual).to(device, torch.float32)
    one = normalized(pixels[:1])
    runs["quick start, batch 1, fp32"] = lambda: alone(one)
    return runs


def transformers_model(case: Case) -> Any:
    """A CLIP vision model of transformers with random weights, attention by SDPA; None where it is not installed."""
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError:
        return None
    config = CLIPVisionConfig(
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        image_size=case.side,
        patch_size=case.patch,
        projection_dim=64,
        attn_implementation="sdpa",
    )
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def interleaved(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each, all of them taking turns, after two calls that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a square bf16 product on random numbers: what this chip gives at best."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    # 2 FLOP for each of side^3 products and sums; ten in a row, so that launching them counts for nothing.
    spent = interleaved({"matmul": lambda: [a @ b for _ in range(10)]}, device, 7)["matmul"] / 10
    return 2 * MATMUL_SIDE**3 / spent


if __name__ == "__main__":
    raise SystemExit(main())
