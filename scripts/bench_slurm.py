"""How evenly an array of jobs shares one huge shard and many small ones, on a two-node SLURM of this machine.

    python scripts/bench_slurm.py
    python scripts/bench_slurm.py --photos 8000 --batch-s 0.2

`sbatch --array=0-3 slurm/embed.sh`, one rank a task. Half of the photos stand in one shard, which is cut into byte
ranges as a shard above 4 GiB is (the border is lowered for it: the shard has a few MB), the rest in shards of 50. Four
ranks have no four devices here: each waits for `--batch-s` after each batch, which stands for the device's time, and
their own work is small beside it. Ranks begin together, when all four have started and loaded their encoder: how long
that takes is the machine's affair. Then

    work      seconds of device time that the photos need: batches, if each were full, times --batch-s
    makespan  from the beginning to the last commit
    ratio     makespan over work / 4, at most 1.15

`verify` must agree, before anything counts. Where SLURM or root is absent the value is null.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report import Bar, bar, report

REPO = Path(__file__).resolve().parents[1]
RANKS, BATCH, SMALL = 4, 8, 50
CEILING = 1.15

# What a rank runs: geoloc, with a device that takes its time, a lower border for ranges, and a common beginning.
RANK = """
import functools, os, pathlib, sys, time
from geoloc_batch.run import drive, jobs
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.cli import main
batch_s, split_bytes, meeting = float(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
jobs.plan_units = functools.partial(jobs.plan_units, split_bytes=split_bytes)
encode, drive_on = Encoder.encode, jobs.drive
def encode_slowly(self, pixels):
    end = time.monotonic() + batch_s
    feature = encode(self, pixels)
    time.sleep(max(0.0, end - time.monotonic()))
    return feature
def drive_together(*arguments):
    Encoder.encode = encode_slowly
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < RANKS:
        time.sleep(0.01)
    return drive_on(*arguments)
jobs.drive = drive_together
sys.exit(main(sys.argv[4:]))
"""


def main() -> int:
    """Measure, print; exit 0 when the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=4000)
    parser.add_argument("--batch-s", type=float, default=0.2, help="seconds of a batch of 8 on the device")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, str(REPO / "tests" / "slurm"))
    from cluster import Cluster, why_absent

    reason = why_absent()
    if reason:
        print(f"not measured: {reason}", file=sys.stderr)
        return report("slurm", bars_of([], options.photos), ("torch",))
    ratios = []
    with tempfile.TemporaryDirectory() as scratch, Cluster() as cluster:
        huge = make_shards(Path(scratch, "shards"), options.photos)
        for repeat in range(options.repeats):
            ratios.append(measure(cluster, Path(scratch), repeat, huge // 6, options.photos, options.batch_s))
            print(f"ratio {ratios[-1]:.3f}", file=sys.stderr)
    return report("slurm", bars_of(ratios, options.photos), ("torch",))


def make_shards(folder: Path, num_photos: int) -> int:
    """One shard with half of the photos and small ones with the rest. Returns the bytes of the large one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=60)
    counts = [num_photos // 2, *[SMALL] * (num_photos // 2 // SMALL)]
    for index, count in enumerate(counts):
        with tarfile.open(folder / f"{index:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(count):
                info = tarfile.TarInfo(f"{index:06d}/{row:06d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return (folder / "000000.tar").stat().st_size


def measure(cluster: Any, scratch: Path, repeat: int, split_bytes: int, num_photos: int, batch_s: float) -> float:
    """Makespan of one array over its ideal."""
    out, meeting, script = (scratch / f"{name}{repeat}" for name in ("out", "meeting", "rank"))
    meeting.mkdir()
    script.write_text(RANK.replace("RANKS", str(RANKS)))
    words = ["--parsable", "--time=30", f"--array=0-{RANKS - 1}", "--wait", f"--output={scratch}/%A.%a.log"]
    arguments = [scratch / "shards", "--encoder", "demo", "--batch-size", BATCH, "--out", out]
    environment = {
        "GEOLOC": f"{sys.executable} {script} {batch_s} {split_bytes} {meeting}",
        "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
    }
    cluster.run("sbatch", *words, REPO / "slurm" / "embed.sh", *arguments, seconds=1800, **environment)
    from geoloc_batch import verify

    proof = verify(out)
    assert (proof.samples, proof.missing, proof.duplicates) == (num_photos, 0, 0), proof
    began = max(path.stat().st_mtime for path in meeting.iterdir())
    ended = max(path.stat().st_mtime for path in (out / "_done").rglob("*.json"))
    return (ended - began) / (num_photos / BATCH * batch_s / RANKS)


def bars_of(ratios: list[float], num_photos: int) -> list[Bar]:
    """The figure, null where nothing was measured."""
    value = round(statistics.median(ratios), 3) if ratios else None
    name = f"makespan of an array of {RANKS} over work / {RANKS}, {num_photos} photos, half in one shard"
    return [bar(name, value, "ratio", CEILING, 1.0, is_lower=True)]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
