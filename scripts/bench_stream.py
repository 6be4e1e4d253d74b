"""The stream against the decoder's own speed, webdataset with a DataLoader, and the quick start's loop, on two cores.

    python scripts/bench_stream.py
    python scripts/bench_stream.py --quick
    python scripts/bench_stream.py --rounds 5 --photos FOLDER

Photos: painted street scenes of 640 x 640 (60 to 130 kB), 4:3 ones of 2 and 12 megapixels, 12-megapixel ones among
small ones (1 in 24), and the real ones in --photos; 336 pixels for the encoder. Everything in one run, interleaved;
a ratio is the median of the ratios of neighbours. First the pixels are compared with CLIPImageProcessor's, bit for
bit, and with PIL's; if they differ, nothing is timed. What is lower-is-better says so in its unit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from report import bar, report
from stream_contenders import RING, SIDE, WALKS, Pace, loader, pool, quick_start, stream
from stream_parity import Drift, drift_of
from stream_photos import PhotoSet, large_photos, odd_photos, packed, real_photos, street_photos, write_shard

from geoloc_batch.cpus import usable_cpus

REAL_PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
NUM_CPUS = 2
POOL_FLOOR, LOADER_FLOOR, QUICK_FLOOR, QUICK_GOAL, WALK_FLOOR, MEMORY_FLOOR_MB = 0.92, 3.5, 3.5, 6.0, 3.0, 200.0
CONTENDERS = ("stream", "pool", "loader", "quick start")
LEVELS_FLOOR, IDENTICAL_FLOOR = 2, 0.98

Bars = list[dict[str, object]]


def main() -> int:
    """Check, measure, print; exit 0 when every bar that could be measured is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=REAL_PHOTOS, help="folder of real JPEGs; may be absent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the photos, once: shows that it runs")
    parser.add_argument("--scratch", help="where shards are written; the system's default otherwise")
    options = parser.parse_args()
    if usable_cpus() > NUM_CPUS:
        # The floors are those of two cores; threads that start later inherit this.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CPUS])
    torch.set_num_threads(min(NUM_CPUS, usable_cpus()))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sets = photo_sets(Path(scratch), real_photos(options.photos), 1 if options.quick else 4)
        distinct = [photo for photos in sets if photos.name != "mixed" for photo in photos.distinct]
        drift = drift_of(Path(scratch), [*distinct, *odd_photos()])
        bars = parity_bars(drift)
        if drift.is_within(LEVELS_FLOOR, IDENTICAL_FLOOR):
            bars += speed_bars(sets, 1 if options.quick else options.rounds)
            street = sets[0].distinct
            bars += walk_bars(Path(scratch), street, 200 if options.quick else 1500)
            bars += memory_bars(Path(scratch), street, (200, 400) if options.quick else (500, 4000))
    libraries = ("torch", "numpy", "pillow", "simplejpeg", "webdataset", "open_clip_torch", "transformers")
    return report("stream", bars, libraries)


def photo_sets(folder: Path, real: Sequence[bytes], size: int) -> list[PhotoSet]:
    """What is measured on; `size` scales the number of photos."""
    street, camera = street_photos(24), large_photos(4, 4032, 2)
    mixed = [photo for large in camera[:2] for photo in (large, *street[:23])]
    return [
        packed(folder, "street 640", street, 16 * size, 8 * size),
        packed(folder, "2 MP", large_photos(6, 1632, 1), 4 * size, 2 * size),
        packed(folder, "12 MP", camera, size, 2),
        packed(folder, "mixed", mixed, 12 * size, 6 * size),
        *([packed(folder, "real", real, 7 * size, 4 * size)] if real else []),
    ]


def parity_bars(drift: Drift) -> Bars:
    """What was compared before anything was timed."""
    return [
        bar("photos unlike CLIPImageProcessor's", drift.num_unlike, "photos", floor=0, is_lower=True),
        bar("drift from PIL's bicubic", drift.max_levels, "levels", floor=LEVELS_FLOOR, is_lower=True),
        bar("values identical to PIL's, least photo", drift.min_identical, "share", floor=IDENTICAL_FLOOR),
    ]


def speed_bars(sets: Sequence[PhotoSet], rounds: int) -> Bars:
    """Everybody on every set, in turns."""
    threads = min(NUM_CPUS, usable_cpus())
    workers = max(range(1, NUM_CPUS + 2), key=lambda number: loader(sets[0].half(), number).photos_per_s)
    paces: dict[tuple[str, str], list[Pace]] = {}
    stages: dict[str, str] = {}
    for _ in range(rounds):
        for photos in sets:
            for _ in range(2):
                paces.setdefault((photos.name, "pool"), []).append(pool(photos, threads))
                pace, stats = stream(photos, threads)
                paces.setdefault((photos.name, "stream"), []).append(pace)
                stages[photos.name] = stats.limiting_stage
            paces.setdefault((photos.name, "loader"), []).append(loader(photos.half(), workers))
            limit = max(4, photos.num_photos // 8)
            paces.setdefault((photos.name, "quick start"), []).append(quick_start(photos, limit))
            last = {name: paces[photos.name, name][-1].photos_per_s for name in CONTENDERS}
            told = ", ".join(f"{name} {pace:.1f}" for name, pace in last.items())
            print(f"{photos.name}: {told} photos/s; the stream is limited by {stages[photos.name]}", file=sys.stderr)
    bars: Bars = []
    for photos in sets:
        is_street = photos is sets[0]
        ours, bare, others, quick = (paces[photos.name, name] for name in CONTENDERS)
        of_pool, of_loader, of_quick = ratio(ours, bare), ratio(ours[1::2], others), ratio(ours[1::2], quick)
        named = f"{photos.name}, {workers} workers"
        bars += [
            bar(f"stream / bare decode + resize pool, {photos.name}", of_pool, "ratio", floor=POOL_FLOOR),
            bar(f"the same in CPU time, {photos.name}", ratio(ours, bare, "cpu_ms"), "ratio"),
            bar(
                f"stream / webdataset + DataLoader + open_clip transform, {named}",
                of_loader,
                "ratio",
                floor=LOADER_FLOOR if is_street else None,
            ),
            bar(
                f"stream / quick start's loop, {photos.name}",
                of_quick,
                "ratio",
                floor=QUICK_FLOOR if is_street else None,
                goal=QUICK_GOAL if is_street else None,
            ),
            bar(f"stream, {photos.name}", middle(ours), "photos/s"),
        ]
    return bars


def walk_bars(folder: Path, photos: Sequence[bytes], count: int) -> Bars:
    """Reading one shard from the page cache, nothing decoded; in CPU time, for one thread that never waits."""
    shard = folder / "walk.tar"
    write_shard(shard, [photos[row % len(photos)] for row in range(count)])
    seconds: dict[str, list[float]] = {name: [] for name in WALKS}
    for turn in range(10):
        for name, walk in WALKS.items():
            started = time.thread_time()
            assert walk(str(shard)) == count, f"{name} found other photos"
            if turn > 0:
                seconds[name].append(time.thread_time() - started)
    bars = [
        bar(f"tar walk, {name}", round(count / statistics.median(found)), "samples per CPU second")
        for name, found in seconds.items()
    ]
    for name, floor in (("webdataset", WALK_FLOOR), ("tarfile", None)):
        pairs = zip(seconds[name], seconds["ours"], strict=True)
        value = round(statistics.median(theirs / ours for theirs, ours in pairs), 3)
        bars.append(bar(f"tar walk / {name}'s iterator", value, "ratio", floor=floor))
    return bars


def memory_bars(folder: Path, photos: Sequence[bytes], counts: Sequence[int]) -> Bars:
    """Peak RssAnon above the ring and what as many threads need that decode alone, for a small and a large shard."""
    batch_size, threads = 64, min(NUM_CPUS, usable_cpus())
    ring_mb = RING * batch_size * SIDE * SIDE * 3 / 2**20
    bars = []
    for count in counts:
        shard = folder / f"memory-{count}.tar"
        write_shard(shard, [photos[row % len(photos)] for row in range(count)])
        peak_mb = {kind: peak(kind, threads, batch_size, shard, count) for kind in ("pool", "stream")}
        above_mb = round(peak_mb["stream"] - peak_mb["pool"] - ring_mb, 1)
        name = f"peak RssAnon above ring and decoders, shard of {shard.stat().st_size / 1e6:.0f} MB"
        bars.append(bar(name, above_mb, "MB", floor=MEMORY_FLOOR_MB, is_lower=True))
        shard.unlink()
    return bars


def peak(kind: str, threads: int, batch_size: int, shard: Path, count: int) -> float:
    """MB, in a process of its own."""
    script = Path(__file__).with_name("stream_memory.py")
    command = [sys.executable, str(script), kind, str(threads), str(batch_size), str(shard)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(ran.stdout)
    assert found["photos"] == count, f"{kind} found {found['photos']} of {count} photos"
    return float(found["peak_mb"])


def ratio(ours: Sequence[Pace], theirs: Sequence[Pace], by: str = "photos_per_s") -> float | None:
    """The median of our pace over theirs, pair by pair; None where there is but one core."""
    if usable_cpus() < NUM_CPUS:
        return None
    pairs = [(getattr(a, by), getattr(b, by)) for a, b in zip(ours, theirs, strict=True)]
    return round(statistics.median(b / a if by == "cpu_ms" else a / b for a, b in pairs), 3)


def middle(paces: Sequence[Pace]) -> float:
    """The median pace."""
    return round(statistics.median(pace.photos_per_s for pace in paces), 1)


if __name__ == "__main__":
    raise SystemExit(main())
