"""Runs `geoloc embed` killed at every file operation in turn, then resumed; prints what it found as JSON.

    LD_PRELOAD=shim.so python killer.py SHIM SHARDS SCRATCH [KIND ...]

The command runs in forked children of one process that has everything imported, so that a trial takes a fraction of a
second. The shim (shim.c) kills a child just before its N-th operation of one kind under its output folder.
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


def run(out: Path, shards: str) -> int:
    """The command, quietly. A damaged photo among the shards makes exit code 3 the right one."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(["embed", shards, "--out", str(out), "--encoder", "demo", "--batch-size", "4"])


def in_child(shim: ctypes.CDLL, out: Path, shards: str, kind: str, at: int) -> int:
    """Run the command in a fork, killed at the `at`-th operation; its wait status."""
    child = os.fork()
    if child == 0:
        shim.kill_shim_arm(kind.encode(), at, str(out).encode())
        code = 70
        try:
            code = run(out, shards)
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


def trials(shim: ctypes.CDLL, scratch: Path, shards: str, kind: str, whole: dict[str, bytes]) -> int:
    """Kill at 1, 2, 3, ... until a run gets through; the number of kills. Raises where a resumed run differs."""
    at = 0
    while True:
        at += 1
        out = scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        status = in_child(shim, out, shards, kind, at)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if was_killed:
            status = in_child(shim, out, shards, "none", 0)
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 3:
            raise AssertionError(f"{kind} {at}: the run ended with wait status {status}")
        if tree(out) != whole:
            raise AssertionError(f"{kind} {at}: the results differ from an undisturbed run's")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            if main(["verify", str(out)]) != 0:
                raise AssertionError(f"{kind} {at}: verify says {said.getvalue()}")
        if not was_killed:
            return at - 1


def all_trials() -> None:
    """As the module says."""
    library, shards, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    shim = ctypes.CDLL(library)
    shim.kill_shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p]
    # With one thread torch keeps no pool, which a fork would leave without its threads.
    torch.set_num_threads(1)
    assert run(scratch / "whole", shards) == 3
    whole = tree(scratch / "whole")
    kinds = sys.argv[4:] or KINDS
    found = {kind: trials(shim, scratch, shards, kind, whole) for kind in kinds}
    print(json.dumps({"kills": found, "files": sorted(whole)}))


if __name__ == "__main__":
    all_trials()
