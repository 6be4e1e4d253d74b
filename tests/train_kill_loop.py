"""Kill a training again and again, at random moments, until it comes to its end. Prints how each process ended.

Run as a program, so that the processes are forked from one that has no threads and need not import anything again.

    python train_kill_loop.py SEED ARGUMENTS OF geoloc
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# What a training imports late: once here rather than once a process.
import accelerate  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import pandas  # noqa: F401
import pyarrow.dataset  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.sparse.csgraph
import scipy.spatial  # noqa: F401
import torch._dynamo  # noqa: F401

from geoloc_batch.cli import main
from geoloc_batch.train import commands  # noqa: F401

MEAN_S = 0.12
CHECKPOINT_S = 60


def run(arguments: list[str], wait: Callable[[], None], number: signal.Signals = signal.SIGKILL) -> int:
    """A process that is sent the signal after `wait`; its exit code, negative where the signal ended it."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(main(arguments))
    wait()
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until_another(checkpoint: Path) -> None:
    """Wait for the end of an epoch, however fast or slow the machine is."""
    before, end = number_of(checkpoint), time.monotonic() + CHECKPOINT_S
    while number_of(checkpoint) in (None, before) and time.monotonic() < end:
        time.sleep(0.001)


def number_of(path: Path) -> int | None:
    """Tells the file that stands there now from an earlier one; None for none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    dice, arguments = random.Random(int(sys.argv[1])), sys.argv[2:]
    checkpoint = Path(arguments[arguments.index("--out") + 1]) / "_checkpoint.pt"
    # The first is asked politely. It and the second have ended an epoch and are far from their last.
    codes = [run(arguments, partial(until_another, checkpoint), number) for number in (signal.SIGTERM, signal.SIGKILL)]
    while codes[-1] != 0:
        # Later ones are left alone for longer, until one comes to its end on however slow a machine.
        codes.append(run(arguments, partial(time.sleep, MEAN_S * (0.5 + dice.random()) * 1.2 ** len(codes))))
    print(*codes)
