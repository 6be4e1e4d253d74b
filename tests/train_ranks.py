"""Train with several ranks on this machine, again and again. Prints for each training how each rank ended, and when.

Run as a program, so that the ranks are forked from a process that has no threads and need not import anything again.

    python train_ranks.py JSON

JSON: a list of trainings, each {"size": ranks, "arguments": of geoloc, "others": those of all ranks but the first,
where they differ, "before": those of a command that the same processes run first, "signals": {rank: number}}. The
signals are sent when a checkpoint was written, and a moment later.
For each training a list: [[exit code of each rank], seconds from the signals, or the start, to the end of the last].
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from train_kill_loop import main, until_another

LIMIT_S = 60
_WITHIN_S = 0.05


def train(
    dice: random.Random,
    size: int,
    arguments: list[str],
    others: list[str] | None = None,
    signals: dict[str, int] | None = None,
    before: list[str] | None = None,
) -> tuple[list[int], float]:
    """Exit codes of the ranks, -SIGALRM where one hung, and seconds until the last had ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    commands = [[*([before] if before else []), (others or arguments) if rank else arguments] for rank in range(size)]
    ranks = [start(rank, size, port, commands[rank]) for rank in range(size)]
    if signals:
        until_another(Path(arguments[arguments.index("--out") + 1]) / "_checkpoint.pt")
        time.sleep(dice.uniform(0, _WITHIN_S))
    begun = time.monotonic()
    for rank, number in (signals or {}).items():
        os.kill(ranks[int(rank)], number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
    return codes, round(time.monotonic() - begun, 3)


def start(rank: int, size: int, port: int, commands: list[list[str]]) -> int:
    """A rank as torchrun would start it; it runs commands one after the other, and ends as the last one does."""
    child = os.fork()
    if child:
        return child
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.alarm(LIMIT_S)
    os._exit([main(arguments) for arguments in commands][-1])


def run_all(trainings: list[dict[str, Any]]) -> list[tuple[list[int], float]]:
    """All of them, one after the other."""
    dice = random.Random(7)
    return [train(dice, **each) for each in trainings]


if __name__ == "__main__":
    print(json.dumps(run_all(json.loads(sys.argv[1]))))
