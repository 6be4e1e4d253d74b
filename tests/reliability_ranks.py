"""Ranks: `geoloc` in processes of their own that start in a moment, to be stopped, killed and counted.

Run as a script this is the parent of the ranks: it imports everything once, then forks a rank for each line on its
standard input. A rank is a process like any other; it only did not pay for its imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST_S = 90
IN_CREATE = 0x100


class Rank:
    """One process that runs one command."""

    def __init__(self, family: Family, pid: int, log: Path) -> None:
        self.pid = pid
        self._family = family
        self._log = log
        self._status: int | None = None

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal that ended it, None while it lives."""
        if self._status is None:
            self._status = self._family.ask({"poll": self.pid})
        return None if self._status is None else os.waitstatus_to_exitcode(self._status)

    @property
    def said(self) -> str:
        """All of its output."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code. A rank that hangs is killed, and fails the test; so does a traceback."""
        wait_for(lambda: self.code is not None, f"rank {self.pid} hangs")
        assert "Traceback" not in self.said, self.said
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        wait_for(lambda: self.code is not None, f"rank {self.pid} outlives SIGKILL")


class Family:
    """The parent of all ranks of a test module.

    Args:
        scratch: a folder for their output.
        under: a command that runs the parent, as strace does.
    """

    def __init__(self, scratch: Path, under: Sequence[str] = ()) -> None:
        self._scratch = scratch
        self._ranks: list[Rank] = []
        self._parent = subprocess.Popen(
            [*under, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, one answer."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the parent of the ranks has ended"
        return json.loads(answer)

    def start(self, *arguments: object, kill_on: Path | None = None) -> Rank:
        """Start `geoloc ARGUMENTS`. A photo with the bytes in the file `kill_on` is the decoder's death."""
        log = self._scratch / f"rank{len(self._ranks)}.log"
        request = {"run": [str(argument) for argument in arguments], "log": str(log), "kill_on": str(kill_on or "")}
        rank = Rank(self, self.ask(request), log)
        self._ranks.append(rank)
        return rank

    def run(self, *arguments: object, kill_on: Path | None = None) -> int:
        """Start a rank and wait for its exit code."""
        return self.start(*arguments, kill_on=kill_on).wait()

    def close(self) -> None:
        """End the ranks and their parent."""
        for rank in self._ranks:
            rank.kill()
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.stdout.close()
        self._parent.wait(10)


class Executions:
    """Counts the executions of each unit from now on: each makes one staging folder, and none vanishes unseen."""

    def __init__(self, out: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._names: set[str] = set()
        (out / "_staging").mkdir(parents=True, exist_ok=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._fd >= 0
        assert self._libc.inotify_add_watch(self._fd, os.fsencode(out / "_staging"), IN_CREATE) >= 0

    def __enter__(self) -> Executions:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def by_unit(self) -> Counter[int]:
        """How often each unit was begun."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                while data:
                    _, mask, _, length = struct.unpack_from("iIII", data)
                    assert mask & IN_CREATE, "the kernel's queue of events has overflown"
                    self._names.add(data[16 : 16 + length].rstrip(b"\0").decode())
                    data = data[16 + length :]
        units = (name.partition(".")[0] for name in self._names)
        return Counter(int(unit) for unit in units if unit.isdecimal())


def units_held(out: Path, pid: int) -> set[int]:
    """Units that are leased to a process and not done. A lease that says nothing yet may be its own."""
    held = set()
    for path in (out / "_leases").glob("[0-9]*.[0-9]"):
        unit = int(path.name.partition(".")[0])
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text()
            owner = json.loads(text)["owner"]["pid"] if text.endswith("}") else pid
            if owner == pid and unit not in units_done(out):
                held.add(unit)
    return held


def units_done(out: Path) -> set[int]:
    """Units with a marker."""
    return {int(path.stem) for path in (out / "_done").glob("*/*.json")}


def catch(rank: Rank, out: Path) -> set[int]:
    """Stop a rank by SIGSTOP while it has units in hand and a few are done. Gives the units."""
    while True:
        wait_for(lambda: len(units_done(out)) > 2 and units_held(out, rank.pid), "the rank takes no unit")
        rank.signal(signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "no stop")
        if held := units_held(out, rank.pid):
            return held
        rank.signal(signal.SIGCONT)


def wait_for(condition: Callable[[], object], otherwise: str) -> None:
    """Until it holds."""
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.003)


def serve(requests: Iterable[str]) -> None:
    """The parent's life: fork, poll."""
    import torch
    from small_world import make_shards

    from geoloc_batch.cli import main

    # With one thread torch keeps no pool, which a fork would leave without its threads.
    torch.set_num_threads(1)
    # A run imports what is imported inside functions: four seconds that no rank has to pay any more.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        make_shards(Path(scratch, "shards"), [1])
        assert main(["embed", f"{scratch}/shards", "--out", f"{scratch}/out", "--encoder", "demo"]) == 0
        assert main(["verify", f"{scratch}/out"]) == 0
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(status if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _be_a_rank(request)
        print(pid, flush=True)


def _be_a_rank(request: dict[str, Any]) -> None:
    from geoloc_batch.cli import main

    code = 70
    try:
        log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request["kill_on"]:
            _arm(Path(request["kill_on"]).read_bytes())
        code = main(request["run"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(deadly: bytes) -> None:
    """Make one photo kill the process that decodes it, as a fault in a decoder's C code does."""
    from geoloc_batch.stream import batches

    decode = batches.photo_pixels

    def decode_or_die(data: bytes, *arguments: Any, **options: Any) -> Any:
        if data == deadly:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(data, *arguments, **options)

    batches.photo_pixels = decode_or_die


if __name__ == "__main__":
    serve(sys.stdin)
