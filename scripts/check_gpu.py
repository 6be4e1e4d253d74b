"""What must hold to the bit where the encoder runs: rows, graphs, the pinned path and the compile cache.

    python scripts/check_gpu.py
    python scripts/check_gpu.py --quick    # tiny models

Weights and pixels are made here. Runs on a CPU too, without the copy streams of CUDA. Every bar but the last is a
number of faults; one is too many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections import deque
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
from encoder_models import LARGE, TINY, Case, encoder_of, make_clip, make_pixels, traced
from report import Bar, bar, left_s, report
from torch import Tensor
from torch._dynamo.utils import counters

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.arithmetic import PRECISIONS, check_precision
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.records import Sample, Unit
from geoloc_batch.run.transfer import transfer_for
from geoloc_batch.stream.batch import Batch

RING, BATCHES, UNDER_WAY = 4, 24, 3
# What runs by default on CUDA, and what its bits may depend on most.
COMPILED = ("bf16", "fp8")
WARM = (0.5, 0.35)
"""Floor and goal of a warm start over a cold one."""
TWO_STARTS_S = 50.0


def main() -> int:
    """Check, print; exit 0 when there is no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    case = TINY if options.quick or not is_cuda else replace(LARGE, name="ViT 3x1024, 336 px", layers=3)
    clip, pixels = make_clip(case), make_pixels(case).to(device)
    bars, encoders = [], {}
    for precision in PRECISIONS:
        compiled = precision in COMPILED and is_cuda
        faults = None
        if runs(precision, device):
            encoders[precision] = encoder_of(clip, case, device, precision, compiled=compiled)
            faults = rows_that_change(encoders[precision], pixels)
        name = f"{precision}{' compiled' * compiled}: rows that change with their place or their neighbours"
        bars.append(faults_bar(name, faults))
    different, waits = through_transfer(encoders["bf16"], case)
    bars += [
        faults_bar("batches that the pinned path changes", different if is_cuda else None),
        faults_bar("times that starting a batch waits for the device", waits if is_cuda else None),
    ]
    bars.append(faults_bar("graphs beyond one, over layouts, padding and a second encoder", graphs_beyond_one(device)))
    bars.append(warm_bar())
    gpu = torch.cuda.get_device_name(device) if is_cuda else None
    return report("check_gpu", bars, ("torch",), gpu=gpu)


def faults_bar(name: str, faults: int | None) -> Bar:
    """A count that has to be 0; None where it cannot be taken here."""
    return bar(name, faults, "faults", 0, is_lower=True)


def runs(precision: str, device: torch.device) -> bool:
    """Whether the device computes in a precision."""
    try:
        check_precision(precision, device)
    except ConfigError:
        return False
    return True


def rows_that_change(encoder: Encoder, pixels: Tensor) -> int:
    """Rows whose features are not the same to the bit in another order, and beside other photos."""
    batch = len(pixels)
    # Every row's features, and none of them like another's: else nothing could be seen to move.
    alone = encoder.encode(pixels).clone()
    assert len(torch.unique(alone, dim=0)) == batch
    generator = torch.Generator().manual_seed(2)
    faults = 0
    for turn in range(3):
        order = torch.randperm(batch, generator=generator).to(pixels.device)
        faults += unlike(encoder.encode(pixels[order]), alone[order])
        is_kept = (torch.arange(batch, device=pixels.device) + turn) % 2 == 0
        others = torch.where(is_kept[:, None, None, None], pixels, 255 - pixels)
        faults += unlike(encoder.encode(others)[is_kept], alone[is_kept])
    return faults


def unlike(ours: Tensor, expected: Tensor) -> int:
    """Rows that differ in any bit."""
    return int((ours != expected).any(dim=1).sum())


def graphs_beyond_one(device: torch.device) -> int:
    """Graphs that are compiled over what runs of one shape bring, less the one that has to be.

    How many there are has nothing to do with the model's size, nor with what is made of them.
    """
    torch._dynamo.reset()
    counters.clear()
    clip, pixels = make_clip(TINY), make_pixels(TINY)
    for _ in range(2):
        encoder = traced(encoder_of(clip, TINY, device, "fp32", compiled=False))
        for num_photos in (TINY.batch, 1, TINY.batch // 2):
            padded = pixels.clone()
            padded[num_photos:] = 0
            for layout in (padded, padded.contiguous(), torch.cat([padded, padded], dim=1)[:, :3]):
                encoder.encode(layout)
                # Batches come from the processor, and from the device's own copy of them.
                encoder.encode(layout.to(device))
    return int(counters["stats"]["unique_graphs"]) - 1


def through_transfer(encoder: Encoder, case: Case) -> tuple[int, int]:
    """Batches whose features differ from those of the encoder alone; starts in which the thread waited."""
    is_cuda = encoder.device.type == "cuda"
    shape = (case.batch, case.side, case.side, 3)
    ring = [torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda).random_(0, 256) for _ in range(RING)]
    batches = [pixels.permute(0, 3, 1, 2) for pixels in ring]
    expected = [encoder.encode(pixels).cpu() for pixels in batches]
    unit = Unit(index=0, kind="shard", source="a.tar")
    samples = tuple(Sample(unit, "a.tar", row, str(row), b"") for row in range(case.batch))
    transfer, started, different, waits = transfer_for(encoder), deque[Any](), 0, 0
    for number in range(BATCHES):
        which = number % RING
        # The first ones make their buffers, which waits.
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            set_sync_warnings(is_cuda and number > RING)
            started.append((which, transfer.start(Batch(batches[which], samples))))
            set_sync_warnings(False)
        waits += sum("called a synchronizing" in str(warning.message) for warning in seen)
        while len(started) > (UNDER_WAY if number < BATCHES - 1 else 0):
            done, flight = started.popleft()
            flight.wait()
            with flight.landed() as features:
                same = torch.equal(torch.from_numpy(features.host_BD), expected[done])
                different += not (same and torch.equal(features.device_BD.cpu(), expected[done]))
    return different, waits


def set_sync_warnings(is_on: bool) -> None:
    """Let torch warn of whatever waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn" if is_on else "default")


def warm_bar() -> Bar:
    """Seconds to the first batch of `geoloc warmup`, when it finds its graph over when it does not."""
    name = "demo encoder: first batch with a warm / cold compile cache"
    if absent := [library for library in ("tyro", "accelerate") if find_spec(library) is None]:
        print(f"{', '.join(absent)} not installed: `geoloc warmup` is not measurable", file=sys.stderr)
        return bar(name, None, "ratio", *WARM, is_lower=True)
    if left_s() < TWO_STARTS_S:
        print("too little time is left for `geoloc warmup`", file=sys.stderr)
        return bar(name, None, "ratio", *WARM, is_lower=True)
    with tempfile.TemporaryDirectory() as cache:
        flags = ["--encoder", "demo", "--batch-size", "4", "--compile-cache", cache, "--compile-mode", "default"]
        command = [sys.executable, "-m", "geoloc_batch", "warmup", *flags]
        found = []
        for _ in range(2):
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                return bar(name, 1.0, "ratio", *WARM, is_lower=True)
            found.append(json.loads(ran.stdout.splitlines()[-1]))
    value = round(found[1]["seconds"] / found[0]["seconds"], 3)
    # One that was quick without its cache has shown nothing.
    return bar(name, value if found[1]["was_warm"] else 1.0, "ratio", *WARM, is_lower=True)


if __name__ == "__main__":
    raise SystemExit(main())
