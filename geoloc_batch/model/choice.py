"""What is chosen by measurement: which backend computes attention, and in which mode the tower is compiled.

Contenders are timed in turns on the device itself, and the one with the least median is taken. Only on CUDA: elsewhere
both are fixed, so that every rank and every resumed run agrees without asking. On CUDA ranks agree because the first
of them pins what it has chosen.

Attention is timed wherever it is left open, in well under a second. Modes take minutes to compile: `geoloc warmup`
alone compares them, and leaves what it chose in the compile cache, where later processes find it by the same facts as
the graphs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from geoloc_batch.model.attention import BACKENDS, DEFAULT, Attention, AttentionShape
from geoloc_batch.model.batch_size import give_back
from geoloc_batch.whole_file import in_one_move

log = logging.getLogger("geoloc_batch")

MODES = ("default", "max-autotune-no-cudagraphs")
"""torch.compile's. The others replay graphs from buffers that the next batch writes over."""
# Enough to fill the largest chips, and a quarter of what the formula that writes all weights out needs at 256.
_PHOTOS = 64
_BUDGET_S = 0.5
_MODES_BUDGET_S = 10.0
_ROUNDS = 9
_CHOSEN = ("sdpa", "compile_mode")
# What compiles for minutes where a cache is lost has to gain something.
_WORTH = 0.99

Work = Callable[[], object]
Seconds = Callable[[Work], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen for one encoder at one batch size on one kind of device."""

    sdpa: str
    compile_mode: str


def is_measured(device: torch.device) -> bool:
    """Whether anything is chosen by measurement on this device."""
    return device.type == "cuda"


def stopwatch(device: torch.device) -> Seconds:
    """Seconds that a piece of work takes on a device."""
    if device.type != "cuda":
        return _host_seconds

    def seconds(work: Work) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return seconds


def _host_seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(contenders: Mapping[str, Work], seconds: Seconds, *, budget_s: float) -> dict[str, float]:
    """Median seconds of each contender that runs, measured in turns.

    Args:
        contenders: by name; one that raises RuntimeError, as torch's errors are, is left out.
        seconds: measures one of them once.
        budget_s: no new round is begun after that; the first call of each, which may compile, counts not towards it.
    """
    running = {}
    for name, work in contenders.items():
        try:
            seconds(work)
        except RuntimeError as error:
            log.debug("%s does not run here: %s", name, str(error).split("\n")[0])
        else:
            running[name] = work
    found: dict[str, list[float]] = {name: [] for name in running}
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, work in running.items():
            found[name].append(seconds(work))
        if time.perf_counter() - started > budget_s:
            break
    return {name: statistics.median(values) for name, values in found.items()}


def choose_sdpa(
    shape: AttentionShape | None, *, device: torch.device, batch_size: int | None = None, seconds: Seconds | None = None
) -> str:
    """The fastest of attention's backends at a tower's shape.

    Args:
        shape: of the tower; None for one of another kind.
        device: where it is timed.
        batch_size: of the run; what is timed is 64 photos at most.
        seconds: as stopwatch gives them; a test's own.

    Returns:
        Its name; default where there is nothing to choose.
    """
    if shape is None:
        return DEFAULT
    attention = Attention(shape, batch_size=min(batch_size or _PHOTOS, _PHOTOS), device=device)
    contenders = {name: partial(attention.run, name) for name in BACKENDS}
    found = medians(contenders, seconds or stopwatch(device), budget_s=_BUDGET_S)
    give_back(device)
    _tell("attention", found)
    return min(found, key=found.__getitem__, default=DEFAULT)


def choose_mode(contenders: Mapping[str, Work], seconds: Seconds) -> tuple[str, dict[str, float]]:
    """The fastest of torch.compile's modes; the default one unless another is more than 1 % faster.

    Args:
        contenders: by mode, each a whole batch through a tower that is compiled in it.
        seconds: as stopwatch gives them.

    Returns:
        The mode, and the median seconds of all that ran.
    """
    found = medians(contenders, seconds, budget_s=_MODES_BUDGET_S)
    _tell("a compiled batch", found)
    best = min(found, key=found.__getitem__, default=DEFAULT)
    return (best if found.get(best, 0) < _WORTH * found.get(DEFAULT, float("inf")) else DEFAULT), found


def _tell(what: str, found: Mapping[str, float]) -> None:
    log.info("%s takes %s", what, ", ".join(f"{1000 * value:.3f} ms by {name}" for name, value in found.items()))


def choice_file(root: Path, facts: Mapping[str, str], *, asked: str) -> Path:
    """Where a choice is kept: by the facts of the graphs that it is between, less what is chosen.

    Args:
        root: the compile cache.
        facts: of one of the graphs.
        asked: what --sdpa says: a backend that somebody asked for is no choice for those who asked for none.
    """
    known = {name: value for name, value in facts.items() if name not in _CHOSEN} | {"asked": asked}
    return root / f"choice-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]}.json"


def read_choice(root: Path | None, facts: Mapping[str, str], *, asked: str) -> Choice | None:
    """See choice_file. What `geoloc warmup` has chosen; None where it has not, or nobody can read it."""
    if root is None:
        return None
    try:
        found: dict[str, Any] = json.loads(choice_file(root, facts, asked=asked).read_bytes())["choice"]
        choice = Choice(sdpa=found["sdpa"], compile_mode=found["compile_mode"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return choice if choice.sdpa in (DEFAULT, *BACKENDS) and choice.compile_mode in MODES else None


def keep_choice(
    root: Path, facts: Mapping[str, str], choice: Choice, milliseconds: Mapping[str, float], *, asked: str
) -> None:
    """See choice_file. Leave a choice to later processes, with its facts and times for people.

    Raises:
        OSError: the folder cannot be written.
    """
    text = json.dumps({"choice": asdict(choice), "milliseconds": dict(milliseconds), "facts": dict(facts)}, indent=1)
    in_one_move(choice_file(root, facts, asked=asked), lambda part: part.write_text(text))
