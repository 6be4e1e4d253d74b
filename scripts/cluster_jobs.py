"""A simulated cluster: ranks in jobs on nodes, of which some die, are preempted, come back, or are slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster_clock import Clock
from cluster_files import Node, SimulatedFiles
from cluster_ranks import OUT, Process, Tally
from cluster_server import Filesystem, Server

from geoloc_batch.records import Unit
from geoloc_batch.store.ledger import Ledger

RANKS_PER_NODE = 8
LEASES, MARKERS = f"{OUT}/_leases/", f"{OUT}/_done/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is simulated."""

    ranks: int
    units: int
    filesystem: Filesystem
    photos: int = 10_000
    """In a unit."""
    unit_s: float = 10.0
    """Mean time of a unit on a rank of the usual speed."""
    sigma: float = 0.5
    """Of the logarithm of a unit's time. Half of its variance is known beforehand, by the shard's size."""
    death_h: float = 500.0
    """Mean hours of a process between its start and a death without a word."""
    restart_s: float = 120.0
    """Until a dead rank's successor looks for work."""
    preempt_h: float = 24.0
    """Mean hours of a job between preemptions."""
    grace_s: float = 90.0
    """Half of the preemptions give so much notice, the others none."""
    requeue_s: float = 300.0
    """Until a preempted job is back."""
    ranks_per_job: int = 64
    slow_share: float = 0.01
    """Of the ranks."""
    slow_speed: float = 0.3
    """Of these, the others having 1."""
    start_spread_s: float = 30.0
    """Over which jobs start at the beginning."""
    witnesses: int = 0
    """Ranks that go on, once all is committed, until they know what came of it; 0 lets all of them."""
    seed: int = 0


@dataclass(eq=False, slots=True)
class Cluster:
    """All that happens in one run."""

    setting: Setting
    units: Sequence[Unit]
    seconds: Sequence[float]
    """That each unit takes at speed 1."""
    adopt: Callable[[Cluster, Ledger], object]
    make_ledger: Callable[..., Ledger] = Ledger
    clock: Clock = field(default_factory=Clock)
    tally: Tally = field(default_factory=Tally)
    lives: list[Process] = field(default_factory=list)
    """Every process that ever was."""
    deaths: int = 0
    preemptions: int = 0
    republished: list[str] = field(default_factory=list)
    """Markers that were published over one that stood."""
    completed_s: float = math.inf
    """When the last marker was published."""
    server: Server = field(init=False)
    _random: Random = field(init=False)
    _living: dict[int, Process] = field(default_factory=dict)
    _files: dict[int, SimulatedFiles] = field(default_factory=dict)
    _speeds: list[float] = field(init=False)
    _nodes: list[Node] = field(init=False)
    _leased: set[int] = field(default_factory=set)
    _marked: set[str] = field(default_factory=set)
    all_leased_s: float = math.inf
    _progress_s: float = 0.0

    def __post_init__(self) -> None:
        setting = self.setting
        self.server = Server(self.clock, setting.filesystem)
        self.server.on_name = self._on_name
        self._random = Random(setting.seed)
        self._speeds = [1.0] * setting.ranks
        for slot in self._random.sample(range(setting.ranks), round(setting.slow_share * setting.ranks)):
            self._speeds[slot] = setting.slow_speed
        self._nodes = [Node(f"n{number}") for number in range(-(-setting.ranks // RANKS_PER_NODE))]

    @property
    def is_complete(self) -> bool:
        """Whether each unit has a marker."""
        return self.clock.now_s >= self.completed_s

    def run(self) -> None:
        """Until everything is committed and everybody has ended, or nothing has been committed for very long."""
        setting = self.setting
        for first in range(0, setting.ranks, setting.ranks_per_job):
            slots = range(first, min(first + setting.ranks_per_job, setting.ranks))
            begin_s = self._random.uniform(0, setting.start_spread_s) if first else 0.0
            for slot in slots:
                self._start_at(begin_s, slot)
            self._preempt_later(slots, begin_s)
        patience_s = max(300.0, 5 * max(self.seconds) / setting.slow_speed)
        self.clock.run(
            lambda: self.clock.now_s > self._progress_s + patience_s or (self.is_complete and not self._living)
        )

    def _start_at(self, time_s: float, slot: int) -> None:
        def start() -> None:
            if slot not in self._living and not self.is_complete:
                self._start(slot)

        self.clock.at(time_s, start)

    def _start(self, slot: int) -> None:
        setting, pid = self.setting, len(self.lives)
        files = SimulatedFiles(self.server, self._nodes[slot // RANKS_PER_NODE], pid, self._files)
        self._files[pid] = files
        process = Process(
            slot=slot,
            clock=self.clock,
            files=files,
            speed=self._speeds[slot],
            photos=setting.photos,
            seconds_of=lambda unit: self.seconds[unit.index],
            adopt=lambda ledger: self.adopt(self, ledger),
            fresh_until=lambda: self.all_leased_s,
            is_over=lambda: self.is_complete and slot >= (setting.witnesses or setting.ranks),
            on_end=self._end,
            tally=self.tally,
            make_ledger=self.make_ledger,
        )
        self.lives.append(process)
        self._living[slot] = process
        process.start()
        if setting.death_h:
            self.clock.at(
                self.clock.now_s + self._random.expovariate(1 / (3600 * setting.death_h)), lambda: self._die(process)
            )

    def _end(self, process: Process) -> None:
        self._living.pop(process.slot, None)

    def _die(self, process: Process) -> None:
        if self._living.get(process.slot) is process and not self.is_complete:
            self.deaths += 1
            self._kill(process, self.setting.restart_s)

    def _kill(self, process: Process, back_s: float) -> None:
        process.kill()
        del self._living[process.slot]
        self._start_at(self.clock.now_s + back_s, process.slot)

    def _preempt_later(self, slots: Sequence[int], from_s: float) -> None:
        if self.setting.preempt_h:
            wait_s = self._random.expovariate(1 / (3600 * self.setting.preempt_h))
            self.clock.at(from_s + wait_s, lambda: self._preempt(slots))

    def _preempt(self, slots: Sequence[int]) -> None:
        setting = self.setting
        if self.is_complete:
            return
        self.preemptions += 1
        grace_s = self._random.choice((0.0, setting.grace_s))
        processes = [self._living[slot] for slot in slots if slot in self._living]
        for process in processes:
            process.is_stopping = True

        def end() -> None:
            for process in processes:
                if self._living.get(process.slot) is process and not self.is_complete:
                    self._kill(process, setting.requeue_s)
                else:
                    self._start_at(self.clock.now_s + setting.requeue_s, process.slot)

        self.clock.at(self.clock.now_s + grace_s, end)
        self._preempt_later(slots, self.clock.now_s + grace_s + setting.requeue_s)

    def _on_name(self, path: str) -> None:
        """A name was made: of a lease, of a marker?"""
        if path.startswith(LEASES):
            unit = path[len(LEASES) :].partition(".")[0]
            if unit.isdecimal():
                self._leased.add(int(unit))
                if len(self._leased) == self.setting.units:
                    self.all_leased_s = min(self.all_leased_s, self.clock.now_s)
        elif path.startswith(MARKERS):
            if path in self._marked:
                self.republished.append(path)
                return
            self._progress_s = self.clock.now_s
            self._marked.add(path)
            if len(self._marked) == self.setting.units:
                self.completed_s = min(self.completed_s, self.clock.now_s)
