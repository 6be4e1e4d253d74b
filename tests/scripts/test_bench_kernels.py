from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_kernels.py"


def test_the_heads_contenders_for_cuda_run_on_what_there_is_and_carry_the_floors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    heads = importlib.import_module("kernel_heads")
    monkeypatch.setattr(heads, "matmul", lambda _: lambda: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    cases = [case._replace(num_rows=24, num_cells=case.num_cells // 100 + 40) for case in heads.CUDA_CASES]
    bars = {row["name"]: row for row in heads.cuda_bars(cases, 1, "cpu")}
    # Memory is CUDA's own; all the rest is what a machine without it lists as null.
    expected = {row["name"] for row in heads.cuda_null_bars(cases) if "memory" not in row["name"]}
    assert {name for name, row in bars.items() if row["floor"] is not None} == expected
    assert all(row["value"] > 0 for row in bars.values())
    floors = [(row["name"].partition(", ")[2], row["floor"]) for row in heads.cuda_null_bars(heads.CUDA_CASES)]
    assert floors == [
        ("16384 x 200000: eager / op", 2.5),
        ("16384 x 200000: compiled / op", 1.5),
        ("16384 x 200000: share of the 8192^3 product's rate", 0.55),
        ("16384 x 200000: memory / eager", 0.01),
        ("16384 x 1898: eager / op", 4.0),
        ("16384 x 1898: compiled / op", 2.5),
        ("64 x 200000: share of the copy's bandwidth", 0.75),
    ]
    capsys.readouterr()


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
