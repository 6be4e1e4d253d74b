"""What a CUDA machine is asked for, with seconds of no machine."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Images per second; of the matrix product TFLOP/s.
RATES = {
    "ours bf16 compiled": 1400.0,
    "ours fp8 compiled": 1750.0,
    "transformers bf16": 1000.0,
    "quick start, batch 1, fp32": 50.0,
    "8192^3 bf16 product": 790.0,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's module, on a machine where every contender is as fast as RATES says, or makes 700 images/s."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = importlib.import_module("bench_encoder")
    for name in ("make_clip", "reference_features"):
        monkeypatch.setattr(found, name, lambda *_: None)
    monkeypatch.setattr(found, "make_pixels", lambda _: torch.empty(0))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    monkeypatch.setattr(found, "relative_error", lambda *_: 0.001)
    encoder = SimpleNamespace(encode=lambda _: None, sdpa="cudnn", compile_mode="default")
    monkeypatch.setattr(found.Contenders, "_make_encoder", lambda *_: encoder)
    monkeypatch.setattr(found.Contenders, "_job", lambda _, contender: contender.name)
    monkeypatch.setattr(found.Contenders, "is_there", lambda *_: True)
    monkeypatch.setattr(found, "clocks", lambda: "")
    return found


def large(bench: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[list[str]]]:
    """Bars by name, and who took turns."""
    stages: list[list[str]] = []

    def in_turn(jobs: dict[str, str], device: torch.device, _: int) -> dict[str, float]:
        assert device.type == "cuda"
        stages.append(list(jobs))
        worth = {"8192^3 bf16 product": 2 * 8192**3 / 1e12, "quick start, batch 1, fp32": 1.0}
        return {name: worth.get(name, 256.0) / RATES.get(name, 700.0) for name in jobs}

    monkeypatch.setattr(bench, "in_turn", in_turn)
    case = replace(bench.LARGE, precisions=("bf16", "fp8"))
    rows = bench.measure(case, torch.device("cuda"), 5, is_traced=False)
    return {row["name"]: row for row in rows}, stages


def test_on_cuda_every_contender_runs_and_what_is_judged_comes_first(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bars, stages = large(bench, monkeypatch)
    ours, eager = "ours bf16 compiled", ["transformers bf16", "open_clip bf16", "quick start, batch 1, fp32"]
    assert stages == [
        [ours, "8192^3 bf16 product", "ours bf16", *eager],
        ["ours fp8 compiled", ours],
        [*(f"ours bf16, attention by {name}" for name in ("flash", "efficient", "cudnn", "math")), "ours fp8"],
        ["transformers bf16 compiled", ours],
        ["open_clip bf16 compiled", ours],
        ["ours bf16 compiled, max-autotune-no-cudagraphs", ours],
    ]
    assert "ours takes, where nothing is said, attention by cudnn, compiled: default" in capsys.readouterr().err
    named = {name.removeprefix("ViT-L/14-336"): row for name, row in bars.items()}
    # 1,400 photos of 381.92 GFLOP are 534.7 TFLOP.
    assert named[", bf16: TFLOP/s / same-run 8192^3 matmul"]["value"] == 0.677
    assert named[", bf16: ours compiled / transformers sdpa eager"]["value"] == 1.4
    assert named[": fp8 / bf16, ours compiled"]["value"] == 1.25
    assert named[", bf16: ours compiled / quick start's loop"]["value"] == 28
    assert named[", bf16: ours compiled / open_clip compiled"]["value"] == 2
    assert named["8192^3 bf16 product"]["value"] == 790
    judged = [row for row in bars.values() if row["floor"] is not None]
    assert [(row["floor"], row["goal"]) for row in judged] == [
        (1.0, None), (1.0, None), (0.58, 0.65), (1.25, 1.45), (1.2, 1.3)
    ]  # fmt: skip
    assert all(row["met"] for row in judged)


@pytest.mark.parametrize(("left_s", "num_stages"), [(10.0, 2), (30.0, 3), (85.0, 6)])
def test_where_time_is_short_what_is_judged_runs_and_then_what_is_cheap(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, left_s: float, num_stages: int
) -> None:
    monkeypatch.setattr(bench, "left_s", lambda: left_s)
    bars, stages = large(bench, monkeypatch)
    assert len(stages) == num_stages
    assert ("too little time is left for open_clip bf16 compiled" in capsys.readouterr().err) == (num_stages < 6)
    assert "ViT-L/14-336: fp8 / bf16, ours compiled" in bars


def test_features_that_are_off_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of bf16, then of fp8.
    errors = iter([0.001, 0.2])
    monkeypatch.setattr(bench, "relative_error", lambda *_: next(errors))
    bars, stages = large(bench, monkeypatch)
    assert bars["ViT-L/14-336: allowed / measured error, fp8"]["met"] is False
    assert not any("fp8" in name for stage in stages for name in stage)
    assert "ViT-L/14-336: fp8 / bf16, ours compiled" not in bars
