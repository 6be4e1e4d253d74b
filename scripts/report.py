"""What every benchmark ends with: bars, the machine, versions, one line of JSON, an exit code.

Whoever starts a benchmark may name a file for its bars, which get there as they are made: those of a benchmark that is
ended early are not lost. It may also say until when there is time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Bar = dict[str, Any]

KEPT = "GEOLOC_BENCH_BARS"
"""Environment: the file for the bars."""
UNTIL = "GEOLOC_BENCH_UNTIL"
"""Environment: when the benchmark will be ended, seconds since 1970."""


def bar(
    name: str,
    value: float | None,
    unit: str,
    floor: float | None = None,
    goal: float | None = None,
    *,
    is_lower: bool = False,
) -> Bar:
    """One figure, and whether it reaches its floor; a value of None could not be measured here.

    Args:
        name: of the figure.
        value: what was measured.
        unit: of the value.
        floor: what it has to reach, None where it only informs.
        goal: what it should reach.
        is_lower: lower is better, and the floor a ceiling.
    """
    met = None
    if floor is not None and value is not None:
        met = value <= floor if is_lower else value >= floor
    told = f"{unit}, lower is better" if is_lower else unit
    row = {"name": name, "value": value, "floor": floor, "goal": goal, "unit": told, "met": met}
    if kept := os.environ.get(KEPT):
        with open(kept, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


def kept_bars(path: Path) -> list[Bar]:
    """What a benchmark had made when it ended: of bars of one name the last; nothing where there is no file."""
    rows: dict[str, Bar] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # The last line may have been cut.
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["name"]] = row
    return list(rows.values())


def left_s() -> float:
    """Seconds until the benchmark is ended; infinite where nobody said."""
    until = os.environ.get(UNTIL)
    return float(until) - time.time() if until else math.inf


def unjudged(bars: Sequence[Bar]) -> list[Bar]:
    """The same figures of a run too small to judge by."""
    return [row | {"met": None} for row in bars]


def report(bench: str, bars: Sequence[Bar], libraries: Sequence[str], *, gpu: str | None = None, **more: Any) -> int:
    """Print the line of JSON.

    Args:
        bench: its name.
        bars: the figures.
        libraries: whose versions matter; one that is not installed is left out.
        gpu: name of the device, None for a CPU.
        more: what else is told.

    Returns:
        The exit code: 0 where every bar that could be measured is met.
    """
    machine: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
    }
    if gpu is not None:
        machine["gpu"] = gpu
    versions = {"python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    print(json.dumps({"bench": bench, "machine": machine, "versions": versions, "bars": list(bars), **more}))
    return 0 if all(row["met"] is not False for row in bars) else 1
