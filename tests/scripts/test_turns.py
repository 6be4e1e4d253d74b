"""How contenders are timed, with a clock that the contenders move."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


class Clock:
    """A device on which a job takes what it says."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, [""]

    def job(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = found.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("turns")


def test_on_cuda_short_jobs_run_many_times_in_a_row_and_take_turns(clock: Clock, turns: Any) -> None:
    # The first call compiles.
    short = iter([5.0, *[0.001] * 1000])
    jobs = {"short": clock.job("short", lambda: next(short)), "long": clock.job("long", lambda: 0.3)}
    seconds = turns.in_turn(jobs, torch.device("cuda"), 3)
    assert seconds == {"short": pytest.approx(0.001), "long": pytest.approx(0.3)}
    calls = "".join(name[0] for name in clock.calls[1:])
    # Once to compile, once to learn how long it takes, then for 20 ms a turn.
    assert calls == "sl" + "sl" + ("s" * 20 + "l") * 3


def test_the_median_counts_no_warm_up(clock: Clock, turns: Any) -> None:
    spent = iter([90.0, 80.0, 1.0, 3.0, 2.0])
    found = turns.in_turn({"job": clock.job("job", lambda: next(spent))}, torch.device("cuda"), 3)
    assert found == {"job": 2.0}


def test_on_a_cpu_a_turn_is_one_call(turns: Any) -> None:
    clock = Clock()
    jobs = {name: clock.job(name, lambda: 0.0) for name in "ab"}
    assert set(turns.in_turn(jobs, torch.device("cpu"), 2)) == {"a", "b"}
    assert "".join(clock.calls) == "ab" * 4
