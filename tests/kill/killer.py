"""Runs `geoloc embed`, or `retry`, killed at every file operation in turn, then again; prints what it found as JSON.

    LD_PRELOAD=shim.so python killer.py SHIM embed SHARDS SCRATCH [KIND ...]
    LD_PRELOAD=shim.so python killer.py SHIM retry SHARDS SCRATCH [KIND ...]

A retry starts from SCRATCH/before, the output folder of a run over damaged shards, which have been replaced by SHARDS
since. The command runs in forked children of one process that has everything imported, so that a trial takes a
fraction of a second. The shim (shim.c) kills a child just before its N-th operation of one kind under its output
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from geoloc_batch.cli import main

KINDS = ("openat", "write", "fsync", "link", "rename", "unlink", "mkdir")


def tree(out: Path) -> dict[str, bytes]:
    """The result files by their path below `out`."""
    files = (path for path in out.rglob("*") if path.is_file())
    names = {path.relative_to(out): path for path in files}
    return {
        str(name): path.read_bytes()
        for name, path in names.items()
        if not name.parts[0].startswith("_") and name.suffix in {".npy", ".parquet"} and len(name.parts) > 1
    }


@dataclass(frozen=True)
class Case:
    """What is killed, and what must come of it all the same."""

    shim: ctypes.CDLL
    scratch: Path
    command: tuple[str, ...]
    is_retry: bool
    whole: dict[str, bytes]
    code: int
    """Exit code of an undisturbed run."""

    def run(self, out: Path) -> int:
        """The command, quietly."""
        return quietly(*(word.replace("OUT", str(out)) for word in self.command))

    def prepare(self, out: Path) -> None:
        """What is there before the command."""
        shutil.rmtree(out, ignore_errors=True)
        if self.is_retry:
            shutil.copytree(self.scratch / "before", out)


def quietly(*arguments: str) -> int:
    """A command without its words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(list(arguments))


def in_child(case: Case, out: Path, kind: str, at: int) -> int:
    """Run the command in a fork, killed at the `at`-th operation; its wait status."""
    child = os.fork()
    if child == 0:
        case.shim.kill_shim_arm(kind.encode(), at, str(out).encode())
        code = 70
        try:
            code = case.run(out)
        finally:
            os._exit(code)
    end = time.monotonic() + 120
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"{kind} {at}: the run hangs")
        time.sleep(0.002)


def trials(case: Case, kind: str) -> int:
    """Kill at 1, 2, 3, ... until a run gets through; the number of kills. Raises where a resumed run differs."""
    at = 0
    while True:
        at += 1
        out = case.scratch / "out"
        case.prepare(out)
        status = in_child(case, out, kind, at)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if was_killed:
            status = in_child(case, out, "none", 0)
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != case.code:
            raise AssertionError(f"{kind} {at}: the run ended with wait status {status}")
        if tree(out) != case.whole:
            raise AssertionError(f"{kind} {at}: the results differ from an undisturbed run's")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            if main(["verify", str(out)]) != 0:
                raise AssertionError(f"{kind} {at}: verify says {said.getvalue()}")
        if not was_killed:
            return at - 1


def all_trials() -> None:
    """As the module says."""
    library, name, shards, scratch = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    shim = ctypes.CDLL(library)
    shim.kill_shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p]
    # With one thread torch keeps no pool, which a fork would leave without its threads.
    torch.set_num_threads(1)
    embed = ("embed", shards, "--out", "OUT", "--encoder", "demo", "--batch-size", "4")
    code = quietly(*(word.replace("OUT", str(scratch / "whole")) for word in embed))
    command = embed if name == "embed" else ("retry", "OUT", "--unit", "0", "--unit", "1")
    case = Case(shim, scratch, command, name == "retry", tree(scratch / "whole"), code)
    found = {kind: trials(case, kind) for kind in sys.argv[5:] or KINDS}
    print(json.dumps({"kills": found, "files": sorted(case.whole), "code": code}))


if __name__ == "__main__":
    all_trials()
