"""Jobs as a user submits them, and what they work on."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from slurm.cluster import Cluster, processes_of
from small_world import tree_bytes

from geoloc_batch.cli import main

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "slurm"
KILLS = 10
BESIDE = "beside"
"""Name of jobs that go on beside the tests."""
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
        """Process id of each rank that runs now: not of the shell around it, nor of its children."""
        found = [one for process in processes_of(self.cluster.folder) if (one := self._python(process)) is not None]
        pythons = {process for _, process, _ in found}
        # A child looks like its parent until it has become what it was made for.
        return {rank: process for rank, process, parent in found if parent not in pythons}

    def _python(self, process: int) -> tuple[int, int, int] | None:
        """(rank, id, parent's id) of a process that is our Python, in a rank of this job."""
        folder = Path(f"/proc/{process}")
        with contextlib.suppress(OSError):
            words = dict(word.partition(b"=")[::2] for word in (folder / "environ").read_bytes().split(b"\0"))
            is_ours = b"geoloc_batch\0" in (folder / "cmdline").read_bytes()
            is_python = "python" in Path(os.readlink(folder / "exe")).name
            if is_ours and is_python and words.get(b"SLURM_JOB_ID") == self.name.encode():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                return int(words[b"SLURM_PROCID"]), process, parent
        return None


Submit = Callable[..., Job]
"""Submits a script of slurm/: its name, its arguments, options of sbatch, more environment."""


@dataclass(frozen=True)
class World:
    """Shards of photos, a head that fits the demo's encoder, and what one process makes of them."""

    root: Path
    shards: list[Path]
    head_flags: list[str]
    _whole: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def piped(self, shards: list[Path]) -> list[str]:
        """The shards, each read after PAUSE_S seconds. They are of unknown size: in order, then."""
        return [f"pipe:sleep 0$PAUSE_S; cat {shard}" for shard in shards]

    def gated(self, shards: list[Path]) -> list[str]:
        """The shards, none of which can be read before the file GATE is there; where it is unset they are open."""
        return [f'pipe:until [ -z "$GATE" ] || [ -e "$GATE" ]; do sleep 0.1; done; cat {shard}' for shard in shards]

    def whole(self, command: str, *arguments: object) -> Path:
        """The results of a command in this process, nothing disturbing it. It is run once for all that ask."""
        words = (command, *map(str, arguments))
        if words not in self._whole:
            out = self.root / f"whole{len(self._whole)}"
            assert main([*words, "--out", str(out)]) == 0
            self._whole[words] = out
        return self._whole[words]


@dataclass(frozen=True)
class Halves:
    """A job over shards the second half of which cannot be read before the gate is open."""

    job: Job
    world: World
    out: Path
    gate: Path

    @staticmethod
    def shards(world: World) -> list[str]:
        """Six that can be read, then six that cannot."""
        return [*world.piped(world.shards[:6]), *world.gated(world.shards[6:12])]

    def until_some(self) -> None:
        """Wait until some units are committed."""
        self.job.wait_for(lambda: num_done(self.out) >= 3, "some units")

    def until_held_by(self, num_ranks: int) -> None:
        """Wait until so many ranks have a unit in hand."""
        self.job.wait_for(lambda: len(workers(self.out)) == num_ranks, f"{num_ranks} ranks at work")

    def go_on(self) -> None:
        """Open the gate."""
        self.gate.touch()

    def ends_whole(self) -> None:
        """The job completes what it has to do, and no byte differs from an undisturbed run's."""
        self.go_on()
        assert self.job.end() == 0, self.job.text()
        same_results(self.out, self.world.whole("embed", *self.shards(self.world), *FLAGS))
        assert main(["verify", str(self.out)]) == 0


Begin = Callable[..., Halves]
"""Submits embed.sh with Halves: options of sbatch, more environment."""


@dataclass(frozen=True)
class TenKills:
    """A job that is killed as a whole and submitted again, KILLS times, beside whatever else goes on."""

    out: Path
    shards: list[str]
    last: Future[tuple[Job, list[int]]]
    """The last submission, and how many units were done at each kill."""

    @staticmethod
    def begin(submit: Submit, world: World, out: Path, pool: Executor, is_over: Event) -> TenKills:
        """Start. `is_over` ends it at the next kill."""
        shards = world.piped(world.shards)
        dice = random.Random(9)

        def kill_again_and_again() -> tuple[Job, list[int]]:
            done: list[int] = []
            while True:
                job = submit("embed.sh", *shards, *FLAGS, "--out", out, options=f"--job-name={BESIDE}", PAUSE_S=".2")
                if len(done) == KILLS or is_over.is_set():
                    return job, done
                # From before its first breath to well into the work.
                end = num_done(out) + dice.choice([-1, 0, 0, 1, 2])
                job.wait_for(lambda end=end: is_over.is_set() or num_done(out) > end, "some units", 300)  # type: ignore[misc]
                job.cluster.run("scancel", "--full", "--signal=KILL", job.name)
                done.append(num_done(out))

        return TenKills(out, shards, pool.submit(kill_again_and_again))


def num_done(out: Path) -> int:
    """Units that are committed."""
    return len(list((out / "_done").rglob("*.json")))


def num_leased(out: Path) -> int:
    """Units that somebody is at."""
    return len(list((out / "_leases").glob("0*")))


def workers(out: Path) -> set[str]:
    """Names of the ranks that are at a unit: they end in the rank's number."""
    found = set()
    for path in (out / "_leases").glob("0*"):
        # Just taken and not written yet, or given back meanwhile.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found.add(json.loads(path.read_bytes())["worker"])
    return found


def committed_by(out: Path) -> Counter[str]:
    """How many units each rank has committed."""
    return Counter(json.loads(path.read_bytes())["work"]["worker"] for path in (out / "_done").rglob("*.json"))


def num_executed(out: Path) -> int:
    """Units that ranks which ended in order have seen through to a commit, won or lost."""
    lines = [json.loads(line) for path in (out / "_logs").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sum(int(line["units"]) for line in lines if line["final"])


def same_results(out: Path, expected: Path) -> None:
    """Every result file of `out` is that of `expected`, byte for byte, and none is missing."""
    found, wanted = tree_bytes(out), tree_bytes(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
