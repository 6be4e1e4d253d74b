from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_train.py"


@pytest.mark.slow
def test_the_quick_benchmark_trains_by_the_command_and_compares_both_positions(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--scratch", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert not any(bar["met"] for bar in told["bars"])
    ratio = next(bar["value"] for bar in told["bars"] if bar["name"].startswith("epoch / its matrix products"))
    assert 0.5 < ratio < 100
    for heads in told["loss"].values():
        # Both positions are of the same cells, and places of their own.
        assert heads["top1"]["top_1"] == heads["mean"]["top_1"]
        assert heads["top1"]["median_km"] != heads["mean"]["median_km"]
        assert all(0 < heads[position]["median_km"][0] < 3000 for position in ("top1", "mean"))
    assert [(row["cells"], row["loss"]) for row in told["sweep"]] == [
        (cells, loss) for loss in ("weighted-ce", "weighted-ce+haversine") for cells in (20, 60)
    ]
    assert not list(tmp_path.iterdir())
