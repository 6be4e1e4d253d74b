from __future__ import annotations

import importlib
import json
import subprocess
import sys
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
    for name in ("make_shards", "make_parts", "compare"):
        monkeypatch.setattr(bench, name, lambda *_: None)
    monkeypatch.setattr(bench, "quick_start", lambda _folder, photos, _device: ([], len(photos) / 10))
    monkeypatch.setattr(bench, "model_rate", lambda *_: 100.0)
    monkeypatch.setattr(bench, "run", lambda *_, **__: SimpleNamespace(rows=900, seconds=10.0, limiting_stage="encode"))
    bars = bench.measure(bench.TINY, tmp_path, SimpleNamespace(type=kind), 3)
    assert [bar["value"] for bar in bars[:5]] == [0.9, 9.0, 90.0, 100.0, 10.0]
    assert [bar["value"] for bar in bars[5:]] == ([0.9, 9.0] if kind == "cuda" else [None, None])
    assert [bars[row]["met"] for row in (0, 1, 5, 6)] == met


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
    assert list(tmp_path.iterdir()) == []
