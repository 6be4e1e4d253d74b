"""The one command for a CUDA machine: parts that fail are told and do not stop the others."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BAR = {"name": "speed", "value": 2.0, "floor": 1.5, "goal": None, "unit": "ratio", "met": True}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script's module, with its parts in a folder of this test."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    found = importlib.import_module("bench_gpu")
    monkeypatch.setattr(found, "SCRIPTS", tmp_path)
    return found


def said(bars: list[dict[str, Any]], code: int = 0) -> str:
    line = json.dumps({"bench": "it", "machine": {"gpu": "a chip"}, "versions": {}, "bars": bars})
    return f"print('progress'); print({line!r}); raise SystemExit({code})"


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, programs: dict[str, str], *flags: str) -> Any:
    """(exit code, table, JSON) of a run with parts of these programs, 3 s each."""
    for name, program in programs.items():
        if program:
            (bench.SCRIPTS / f"{name}.py").write_text(program)
    parts = tuple(bench.Part(name=name, script=f"{name}.py", budget_s=3, options=("--long",)) for name in programs)
    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(bench, "TOTAL_S", sum(part.budget_s for part in parts))
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *flags])
    code = bench.main()
    *table, line = capsys.readouterr().out.splitlines()
    return code, table, json.loads(line)


def test_bars_that_are_met_or_cannot_be_measured_give_exit_0_and_a_table(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    null = BAR | {"name": "elsewhere", "value": None, "met": None}
    figure = BAR | {"name": "rate", "floor": None, "met": None}
    programs = {"one": said([BAR, figure]), "two": said([null]), "three": ""}
    code, table, found = run(bench, monkeypatch, capsys, programs)
    assert code == 0
    assert [line.split() for line in table[:4]] == [
        ["part", "bar", "value", "floor", "goal", "met"],
        ["one", "speed", "2", "1.5", "null", "yes"],
        ["two", "elsewhere", "null", "1.5", "null", "null"],
        ["three", "everything", "(no", "three.py)", "null", "null", "null", "null"],
    ]
    assert [row["name"] for row in found["bars"]][:3] == ["one: speed", "one: rate", "two: elsewhere"]
    assert [part["status"] for part in found["parts"]] == ["done", "done", "skipped: no three.py"]
    assert (found["bench"], found["machine"]["gpu"]) == ("gpu", "a chip")


def test_a_bar_that_is_not_met_gives_exit_1(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    missed = said([BAR | {"value": 1.0, "met": False}], code=1)
    code, table, _ = run(bench, monkeypatch, capsys, {"one": missed, "two": said([BAR])})
    assert code == 1
    assert table[1].split()[-1] == "NO"
    assert table[2].split()[-1] == "yes"
    # A quick run measures too little to judge speed; a fault is one at any size.
    assert run(bench, monkeypatch, capsys, {"one": missed}, "--quick")[0] == 0
    fault = said([BAR | {"unit": "faults, lower is better", "met": False}], code=1)
    assert run(bench, monkeypatch, capsys, {"one": fault}, "--quick")[0] == 1


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise RuntimeError('no kernel image')", "without its line of JSON (RuntimeError: no kernel image)"),
        ("import os; os.abort()", "exit code -6"),
        ("print('{}')", "without its line of JSON"),
    ],
)
def test_a_part_that_crashes_is_told_and_the_others_go_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, program: str, words: str
) -> None:
    code, _, found = run(bench, monkeypatch, capsys, {"one": program, "two": said([BAR])})
    assert code == 1
    assert words in found["parts"][0]["status"]
    assert found["parts"][1]["status"] == "done"


HANGS = f"""
import sys
import time

sys.path.insert(0, {str(ROOT / "scripts")!r})
from report import bar, left_s

bar("speed", 1.0, "ratio", 1.5)
bar("speed", 2.0, "ratio", 1.5, 2.5)
bar("errors", 7, "faults", 0, is_lower=True)
print(f"{{left_s():.0f}} s are left", file=sys.stderr, flush=True)
time.sleep(60)
bar("never", 1.0, "ratio")
"""


def test_a_part_that_takes_too_long_keeps_the_figures_that_it_had(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, table, found = run(bench, monkeypatch, capsys, {"one": HANGS})
    assert code == 1
    status = found["parts"][0]["status"]
    assert status in (f"failed: more than 3 s, 2 figures kept ({left} s are left)" for left in (1, 2, 3)), status
    assert [line.split() for line in table[1:4]] == [
        ["one", "speed", "2", "1.5", "2.5", "yes"],
        ["one", "errors", "7", "0", "null", "NO"],
        ["one", "the", "rest", "(more", "than", "3", "s)", "null", "null", "null", "null"],
    ]
    assert found["bars"][0] == BAR | {"name": "one: speed", "goal": 2.5}
    assert [row["value"] for row in found["bars"]] == [2.0, 7, None]


@pytest.mark.parametrize("end", ["raise RuntimeError('no kernel image')", "import os; os.abort()"])
def test_a_part_that_crashes_keeps_the_figures_that_it_had(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, end: str
) -> None:
    code, table, found = run(bench, monkeypatch, capsys, {"one": HANGS.replace("time.sleep(60)", end)})
    assert code == 1
    assert ", 2 figures kept (" in found["parts"][0]["status"]
    assert [line.split()[-1] for line in table[1:4]] == ["yes", "NO", "null"]


def test_a_figure_that_was_cut_while_it_was_written_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    report = importlib.import_module("report")
    monkeypatch.setenv(report.KEPT, str(tmp_path / "bars"))
    whole = report.bar("whole", 1.0, "ratio")
    with (tmp_path / "bars").open("a") as file:
        file.write('{"name": "cut", "val')
    assert report.kept_bars(tmp_path / "bars") == [whole]
    assert report.kept_bars(tmp_path / "absent") == []


def test_a_part_gets_what_others_left_of_their_time_and_none_of_those_to_come(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    names = {"one": 10, "absent": 20, "two": 30, "three": 40}
    parts = tuple(bench.Part(name=name, script=f"{name}.py", budget_s=budget) for name, budget in names.items())
    for name in ("one", "two", "three"):
        (bench.SCRIPTS / f"{name}.py").touch()
    given = {}

    def ran(part: Any, left_s: float, *, is_quick: bool) -> Any:
        assert not is_quick
        given[part.name] = left_s
        return bench.Outcome(part=part.name, status="done", seconds=0.0, bars=[])

    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(bench, "TOTAL_S", 100)
    monkeypatch.setattr(bench, "run_part", ran)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench.main() == 0
    # Nothing took any time, and what is absent needs none.
    assert [round(seconds) for seconds in given.values()] == [30, 30, 60, 100]
    capsys.readouterr()


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_its_children(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    program = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    code, _, found = run(bench, monkeypatch, capsys, {"one": program})
    assert time.monotonic() - started < 30
    assert code == 1
    assert found["parts"][0]["status"] == "failed: more than 3 s"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_part_whose_libraries_are_absent_is_not_measurable(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (bench.SCRIPTS / "one.py").write_text("raise SystemExit('never run')")
    monkeypatch.setattr(
        bench, "PARTS", (bench.Part(name="one", script="one.py", budget_s=3, needs=("sys", "no_such_library")),)
    )
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parts"][0]["status"] == "skipped: no_such_library not installed"


def test_without_open_clip_its_parts_are_skipped_by_its_name_and_nothing_has_failed() -> None:
    # Without the folder of what is installed.
    command = [sys.executable, "-S", ROOT / "scripts" / "bench_gpu.py", "--only", "checks", "--only", "encoder"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [part["part"] for part in found["parts"]] == ["checks", "encoder"]
    for part in found["parts"]:
        assert part["status"].startswith("skipped: torchvision, open_clip")
        assert part["status"].endswith(" not installed")


def test_the_budgets_keep_the_whole_under_9_minutes(bench: Any) -> None:
    assert sum(part.budget_s for part in bench.PARTS) <= bench.TOTAL_S < 540
    assert all((ROOT / "scripts" / part.script).exists() for part in bench.PARTS)


@pytest.mark.slow
def test_the_quick_run_goes_through_every_part() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_gpu.py", "--quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {part["part"] for part in found["parts"] if part["status"] == "done"} >= {
        "checks",
        "encoder",
        "main job",
        "stream",
    }
    bars = {row["name"]: row for row in found["bars"]}
    for precision in ("fp32", "bf16"):
        assert bars[f"checks: {precision}: rows that change with their place or their neighbours"]["met"] is True
