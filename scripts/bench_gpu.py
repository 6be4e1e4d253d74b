"""Everything that can be measured on a CUDA machine, in under 9 minutes, with no network: checks, then speed.

    python scripts/bench_gpu.py            # or: make bench-gpu
    python scripts/bench_gpu.py --quick    # tiny models, a few photos, also on a CPU: shows that all of it runs
    python scripts/bench_gpu.py --only encoder --only checks

Each part is a process of its own with a budget of seconds, and what earlier parts left of theirs. One that crashes or
takes longer is said to have, its figures up to then are kept, and the others go on; one that is not there, or whose
libraries are not installed, counts as not measurable. At the end a table of the bars that have a floor (null: not
measurable here), then one line of JSON with every figure. Exit 0 when every bar that could be measured is met and no
part failed. Parts make their own weights and photos.
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

from report import KEPT, UNTIL, Bar, bar, kept_bars, report

SCRIPTS = Path(__file__).resolve().parent
TOTAL_S = 535.0
NOT_MADE = "not made"
# What geoloc_batch imports on the way to an encoder, to photos' pixels, and through a whole run.
ENCODER = ("torchvision", "open_clip")
PHOTOS = ("PIL", "simplejpeg")
RUN = (*ENCODER, *PHOTOS, "accelerate", "pyarrow", "safetensors", "scipy", "tyro", "transformers")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One script, how it is called and what it may cost."""

    name: str
    script: str
    budget_s: float
    options: tuple[str, ...] = ()
    """On a GPU; with --quick it gets that alone."""
    needs: tuple[str, ...] = ()
    """Libraries without which it does not run."""

    def why_not(self) -> str:
        """Why it cannot run here; "" where it can."""
        if not (SCRIPTS / self.script).exists():
            return f"no {self.script}"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else ""


# Seconds on an H200, compilers starting from nothing: together at most TOTAL_S.
PARTS = (
    Part(name="checks", script="check_gpu.py", budget_s=85, needs=ENCODER),
    Part(name="encoder", script="bench_encoder.py", budget_s=150, options=("--repeats", "5"), needs=(*ENCODER, "PIL")),
    Part(name="main job", script="bench_main_job.py", budget_s=130, needs=RUN),
    Part(name="kernels", script="bench_kernels.py", budget_s=95, needs=("triton", "mpmath", "scipy")),
    Part(
        name="stream",
        script="bench_stream.py",
        budget_s=75,
        options=("--rounds", "1"),
        needs=(*ENCODER, *PHOTOS, "transformers", "webdataset", "accelerate"),
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
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    until = time.monotonic() + TOTAL_S
    outcomes = []
    for number, part in enumerate(chosen):
        # What others left of their time, and never a second of those that are still to come.
        kept_s = sum(other.budget_s for other in chosen[number + 1 :] if not other.why_not())
        # Nobody waits for a quick run, and processors are slower than it is judged by.
        left_s = 600.0 if options.quick else until - kept_s - time.monotonic()
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
    if why := part.why_not():
        return Outcome(part=part.name, status=f"skipped: {why}", seconds=0.0, bars=[null_bar("everything", why)])
    print(f"{part.name}: {part.script}, at most {left_s:.0f} s", file=sys.stderr, flush=True)
    command = [sys.executable, str(SCRIPTS / part.script), *(("--quick",) if is_quick else part.options)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kept, out, errors = (Path(folder) / name for name in ("bars", "out", "errors"))
        why = wait_for(command, out, errors, kept, left_s)
        seconds = round(time.monotonic() - started, 1)
        said, told = (path.read_text(encoding="utf-8", errors="replace") for path in (out, errors))
        rows = kept_bars(kept)
    print(told, file=sys.stderr, flush=True)
    found = last_json(said)
    if found is None or why:
        why = why or "it ended without its line of JSON"
        print(f"{part.name} failed, {why}", file=sys.stderr, flush=True)
        lines = [line for line in told.splitlines() if line.strip()][-1:]
        had = f", {len(rows)} figures kept" if rows else ""
        status = f"failed: {why}{had}{''.join(f' ({line.strip()[:100]})' for line in lines)}"
        rows.append(null_bar("the rest" if rows else "everything", why))
        return Outcome(part=part.name, status=status, seconds=seconds, bars=rows)
    gpu = found.get("machine", {}).get("gpu")
    return Outcome(part=part.name, status="done", seconds=seconds, bars=found["bars"], gpu=gpu)


def wait_for(command: list[str], out: Path, errors: Path, kept: Path, left_s: float) -> str:
    """Run a command with its children.

    Args:
        command: of a benchmark.
        out: gets its stdout.
        errors: gets its stderr.
        kept: gets its bars as they are made.
        left_s: when it is ended.

    Returns:
        The reason why it was ended or crashed, "" where neither was.
    """
    root = SCRIPTS.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", KEPT: str(kept), UNTIL: str(time.time() + left_s)}
    with out.open("w") as stdout, errors.open("w") as stderr:
        # A session of its own: what it started is ended with it.
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, start_new_session=True, env=os.environ | given
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


def null_bar(what: str, why: str) -> Bar:
    """Stands for the bars that a part did not make."""
    return bar(f"{what} ({why})", None, NOT_MADE)


def unjudged(row: dict[str, Any]) -> dict[str, Any]:
    """A bar of a quick run: faults count, speed does not."""
    return row if row["unit"].startswith("faults") else row | {"met": None}


def table(outcomes: list[Outcome]) -> str:
    """The bars that have a floor, and the parts that have no bars."""
    rows = [("part", "bar", "value", "floor", "goal", "met")]
    for outcome in outcomes:
        for row in outcome.bars:
            if row["floor"] is None and row["unit"] != NOT_MADE:
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
