"""Processes that take turns: threads of which exactly one runs, on a clock of their own, with faults at chosen steps.

A thread hands over at any step of its file port, by chance; when all of them sleep, the clock is put forward. The same
seed gives the same run. Threads of a process that has gone unwind by `Vanished`, which no handler of the code takes.
"""

from __future__ import annotations

import errno
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from simulated_disk import Disk, refusal
from simulated_files import Host, Process

STEP_S = 0.001
SECOND_NS = 1_000_000_000
# Where a hand-over is likelier, for the races are there.
DECISIVE = frozenset({"link", "rename", "create", "remove", "remove_folder", "make_folder"})

Kind = Literal["kill", "stop", "fail", "fail late", "host", "power", "jump"]


class Vanished(BaseException):
    """This process is no more."""


class ContractError(AssertionError):
    """The code broke its promise."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one process at one step."""

    kind: Kind
    process: int
    """Its pid."""
    step: str
    """Name of a step of the port, or a part of the path that it is for; "" counts all of them."""
    count: int
    """It happens at this many of them, from 1."""
    amount: float = 0.0
    """stop: seconds. jump: seconds of the server's clock. fail, fail late: the errno."""
    until: str = ""
    """stop: ends early, right after another process has changed a path with this part in it."""


class _Turn:
    """One thread."""

    def __init__(self, process: Process | None) -> None:
        self.process = process
        self.wakes_s = 0.0
        self.baton = threading.Semaphore(0)

    def ready_s(self) -> float:
        if self.process is None:
            return self.wakes_s
        return max(self.wakes_s, self.process.stopped_until_s) if self.process.is_alive else 0.0


class Turns:
    """A World whose processes are threads.

    Args:
        disk: the file server.
        seed: decides who runs when.
        switch_chance: of a hand-over at a step.
        faults: what happens when.
        max_steps: more than that is a ContractError: somebody waits for ever.
    """

    def __init__(
        self, disk: Disk, *, seed: int, switch_chance: float, faults: tuple[Fault, ...] = (), max_steps: int = 100_000
    ) -> None:
        self.disk = disk
        self.processes: dict[int, Process] = {}
        self.random = Random(seed)
        self.disturbed: set[Process] = set()
        """Processes that a fault has hit, and those that saw a clock jump."""
        self.failed: set[Process] = set()
        """Processes that were given an error."""
        self.violation: str | None = None
        self.watch: Callable[[Process, str, Path], None] = lambda process, name, path: None
        self.on_power_loss: Callable[[], None] = lambda: None
        self.steps = self.num_early_steps = 0
        self._switch_chance = switch_chance
        self._left = [[fault.count, fault] for fault in faults]
        self._stopped: dict[Process, str] = {}
        self._max_steps = max_steps
        self._now_s = 1000.0
        self._ahead_s = 500_000.0
        self._main = self._running = _Turn(None)
        self._turns: list[_Turn] = []
        self._threads: list[threading.Thread] = []
        self._tokens = 0

    # What a World is asked.

    def now_s(self) -> float:
        return self._now_s

    def token(self) -> str:
        self._tokens += 1
        return f"{self._tokens:04x}"

    def before(self, process: Process, name: str, path: Path) -> OSError | None:
        self._check(process)
        self.steps += 1
        if self.steps > self._max_steps:
            self.violate(f"no end after {self.steps} steps, now {name} {path}")
        self._pass(STEP_S)
        late = self._fault(process, name, path)
        chance = self._switch_chance * (4 if name in DECISIVE else 1)
        if process.stopped_until_s > self._now_s or self.random.random() < chance:
            self._hand_over()
        self._check(process)
        return late

    def after(self, process: Process, name: str, path: Path) -> None:
        self.watch(process, name, path)
        if name in DECISIVE:
            for other, part in list(self._stopped.items()):
                if other is not process and part in path.parts:
                    del self._stopped[other]
                    other.stopped_until_s = self._now_s + self.random.choice([0, 5, 20, 60]) * STEP_S

    def sleep(self, process: Process, seconds: float) -> None:
        self._check(process)
        self._running.wakes_s = self._now_s + seconds
        self._hand_over()
        self._check(process)

    def every(self, process: Process, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        is_ended = False

        def keep_on() -> None:
            while True:
                self.sleep(process, seconds)
                if is_ended:
                    return
                task()

        turn = self.spawn(process, keep_on)

        def end() -> None:
            nonlocal is_ended
            is_ended = True
            while turn in self._turns:
                turn.wakes_s = min(turn.wakes_s, self._now_s)
                self.sleep(process, STEP_S)

        return end

    # What a simulation does.

    def new_process(self, host: Host) -> Process:
        process = Process(host, len(self.processes) + 1)
        self.processes[process.owner.pid] = process
        return process

    def spawn(self, process: Process, task: Callable[[], None], delay_s: float = 0.0) -> _Turn:
        """Another thread of a process; it first runs when it gets a turn."""
        turn = _Turn(process)
        turn.wakes_s = self._now_s + delay_s
        self._turns.append(turn)
        thread = threading.Thread(target=self._live, args=(turn, task), daemon=True)
        self._threads.append(thread)
        thread.start()
        return turn

    def run(self) -> None:
        """Until every thread has ended."""
        self._hand_over(is_leaving=True)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self.violation is not None:
            raise ContractError(self.violation)

    def kill(self, process: Process) -> None:
        process.is_alive = False

    def pause(self, seconds: float) -> None:
        """Let time pass while nothing runs."""
        self._pass(seconds)

    def end_faults(self) -> None:
        """From here on nothing happens to anybody."""
        self._left.clear()

    def violate(self, what: str) -> None:
        """Note a broken promise and end everything."""
        if self.violation is None:
            self.violation = what
        for process in self.processes.values():
            process.is_alive = False
        raise Vanished

    def _live(self, turn: _Turn, task: Callable[[], None]) -> None:
        turn.baton.acquire()
        try:
            task()
        except Vanished:
            pass
        except BaseException:
            if self.violation is None:
                self.violation = traceback.format_exc()
            for process in self.processes.values():
                process.is_alive = False
        self._turns.remove(turn)
        self._hand_over(is_leaving=True)

    def _hand_over(self, *, is_leaving: bool = False) -> None:
        """Give the turn to somebody who is ready, maybe to ourselves; the last to leave wakes the main thread."""
        ours = self._running
        while self._turns:
            ready = [turn for turn in self._turns if turn.ready_s() <= self._now_s]
            if ready:
                break
            self._pass(min(turn.ready_s() for turn in self._turns) - self._now_s)
        chosen = self._main if not self._turns else ready[0] if len(ready) == 1 else self.random.choice(ready)
        if chosen is ours:
            return
        self._running = chosen
        chosen.baton.release()
        if not is_leaving or ours is self._main:
            ours.baton.acquire()

    def _pass(self, seconds: float) -> None:
        self._now_s += seconds
        self.disk.now_ns = int((self._now_s + self._ahead_s) * SECOND_NS)

    def _check(self, process: Process) -> None:
        if not process.is_alive:
            raise Vanished

    def _fault(self, process: Process, name: str, path: Path) -> OSError | None:
        late = None
        for entry in self._left:
            left, fault = entry
            if fault.process == process.owner.pid and (fault.step in ("", name) or fault.step in path.parts):
                entry[0] = left - 1
                if left == 1:
                    late = self._do_fault(fault, process, path) or late
        return late

    def _do_fault(self, fault: Fault, process: Process, path: Path) -> OSError | None:
        self.disturbed.add(process)
        if fault.kind == "stop":
            process.stopped_until_s = self._now_s + fault.amount
            self._stopped[process] = fault.until
        elif fault.kind == "jump":
            self._ahead_s += fault.amount
            self.disturbed.update(self.processes.values())
            self._pass(0.0)
        elif fault.kind in ("fail", "fail late"):
            self.failed.add(process)
            error = refusal(int(fault.amount) or errno.EIO, path)
            if fault.kind == "fail":
                raise error
            return error
        else:
            for other in self.processes.values():
                if fault.kind == "power" or other is process or (fault.kind == "host" and other.host is process.host):
                    other.is_alive = False
            if fault.kind == "host":
                process.host.boots += 1
            if fault.kind == "power":
                for host in {id(other.host): other.host for other in self.processes.values()}.values():
                    host.boots += 1
                self.disk.lose_power(self.random)
                self.on_power_loss()
            raise Vanished
        return None
