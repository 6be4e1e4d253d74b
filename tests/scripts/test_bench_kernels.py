from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_kernels.py"


@pytest.mark.slow
def test_the_quick_benchmark_measures_errors_and_every_contender_and_judges_nothing() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "distances"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    bars = {bar["name"]: bar for bar in told["bars"]}
    assert all(bar["met"] is None for bar in bars.values())
    device = "cuda" if "gpu" in told["machine"] else "cpu"
    assert 0.1 < bars[f"{device}, paired float32: error anywhere"]["value"] < 3.5
    speeds = [bar["value"] for name, bar in bars.items() if name.startswith(device.upper()) and bar["unit"] == "ratio"]
    assert len(speeds) >= 4
    assert all(value > 0 for value in speeds)
