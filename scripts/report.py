"""What every benchmark ends with: bars, the machine, versions, one line of JSON, an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Bar = dict[str, Any]


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
    return {"name": name, "value": value, "floor": floor, "goal": goal, "unit": told, "met": met}


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
