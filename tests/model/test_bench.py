"""The encoder's benchmark runs, and judges nothing where it was asked to be quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_proves_fidelity_and_ends_with_one_json_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_encoder.py", "--quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["bench"] == "encoder"
    bars = {row["name"]: row for row in said["bars"]}
    for precision in ("fp32", "bf16"):
        assert bars[f"ViT 2x64: allowed / measured error, {precision}"]["value"] > 1
        assert bars[f"ViT 2x64: ours {precision}"]["value"] > 0
    assert {"open_clip fp32", "transformers fp32", "quick start, batch 1, fp32"} <= {
        name.partition(": ")[2] for name in bars
    }
    assert all(row["met"] is None for row in said["bars"])
