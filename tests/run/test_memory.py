"""Memory stays flat however many photos there are, in many shards or in one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_world import draw_jpeg, write_tar

MAX_RATIO = 1.2


def peak_anonymous_mb(arguments: Sequence[str]) -> float:
    """Run a command to its end; the highest RssAnon seen, sampled every 20 ms."""
    command = [sys.executable, "-m", "geoloc_batch", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak_kb = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak_kb = max(peak_kb, int(line.split()[1]))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak_kb / 1024


@pytest.mark.slow
def test_twenty_thousand_photos_need_little_more_memory_than_two_thousand(tmp_path: Path) -> None:
    photos = [draw_jpeg(seed) for seed in range(200)]

    def shards(name: str, num_shards: int, num_photos: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for shard in range(num_shards):
            rows = range(shard * num_photos // num_shards, (shard + 1) * num_photos // num_shards)
            members = [
                (f"{row:06d}.{kind}", data)
                for row in rows
                for kind, data in (("jpg", photos[row % 200]), ("json", b'{"lat": 48.5, "lon": 9.5}'))
            ]
            write_tar(folder / f"{shard:06d}.tar", members)
        return str(folder)

    def peak(folder: str) -> float:
        return peak_anonymous_mb(["embed", folder, "--out", f"{folder}-out", "--encoder", "demo"])

    small = peak(shards("2000-in-2", 2, 2000))
    in_twenty = peak(shards("20000-in-20", 20, 20_000))
    in_one = peak(shards("20000-in-1", 1, 20_000))
    print(f"peak RssAnon: 2,000 in 2: {small:.0f} MB; 20,000 in 20: {in_twenty:.0f} MB; in one: {in_one:.0f} MB")
    assert in_twenty <= MAX_RATIO * small
    assert in_one <= MAX_RATIO * small
