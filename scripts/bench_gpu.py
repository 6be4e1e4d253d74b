"""Everything that can be measured on a CUDA machine, in under 9 minutes, with no network: checks, then speed.

    python scripts/bench_gpu.py            # or: make bench-gpu
    python scripts/bench_gpu.py --quick    # tiny models, a few photos, also on a CPU: shows that all of it runs
    python scripts/bench_gpu.py --only encoder --only checks

Each part is a process of its own with a budget of seconds. One that crashes or takes longer is said to have, and the
others go on; one that is not there, or whose libraries are not installed, counts as not measurable. At the end
a table of the bars that have a floor (null: not measurable here), then one line of JSON with every figure. Exit 0 when
every bar that could be measured is met and no part failed. Parts make their own weights and photos.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from report import Bar, bar, report

SCRIPTS = Path(__file__).resolve().parent
TOTAL_S = 535.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One script, how it is called and what it may cost."""

    name: str
    script: str
    budget_s: float
    options: tuple[str, ...] = ()
    """On a GPU; with --quick it gets that alone."""
    needs: tuple[str, ...] = ()
    """Libraries without which it does not run; geoloc_batch's own are taken for granted."""


PARTS = (
    Part(name="checks", script="check_gpu.py", budget_s=110),
    Part(name="encoder", script="bench_encoder.py", budget_s=150, options=("--repeats", "5")),
    Part(
        name="main job", script="bench_main_job.py", budget_s=160, options=("--repeats", "2"), needs=("transformers",)
    ),
    Part(name="kernels", script="bench_kernels.py", budget_s=60),
    Part(
        name="stream",
        script="bench_stream.py",
        budget_s=90,
        options=("--rounds", "1"),
        needs=("transformers", "webdataset"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended, and its bars."""

    part: str
    status: str
    """done, skipped: WHY, or failed: WHY."""
    seconds: float
    bars: list[dict[str, Any]]
    gpu: str | None = None


def main() -> int:
    """Run the parts, print the table; exit 0 when every bar that could be measured is met and no part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="may be repeated")
    options = parser.parse_args()
    started = time.monotonic()
    outcomes = []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        # Nobody waits for a quick run, and processors are slower than it is judged by.
        left_s = 600.0 if options.quick else min(part.budget_s, TOTAL_S - (time.monotonic() - started))
        outcomes.append(run_part(part, left_s, is_quick=options.quick))
    if options.quick:
        outcomes = [replace(outcome, bars=[unjudged(row) for row in outcome.bars]) for outcome in outcomes]
    print(table(outcomes))
    bars = [{**row, "name": f"{outcome.part}: {row['name']}"} for outcome in outcomes for row in outcome.bars]
    parts = [{"part": one.part, "status": one.status, "seconds": one.seconds} for one in outcomes]
    gpu = next((outcome.gpu for outcome in outcomes if outcome.gpu), None)
    code = report("gpu", bars, (), gpu=gpu, parts=parts)
    return 1 if any(outcome.status.startswith("failed") for outcome in outcomes) else code


def run_part(part: Part, left_s: float, *, is_quick: bool) -> Outcome:
    """Run one part within its time."""
    script = SCRIPTS / part.script
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent or not script.exists():
        why = f"{', '.join(absent)} not installed" if absent else f"no {part.script}"
        return Outcome(part=part.name, status=f"skipped: {why}", seconds=0.0, bars=[null_bar(why)])
    print(f"{part.name}: {part.script}, at most {left_s:.0f} s", file=sys.stderr, flush=True)
    command = [sys.executable, str(script), *(("--quick",) if is_quick else part.options)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        why = wait_for(command, out, errors, left_s)
        seconds = round(time.monotonic() - started, 1)
        out.seek(0)
        errors.seek(0)
        said, told = out.read(), errors.read()
    print(told, file=sys.stderr, flush=True)
    found = last_json(said)
    if found is None or why:
        why = why or "it ended without its line of JSON"
        print(f"{part.name} failed, {why}", file=sys.stderr, flush=True)
        lines = [line for line in told.splitlines() if line.strip()][-1:]
        status = f"failed: {why}{''.join(f' ({line.strip()[:100]})' for line in lines)}"
        return Outcome(part=part.name, status=status, seconds=seconds, bars=[null_bar(why)])
    gpu = found.get("machine", {}).get("gpu")
    return Outcome(part=part.name, status="done", seconds=seconds, bars=found["bars"], gpu=gpu)


def wait_for(command: list[str], out: Any, errors: Any, left_s: float) -> str:
    """Run a command with its children; the reason why it was ended or crashed, "" where neither was."""
    root = SCRIPTS.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A session of its own: what it started is ended with it.
    process = subprocess.Popen(
        command, stdout=out, stderr=errors, start_new_session=True, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        code = process.wait(timeout=max(left_s, 0))
    except subprocess.TimeoutExpired:
        return f"more than {left_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # 1 is a bar that was not met, or a traceback: then the JSON is missing.
    return "" if code in (0, 1) else f"exit code {code}"


def last_json(said: str) -> dict[str, Any] | None:
    """The benchmark's last line, None where that is none of a benchmark's."""
    lines = said.splitlines()
    try:
        found = json.loads(lines[-1])
        return found if isinstance(found["bars"], list) else None
    except (IndexError, ValueError, KeyError, TypeError):
        return None


def null_bar(why: str) -> Bar:
    """Stands for the bars of a part that has none."""
    return bar(f"everything ({why})", None, "")


def unjudged(row: dict[str, Any]) -> dict[str, Any]:
    """A bar of a quick run: faults count, speed does not."""
    return row if row["unit"].startswith("faults") else row | {"met": None}


def table(outcomes: list[Outcome]) -> str:
    """The bars that have a floor, and the parts that have no bars."""
    rows = [("part", "bar", "value", "floor", "goal", "met")]
    for outcome in outcomes:
        for row in outcome.bars:
            if row["floor"] is None and not row["name"].startswith("everything"):
                continue
            met = {True: "yes", False: "NO", None: "null"}[row["met"]]
            figures = ("null" if row[name] is None else f"{row[name]:g}" for name in ("value", "floor", "goal"))
            rows.append((outcome.part, row["name"], *figures, met))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{outcome.part}: {outcome.status}, {outcome.seconds:.0f} s" for outcome in outcomes]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
