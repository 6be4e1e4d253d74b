from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_main_job")


def test_answers_that_differ_end_the_benchmark(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    cells = [[number, 3] for number in range(40)]
    table = pa.table({"key": [str(number) for number in range(40)], "topk_cell": cells})
    pq.write_table(table, tmp_path / "predictions" / "predictions_000000.parquet")
    bench.compare([[0, 4], [9, 3], *cells[2:]], tmp_path)
    with pytest.raises(AssertionError, match="other cells"):
        bench.compare([[0, 4], [9, 3], [8, 3], *cells[3:]], tmp_path)
    with pytest.raises(AssertionError, match="40 rows for 39 photos"):
        bench.compare(cells[1:], tmp_path)


@pytest.mark.parametrize(("kind", "met"), [("cpu", [None, True, None, None]), ("cuda", [None, None, False, False])])
def test_the_bars_of_a_gpu_are_null_elsewhere_and_judged_there(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, met: list[bool | None]
) -> None:
    pretend(bench, monkeypatch)
    bars = list(bench.measure(bench.TINY, tmp_path, SimpleNamespace(type=kind), 3))
    # One set a round, of all rounds until then.
    assert len(bars) == 3 * 8
    last = bars[-8:]
    assert [bar["name"] for bar in last] == [bar["name"] for bar in bars[:8]]
    assert [bar["value"] for bar in last[:6]] == [0.9, 9.0, 90.0, 100.0, 10.0, 0.5]
    assert [bar["value"] for bar in last[6:]] == ([0.9, 9.0] if kind == "cuda" else [None, None])
    assert [last[row]["met"] for row in (0, 1, 6, 7)] == met


def test_no_round_begins_that_would_not_end_in_time(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    pretend(bench, monkeypatch)
    monkeypatch.setattr(bench, "left_s", lambda: -1.0)
    bars = list(bench.measure(bench.TINY, tmp_path, SimpleNamespace(type="cuda"), 3))
    assert len(bars) == 8
    assert "too little time is left for more than 1 rounds" in capsys.readouterr().err


def pretend(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("make_shards", "make_parts", "compare"):
        monkeypatch.setattr(bench, name, lambda *_: None)
    monkeypatch.setattr(bench, "street_photos", lambda count: [b""] * count)
    monkeypatch.setattr(bench, "quick_start", lambda _folder, photos, _device: ([], len(photos) / 10))
    monkeypatch.setattr(bench, "model_rate", lambda *_: 100.0)
    monkeypatch.setattr(bench, "sample_seconds", lambda _: 0.5)
    monkeypatch.setattr(bench, "run", lambda *_, **__: SimpleNamespace(rows=900, seconds=10.0, limiting_stage="encode"))


@pytest.mark.slow
def test_the_rounds_and_the_encoder_alone_share_one_encoder_and_one_fp32_tower(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def counted(name: str, make: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            made.append(named.get("precision", name))
            return make(*given, **named)

        return counting

    monkeypatch.setattr(bench.encoders, "load_encoder", counted("encoder", bench.encoders.load_encoder))
    monkeypatch.setattr(bench.first_batch, "reference_of", counted("reference", bench.first_batch.reference_of))
    bench.share_encoders()
    case = replace(bench.TINY, precision="bf16")
    bars = list(bench.measure(case, tmp_path, bench.this_worker().device, 2))
    # fp32 for the comparison of answers; then one for the warm run, two rounds and the encoder alone.
    assert made == ["fp32", "bf16", "reference"]
    assert bars[-3]["name"].endswith("comparison with fp32 in a round")
    assert bars[-3]["value"] > 0


@pytest.mark.slow
def test_a_quick_run_measures_every_bar(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_main_job.py"), "--quick", "--scratch", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["bench"] == "main_job"
    assert all(set(bar) == {"name", "value", "floor", "goal", "unit", "met"} for bar in told["bars"])
    values = [bar["value"] for bar in told["bars"]]
    assert all(value > 0 for value in values[:5])
    # In fp32 there is nothing to compare.
    assert values[5] == 0
    assert list(tmp_path.iterdir()) == []
