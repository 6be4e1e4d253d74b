"""The encoder against open_clip and transformers, on weights and pixels made here.

    python scripts/bench_encoder.py
    python scripts/bench_encoder.py --quick    # tiny models: shows that it runs, judges nothing

Fidelity first: our features against open_clip's forward in fp32 on the same weights; where they are off, nothing is
timed. Then stages, those that are judged first: the contenders of a stage take turns, medians, one batch of random
pixels; the quick start's loop reads JPEGs of 640 x 640. A share of the matrix product's rate counts every token of
every layer: 381.92 GFLOP a photo of ViT-L/14-336. What is not judged is left out where time is short.

On a CPU: a ViT of 4 layers x 384 in fp32, and ViT-B/32 in fp32 and bf16; batches of 32; and how long a process takes
to its first batch, compiled, without a compile cache and with a filled one. On CUDA: ViT-L/14-336, bf16 and fp8 (where
there is hardware for it), batch 256, and an 8192^3 bf16 matrix product in turn with it. What a machine cannot measure
is null.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from encoder_contenders import OPEN_CLIP, OURS, QUICK_START, TRANSFORMERS, Contender, Contenders
from encoder_models import (
    BASE,
    FIDELITY,
    LARGE,
    SMALL,
    TINY,
    Case,
    encoder_of,
    make_clip,
    make_pixels,
    reference_features,
    relative_error,
)
from report import Bar, bar, left_s, report, unjudged
from turns import MATMUL, clocks, in_turn

from geoloc_batch.model.arithmetic import FP8_CAPABILITY, fix_summation_order
from geoloc_batch.model.attention import BACKENDS
from geoloc_batch.model.choice import MODES

WARM = "a process to its first compiled batch: warm / cold compile cache"
STAGE_S, COMPILE_S = 20.0, 60.0
"""A stage that is not judged begins where so much time is left, and so much for each model that it compiles."""
Stage = tuple[Contender, ...]


@dataclass(frozen=True)
class Ratio:
    """One rate over another, of one model on one kind of device."""

    case: Case
    device: str
    name: str
    ours: tuple[str, ...]
    """The best of these."""
    theirs: str
    floor: float | None = None
    goal: float | None = None


ALL_OURS = ("ours fp32", "ours bf16", "ours fp32 compiled", "ours bf16 compiled")
FAST, QUICK = ("ours bf16 compiled",), QUICK_START
RATIOS = (
    Ratio(SMALL, "cpu", ", fp32: ours eager / transformers eager", ("ours fp32",), "transformers fp32", 1.15, 1.35),
    Ratio(BASE, "cpu", ": best of ours / open_clip fp32 eager", ALL_OURS, "open_clip fp32", 1.8, 2.5),
    Ratio(LARGE, "cuda", ", bf16: TFLOP/s / same-run 8192^3 matmul", FAST, MATMUL, 0.58, 0.65),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / transformers sdpa eager", FAST, "transformers bf16", 1.25, 1.45),
    Ratio(LARGE, "cuda", ": fp8 / bf16, ours compiled", ("ours fp8 compiled",), FAST[0], 1.2, 1.3),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / ours eager", FAST, "ours bf16"),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / open_clip eager", FAST, "open_clip bf16"),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / transformers sdpa compiled", FAST, "transformers bf16 compiled"),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / open_clip compiled", FAST, "open_clip bf16 compiled"),
    Ratio(LARGE, "cuda", ", bf16: ours compiled / quick start's loop", FAST, QUICK),
)


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
    bars: dict[str, Bar] = {}
    for case in (TINY,) if options.quick else cases(device):
        for row in measure(case, device, 1 if options.quick else options.repeats, is_traced=options.quick):
            # Measured again, a figure stands for what it was before.
            bars[row["name"]] = row
    for one in RATIOS:
        name = f"{one.case.name}{one.name}"
        if one.floor is not None and name not in bars:
            bars[name] = bar(name, None, "ratio", one.floor, one.goal)
    warm = None if device.type == "cuda" else warm_start(options.quick)
    bars[WARM] = bar(WARM, warm, "ratio", *((None, None) if options.quick else (0.5, 0.35)), is_lower=True)
    rows = unjudged(list(bars.values())) if options.quick else list(bars.values())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return report("encoder", rows, ("torch", "open_clip_torch", "transformers"), gpu=gpu)


def cases(device: torch.device) -> tuple[Case, ...]:
    """The models of a machine."""
    if device.type == "cpu":
        return (SMALL, BASE)
    has_fp8 = torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return (replace(LARGE, precisions=("bf16", "fp8")) if has_fp8 else LARGE,)


def stages(case: Case, device: torch.device) -> tuple[list[Stage], list[Stage]]:
    """Who takes turns with whom: what is judged, and what informs; the dearest last."""
    is_cuda, first = device.type == "cuda", case.precisions[0]
    ours, fast = Contender(OURS, first), Contender(OURS, first, is_compiled=True)
    baselines = (Contender(TRANSFORMERS, first), Contender(OPEN_CLIP, first), Contender(QUICK_START))
    lower = [Contender(OURS, precision) for precision in case.precisions[1:]]
    low_fast = [Contender(OURS, precision, is_compiled=True) for precision in case.precisions[1:]]
    others_fast = [(Contender(who, first, is_compiled=True), fast) for who in (TRANSFORMERS, OPEN_CLIP)]
    by_kernel = tuple(Contender(OURS, first, sdpa=sdpa) for sdpa in BACKENDS)
    if is_cuda:
        judged = [(fast, Contender(MATMUL), ours, *baselines), *((one, fast) for one in low_fast)]
        tuned = Contender(OURS, first, is_compiled=True, compile_mode=MODES[1])
        return judged, [(*by_kernel, *lower), *others_fast, (tuned, fast)]
    return [(ours, *lower, *baselines)], [by_kernel, (fast, ours), *((one, ours) for one in low_fast), *others_fast]


def measure(case: Case, device: torch.device, repeats: int, *, is_traced: bool) -> Iterator[Bar]:
    """Fidelity, and nothing else where it fails; images per second of everybody, ratios after each stage."""
    clip = make_clip(case)
    pixels = make_pixels(case).to(device)
    contenders = Contenders(clip, case, device, pixels, is_traced=is_traced)
    expected = reference_features(clip, pixels)
    eager = {precision: contenders.encoder(Contender(OURS, precision)) for precision in case.precisions}
    errors = {precision: relative_error(encoder.encode(pixels), expected) for precision, encoder in eager.items()}
    for precision, error in errors.items():
        # Floors are lower limits: the bar is how many times the error fits into what is allowed.
        name = f"{case.name}: allowed / measured error, {precision}"
        yield bar(name, round(FIDELITY[precision] / error, 1), "ratio", 1.0)
    good = tuple(precision for precision, error in errors.items() if error <= FIDELITY[precision])
    if len(good) < len(errors):
        print(f"{case.name}: features are off ({errors}), {good or 'nothing'} is timed", file=sys.stderr)
    if case.precisions[0] not in good:
        return
    case = replace(case, precisions=good)
    rates: dict[str, float] = {}
    chosen = contenders.encoder(Contender(OURS, case.precisions[0], is_compiled=True))
    how = f"attention by {chosen.sdpa}, compiled: {chosen.compile_mode}"
    print(f"{case.name}: ours takes, where nothing is said, {how}", file=sys.stderr)
    judged, informing = stages(case, device)
    for stage in (*judged, *informing):
        told = ", ".join(one.name for one in stage)
        num_new = sum(one.is_compiled and one.name not in rates for one in stage)
        if stage in informing and left_s() < STAGE_S + num_new * COMPILE_S:
            print(f"{case.name}: too little time is left for {told}", file=sys.stderr)
            continue
        started = time.perf_counter()
        here = [one for one in stage if contenders.is_there(one)]
        jobs = {one.name: contenders.job(one) for one in here}
        with torch.inference_mode():
            seconds = in_turn(jobs, device, repeats)
        rates |= {one.name: contenders.images(one) / seconds[one.name] for one in here}
        print(f"{told}: {time.perf_counter() - started:.0f} s. {clocks()}", file=sys.stderr)
        yield from told_rates(case, device, {one.name for one in here}, rates)


def told_rates(case: Case, device: torch.device, names: set[str], rates: dict[str, float]) -> Iterator[Bar]:
    """Bars of the contenders that ran just now, and the ratios that they are part of."""
    for name in sorted(names):
        print(f"{case.name}: {name:40s} {rates[name]:9.1f} images/s", file=sys.stderr, flush=True)
        if name == MATMUL:
            yield bar(MATMUL, round(rates[name] * case.flop() / 1e12, 1), "TFLOP/s")
        else:
            yield bar(f"{case.name}: {name}", round(rates[name], 2), "images/s")
    for one in RATIOS:
        ours = [rates[name] for name in one.ours if name in rates]
        is_new = not names.isdisjoint({*one.ours, one.theirs})
        if (one.case.name, one.device) == (case.name, device.type) and is_new and ours and one.theirs in rates:
            value = round(max(ours) / rates[one.theirs], 3)
            yield bar(f"{case.name}{one.name}", value, "ratio", one.floor, one.goal)


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
    encoder = encoder_of(
        make_clip(case), case, torch.device("cpu"), case.precisions[0], compiled=True, compile_cache=cache
    )
    encoder.encode(make_pixels(case))


if __name__ == "__main__":
    raise SystemExit(main())
