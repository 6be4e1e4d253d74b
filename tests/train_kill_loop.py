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

# What a training imports late: once here rather than once a process.
import accelerate  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import pandas  # noqa: F401
import pyarrow.dataset  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.spatial  # noqa: F401
import torch._dynamo  # noqa: F401

from geoloc_batch.cli import main
from geoloc_batch.train import commands  # noqa: F401

MEAN_S = 0.12


def run(arguments: list[str], wait_s: float | None, number: signal.Signals = signal.SIGKILL) -> int:
    """A process that is sent the signal after `wait_s`; its exit code, negative where the signal ended it."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(main(arguments))
    if wait_s is not None:
        time.sleep(wait_s)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    dice, arguments = random.Random(int(sys.argv[1])), sys.argv[2:]
    # The first is asked politely.
    codes = [run(arguments, 2 * MEAN_S * (0.5 + dice.random()), signal.SIGTERM)]
    while codes[-1] != 0:
        # Later ones are left alone for longer, until one comes to its end on however slow a machine.
        codes.append(run(arguments, MEAN_S * (0.5 + dice.random()) * 1.2 ** len(codes)))
    print(*codes)
