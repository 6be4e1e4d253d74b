"""The main job, from JPEG tars to files on disk, against the encoder alone and the published quick start's loop.

    python scripts/bench_main_job.py
    python scripts/bench_main_job.py --photos 512 --repeats 5
    python scripts/bench_main_job.py --quick    # tiny model, a few photos: shows that it runs, judges nothing

Ours: `predict --save-embeddings` from tar shards to Parquet and npy, ledger and fsync included, the encoder loaded and
warm, as it is from the first minute of a long job on. Encoder alone: the same encoder over pixels that lie on its
device already. Quick start: as published, one photo at a time in fp32: PIL, CLIPImageProcessor, CLIPModel, head,
soft-max, top 5. Photos of 640 x 640 and weights are made here. Interleaved; a ratio is the median of the rounds'.
First the answers are compared, in fp32; where they differ, nothing is timed.

On a CPU: ViT of 4 layers x 384, patch 32, 224 px (about 0.75 GFLOP a photo, so that decoding weighs as it does beside
a GPU), fp32, batch 32. On CUDA: ViT-L/14-336, bf16, batch 256. What a machine cannot measure is null.

A run compares a few photos of its first batch with fp32. The fp32 tower for that is made once here, as the encoder is,
and not in a round; the comparison itself counts, and its seconds stand among the bars.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from main_job_parts import LARGE, SMALL, TINY, Case, make_parts, make_shards
from quick_start import QuickStart, published_head
from report import Bar, bar, left_s, report, unjudged
from stream_photos import street_photos
from turns import clocks

from geoloc_batch import predict
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.run import encoders, first_batch
from geoloc_batch.run.workers import this_worker

NUM_DISTINCT, COMPARED = 24, 32
# Floor and goal on CUDA; floor on a CPU.
MODEL, QUICK, CPU_QUICK = (0.95, 0.98), (15.0, 20.0), 1.0


def main() -> int:
    """Compare, measure, print; exit 0 when every bar that could be measured is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, help="of each round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", help="where shards and results are written; the system's default otherwise")
    options = parser.parse_args()
    device = this_worker().device
    case = TINY if options.quick else LARGE if device.type == "cuda" else SMALL
    case = replace(case, photos=options.photos or case.photos)
    share_encoders()
    bars: dict[str, Bar] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for row in measure(case, Path(scratch), device, 1 if options.quick else options.repeats):
            # Each round tells of all rounds until then.
            bars[row["name"]] = row
    rows = unjudged(list(bars.values())) if options.quick else list(bars.values())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return report("main_job", rows, ("torch", "numpy", "transformers"), gpu=gpu)


def share_encoders() -> None:
    """One encoder for all runs of this process, and one fp32 tower: each would load, compile or make it anew."""
    encoders.load_encoder = functools.cache(encoders.load_encoder)
    first_batch.reference_of = functools.cache(first_batch.reference_of)


def measure(case: Case, folder: Path, device: torch.device, repeats: int) -> Iterator[Bar]:
    """All bars, round by round; the answers are compared first."""
    photos = street_photos(NUM_DISTINCT)
    make_shards(case, folder / "shards", photos)
    make_parts(case, folder)
    quick = list(islice(cycle(photos), case.quick_photos))
    expected, _ = quick_start(folder, quick[:COMPARED], device)
    run(case, folder, "compared", precision="fp32", compile="off", limit=COMPARED)
    compare(expected, folder / "compared")
    # Compiles, and warms caches.
    run(case, folder, "warm", limit=2 * case.batch)
    rates: dict[str, list[float]] = {"tar to files": [], "model only": [], "quick start": []}
    samples: list[float] = []
    for repeat in range(repeats):
        started = time.perf_counter()
        seconds = quick_start(folder, quick, device)[1]
        rates["quick start"].append(len(quick) / seconds)
        # Before and after: a chip that is hot runs slower.
        before = model_rate(case, folder, device)
        done = run(case, folder, f"out{repeat}")
        rates["model only"].append((before + model_rate(case, folder, device)) / 2)
        rates["tar to files"].append(done.rows / done.seconds)
        samples.append(sample_seconds(folder / f"out{repeat}"))
        told = ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items())
        print(
            f"{case.name}: {told} images/s, limited by {done.limiting_stage}; of {done.seconds:.1f} s "
            f"{samples[-1]:.2f} s for the comparison with fp32. {clocks()}",
            file=sys.stderr,
            flush=True,
        )
        yield from bars_of(case, device, rates, samples)
        if repeat + 1 < repeats and left_s() < 1.3 * (time.perf_counter() - started):
            print(f"too little time is left for more than {repeat + 1} rounds", file=sys.stderr)
            return


def bars_of(case: Case, device: torch.device, rates: dict[str, list[float]], samples: list[float]) -> Iterator[Bar]:
    """Of the rounds until now."""
    over_model, over_quick = (ratio(rates["tar to files"], rates[name]) for name in ("model only", "quick start"))
    is_cuda, named = device.type == "cuda", f"{case.name}, {case.precision}"
    yield bar(f"{named}: tar to files / model only", over_model, "ratio")
    yield bar(f"{named}: tar to files / quick start's loop", over_quick, "ratio", None if is_cuda else CPU_QUICK)
    for name, found in rates.items():
        yield bar(f"{named}: {name}", round(statistics.median(found), 1), "images/s")
    yield bar(f"{named}: comparison with fp32 in a round", round(statistics.median(samples), 2), "s")
    # The bars of one H200 with 16 cores.
    yield bar("CUDA: tar to files / model only", over_model if is_cuda else None, "ratio", *MODEL)
    yield bar("CUDA: tar to files / quick start's loop", over_quick if is_cuda else None, "ratio", *QUICK)


def sample_seconds(out: Path) -> float:
    """What the comparison of a run's first photos with fp32 took; 0 where there was none, as in fp32."""
    found = [json.loads(path.read_text()) for path in (out / "_logs").glob("*.fidelity.json")]
    return float(sum(told.get("seconds", 0.0) for told in found))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of our rate over theirs, round by round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def run(case: Case, folder: Path, out: str, **flags: Any) -> Any:
    """Ours, from the shards to files; its clock starts when the encoder is loaded."""
    usual = {"precision": case.precision, "batch_size": case.batch}
    parts = {"encoder": folder / "clip", "head": folder / "best.pt", "cells": folder / "geocell_info.json"}
    return predict(folder / "shards", out=folder / out, save_embeddings=True, **parts, **(usual | flags))


def model_rate(case: Case, folder: Path, device: torch.device) -> float:
    """Images per second of the run's encoder alone."""
    # By the way that a run takes: then it is the very encoder that the run has.
    wanted = EncoderConfig(encoder=str(folder / "clip"), precision=case.precision, batch_size=case.batch)
    encoder = encoders.load(wanted, device)
    shape = (case.batch, case.side, case.side, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    encoder.encode(pixels)
    count, started = 0, settled(device)
    while (spent := settled(device) - started) < case.model_seconds:
        for _ in range(4):
            encoder.encode(pixels)
        count += 4 * case.batch
    return count / spent


def settled(device: torch.device) -> float:
    """The time when the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def quick_start(folder: Path, photos: list[bytes], device: torch.device) -> tuple[list[list[int]], float]:
    """The published loop. Gives the five best cells of each photo, and the seconds of the loop."""
    loop = load_quick_start(folder, device)
    start = settled(device)
    answers = [loop.best_cells(photo) for photo in photos]
    return answers, settled(device) - start


@functools.cache
def load_quick_start(folder: Path, device: torch.device) -> QuickStart:
    """The loop's parts, from the published formats."""
    from transformers import CLIPImageProcessor, CLIPModel

    state = torch.load(folder / "best.pt", weights_only=True)["model"]
    head = published_head(*state["head.2.weight"].shape[::-1])
    # The published one has a dropout between the two.
    for part, at in zip(head, (0, 2), strict=True):
        part.load_state_dict({name: state[f"head.{at}.{name}"] for name in ("weight", "bias")})
    clip = CLIPModel.from_pretrained(folder / "clip")
    return QuickStart(clip.vision_model, CLIPImageProcessor.from_pretrained(folder / "clip"), head, device)


def compare(expected: list[list[int]], out: Path) -> None:
    """Both must name the same cells; otherwise there is nothing to time."""
    rows = [row for path in sorted((out / "predictions").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(expected), f"{len(rows)} rows for {len(expected)} photos"
    pairs = zip(rows, expected, strict=True)
    differing = [(row["key"], row["topk_cell"], cells) for row, cells in pairs if row["topk_cell"] != cells]
    # Random weights leave near ties among 1898 cells: the last places of a few photos may swap.
    assert len(differing) <= 0.05 * len(rows), f"other cells: {differing[:5]}"


if __name__ == "__main__":
    raise SystemExit(main())
