"""Jobs as a user submits them, and what they work on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm.cluster import Cluster, processes_of
from small_world import tree_bytes

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "slurm"
FLAGS = ["--encoder", "demo", "--batch-size", "4"]
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    cluster: Cluster
    name: str
    logs: Path

    def state(self) -> str:
        return self.cluster.fields(self.name).get("JobState", "")

    def restarts(self) -> int:
        return int(self.cluster.fields(self.name).get("Restarts", -1))

    def text(self) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.glob(f"{self.name}.*")))

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        try:
            self.cluster.wait(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def end(self, seconds: float = 180) -> int:
        """Wait for the end. Returns the exit code of the batch script, 128 + signal where one ended it."""
        self.wait_for(lambda: self.state() in _ENDED, f"the end of job {self.name}", seconds)
        code, number = self.cluster.fields(self.name)["ExitCode"].split(":")
        return int(code) or (128 + int(number) if int(number) else 0)

    def codes(self) -> list[int]:
        """Exit codes of an array's tasks, in no order."""
        lines = self.cluster.run("scontrol", "--oneliner", "show", "job", self.name).splitlines()
        return [int(word[9:].split(":")[0]) for line in lines for word in line.split() if word[:9] == "ExitCode="]

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that runs now: not of the shell around it."""
        found: dict[int, int] = {}
        for process in processes_of(self.cluster.folder):
            with contextlib.suppress(OSError):
                folder = Path(f"/proc/{process}")
                words = dict(word.partition(b"=")[::2] for word in (folder / "environ").read_bytes().split(b"\0"))
                is_rank = b"geoloc_batch\0" in (folder / "cmdline").read_bytes()
                is_python = b"python" in Path(os.readlink(folder / "exe")).name.encode()
                if is_rank and is_python and words.get(b"SLURM_JOB_ID") == self.name.encode():
                    found[int(words[b"SLURM_PROCID"])] = process
        return found


Submit = Callable[..., Job]
"""Submits a script of slurm/: its name, its arguments, options of sbatch, more environment."""


@dataclass(frozen=True)
class World:
    """Shards of photos and a head that fits the demo's encoder."""

    root: Path
    shards: list[Path]
    head_flags: list[str]

    def piped(self, shards: list[Path], first: str = "true") -> list[str]:
        """The shards, each read after the shell has done something first. They are of unknown size: in order, then."""
        return [f"pipe:{first}; cat {shard}" for shard in shards]

    def gated(self, gate: Path, shards: list[Path]) -> list[str]:
        """The shards, none of which can be read until the gate's file is there."""
        return self.piped(shards, f"until [ -e {gate} ]; do sleep 0.1; done")


def num_done(out: Path) -> int:
    """Units that are committed."""
    return len(list((out / "_done").rglob("*.json")))


def num_leased(out: Path) -> int:
    """Units that somebody is at."""
    return len(list((out / "_leases").glob("0*")))


def same_results(out: Path, expected: Path) -> None:
    """Every result file of `out` is that of `expected`, byte for byte, and none is missing."""
    found, wanted = tree_bytes(out), tree_bytes(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
