"""What exactly-once costs: the ledger's share of a run's time, from the run's own telemetry.

    python scripts/bench_ledger.py
    python scripts/bench_ledger.py --photos 2000 --repeats 1 --scratch /path/on/the/disk/to/measure
    python scripts/bench_ledger.py --slurm --photos 8000 --repeats 1

`embed` with the demo encoder on 640 x 640 JPEGs (16 distinct ones of 80 to 130 kB, repeated under other keys), in
shards of 1,000 and of 100. Of each run the last line of OUT/_logs is read:

    work     busy seconds of "ledger" (leases) and "commit" (checksums, fsync, marker, moves) over the run's seconds.
             Most of it runs in threads beside the encoder: an upper bound of what the ledger can cost.
    blocked  the part that may hold the encoder up: "ledger", for which the reader waits, "wait for write", for which
             the locate lane waits while the write lane is full (with tables, not with commits alone), and one commit,
             the mean one, for the last has nothing beside it. Also an upper bound.

With --slurm the run is `sbatch --nodes=2 --ntasks-per-node=2 slurm/embed.sh` on a two-node SLURM of this machine: four
ranks on one OUT. Each has its own log: seconds are summed over the ranks, from a rank's first look at the ledger to its
end, so that a share is one of the ranks' time. Ranks that share two cores stretch one another's seconds, those on the
ledger like the others.

Lower is better: the bar is met at or below its floor. Medians over the repeats. The photos must all be there, and
`verify` must agree, before anything counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report import Bar, bar, report

from geoloc_batch import embed, verify

REPO = Path(__file__).resolve().parents[1]
NUM_DISTINCT, SIDE = 16, 640
FLOOR = 0.01
KINDS = ("work", "blocked")


def main() -> int:
    """Measure, print; exit 0 when the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", help="where shards and results are written; the system's default otherwise")
    parser.add_argument("--slurm", action="store_true", help="on two nodes with two ranks each; needs root and SLURM")
    options = parser.parse_args()
    sizes = [size for size in (1000, 100) if size <= options.photos]
    measured: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, contextlib.ExitStack() as running:
        start = start_here
        if options.slurm:
            sys.path.insert(0, str(REPO / "tests" / "slurm"))
            from cluster import Cluster, why_absent

            if reason := why_absent():
                print(f"not measured: {reason}", file=sys.stderr)
                return report("ledger", [row for size in sizes for row in bars_of(size, [])], ("torch", "numpy"))
            start = partial(start_ranks, running.enter_context(Cluster()))
        photos = make_photos()
        for size in sizes:
            make_shards(Path(scratch, f"shards{size}"), photos, options.photos, size)
        for repeat in range(options.repeats):
            for size in sizes:
                out = Path(scratch, f"out{size}.{repeat}")
                start(Path(scratch, f"shards{size}"), out)
                found = shares(out, options.photos)
                print(f"shards of {size}: {json.dumps(found)}", file=sys.stderr)
                measured[size].append(found)
    bars = [row for size in sizes for row in bars_of(size, measured[size])]
    return report("ledger", bars, ("torch", "numpy"))


def bars_of(size: int, found: list[dict[str, float]]) -> list[Bar]:
    """Both shares, with a floor at shards of 1,000; seconds a unit and speed to judge other machines by."""
    names = (*KINDS, "work_per_unit_ms", "images_per_second")
    middle = {name: round(statistics.median(one[name] for one in found), 5) if found else None for name in names}
    floor = FLOOR if size == 1000 else None
    told = [(f"ledger {kind} / run, shards of {size}", middle[kind]) for kind in KINDS]
    return [
        *(bar(name, value, "share of the run's time", floor, is_lower=True) for name, value in told),
        bar(f"work_per_unit_ms, shards of {size}", middle["work_per_unit_ms"], "ms", is_lower=True),
        bar(f"images_per_second, shards of {size}", middle["images_per_second"], "images/s"),
    ]


def start_here(shards: Path, out: Path) -> None:
    """Embed in this process."""
    embed(str(shards), out=str(out), encoder="demo")


def start_ranks(cluster: Any, shards: Path, out: Path) -> None:
    """Embed in four ranks of a job."""
    words = ["--nodes=2", "--ntasks-per-node=2", "--time=30", "--wait", f"--output={out}.log"]
    environment = {"GEOLOC": f"{sys.executable} -m geoloc_batch", "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    arguments = [shards, "--encoder", "demo", "--out", out]
    cluster.run("sbatch", *words, REPO / "slurm" / "embed.sh", *arguments, seconds=1800, **environment)


def shares(out: Path, num_photos: int) -> dict[str, float]:
    """Check, and take the figures from the logs of all ranks."""
    found = verify(out)
    assert found.rows == num_photos, f"{found.rows} rows for {num_photos} photos"
    assert found.ok, found.problems
    work_s = blocked_s = seconds = 0.0
    per_rank = []
    for log in sorted((out / "_logs").glob("*.jsonl")):
        last = json.loads(log.read_text().splitlines()[-1])
        busy, commit_s = last["busy_s"], last["busy_s"].get("commit", 0.0)
        rank_s = busy["ledger"] + busy.get("wait for write", 0.0) + commit_s / max(1, last["units"])
        work_s += busy["ledger"] + commit_s
        blocked_s += rank_s
        seconds += last["seconds"]
        per_rank.append(rank_s / last["seconds"])
    return {
        "work": work_s / seconds,
        "blocked": blocked_s / seconds,
        "blocked_least": min(per_rank),
        "blocked_most": max(per_rank),
        "work_per_unit_ms": 1000 * work_s / found.units,
        "images_per_second": num_photos / seconds * len(per_rank),
    }


def make_photos() -> list[bytes]:
    """JPEGs of street-like size: smooth ground, fine grain."""
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(NUM_DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        ground = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        photo = np.clip(np.asarray(ground) + rng.normal(0, 9, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=85)
        photos.append(file.getvalue())
    sizes_kb = [len(photo) / 1000 for photo in photos]
    assert 80 <= min(sizes_kb) <= max(sizes_kb) <= 130, f"photos of {min(sizes_kb)} to {max(sizes_kb)} kB"
    return photos


def make_shards(folder: Path, photos: list[bytes], count: int, size: int) -> None:
    """`count` photos in tars of `size`, each photo with its json."""
    folder.mkdir()
    for first in range(0, count, size):
        with tarfile.open(folder / f"{first // size:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(first, min(first + size, count)):
                meta = json.dumps({"lat": 40 + row / count, "lon": 10 - row / count}).encode()
                for name, data in ((f"{row:06d}.jpg", photos[row % len(photos)]), (f"{row:06d}.json", meta)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    raise SystemExit(main())
