"""One rank as a program: python store_rank.py OUT NUM_UNITS BEAT_S [stop-at-link | die-at-unit-N | seconds=S].

Prints each unit that it committed or lost.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from store_samples import CONFIG, make_units, with_steps, write_unit

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger


def stop_at_the_first_marker() -> OsFiles:
    """A process that is stopped just before it would publish a unit."""
    has_stopped = False

    def at_step(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal has_stopped
        if name == "link" and arguments[1].parent.parent.name == "_done" and not has_stopped:
            has_stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    return with_steps(at_step)


def main(out: Path, num_units: int, beat_s: float, how: str) -> None:
    ledger = Ledger(out, beat_s=beat_s, files=stop_at_the_first_marker() if how == "stop-at-link" else OsFiles())
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    poison = int(how.removeprefix("die-at-unit-")) if how.startswith("die") else -1
    held: list[Any] = []
    while (taken := ledger.acquire()) is not None:
        if taken != "wait":
            if taken.unit.index == poison:
                os.kill(os.getpid(), signal.SIGKILL)
            held.append(taken)
            # As an engine does: the next unit is taken before the last one is through.
            if len(held) < 2:
                continue
        elif not held:
            time.sleep(beat_s / 4)
            continue
        execution = held.pop(0)
        if how.startswith("seconds="):
            time.sleep(float(how.removeprefix("seconds=")))
        has_won = ledger.commit(execution, *write_unit(execution))
        print("committed" if has_won else "lost", execution.unit.index, flush=True)
    ledger.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "")
