"""Which rank this process is, on which device, and how it is asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from geoloc_batch.cpus import usable_cpus
from geoloc_batch.errors import StopRequested
from geoloc_batch.store.files import process_name

# The launchers' variables, first found wins: torchrun and accelerate launch, SLURM's srun, Open MPI, MPICH.
_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_WORLD = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# How many were started at once. SLURM_NTASKS is none of these: a batch script has it too, whose tasks nobody started.
_TOGETHER = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_WATCH_S = 0.1
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
# A launcher, a container or a terminal that signals its whole group and hands the signal on as well says it twice.
_ECHO_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def name(self) -> str:
        """Distinguishes the processes that share an output folder, in logs."""
        return f"{socket.gethostname()}-{process_name()}-r{self.rank}"


def this_worker() -> Worker:
    """Rank from the launcher's environment, device from accelerate.

    No process group is joined: ranks meet in the output folder alone, so a rank that is lost, before the start or
    after it, neither hangs nor stops the others.
    """
    rank, world = _first(_RANK, 0), _first(_WORLD, 1)
    local_rank = _first(_LOCAL_RANK, 0)
    if world > 1 and not torch.cuda.is_available():
        # Ranks of one machine share its CPUs: torch alone would give each rank all of them.
        torch.set_num_threads(_share_of_cpus())
    return Worker(rank=rank, world_size=world, local_rank=local_rank, device=_device(local_rank))


def num_together() -> int:
    """Ranks that the launcher started at once, this one among them: those that may wait for each other."""
    return max(1, _first(_TOGETHER, 1))


def _share_of_cpus() -> int:
    """CPUs of this rank, where several may run on one machine."""
    # srun tells how many it gave; what it binds ranks to are these alone, or, without a plugin for it, all.
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and not any(name in os.environ for name in _LOCAL_WORLD):
        return max(1, min(usable_cpus(), int(given)))
    return max(1, usable_cpus() // max(1, _first(_LOCAL_WORLD, 1)))


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def _device(local_rank: int) -> torch.device:
    from accelerate import PartialState

    count = torch.cuda.device_count()
    alone = {} if count == 0 else {"ACCELERATE_TORCH_DEVICE": f"cuda:{local_rank % count}"}
    with _environment(hidden=(*_RANK, *_LOCAL_RANK, *_WORLD), given=alone):
        device: torch.device = PartialState().device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def _environment(*, hidden: tuple[str, ...], given: dict[str, str]) -> Iterator[None]:
    """Hide variables for a moment: PartialState joins a process group as soon as it sees a launcher's."""
    before = dict(os.environ)
    try:
        for name in hidden:
            os.environ.pop(name, None)
        for name, value in given.items():
            os.environ.setdefault(name, value)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class StopSignal:
    """Set by SIGTERM, SIGINT (Ctrl-C) and SIGUSR2; a second one, other than the echo of the first, ends the process.

    Used as a context manager around a run. Until `defer` is called there is nothing to finish, and the signal raises
    StopRequested. Outside the main thread, where Python allows no handlers, it is never set by a signal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_deferred = False
        self._asked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._event.is_set():
            if now_s - self._asked_s < _ECHO_S:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked_s = now_s
        self._event.set()
        if not self._is_deferred:
            raise StopRequested

    def defer(self) -> None:
        """From here on a signal only asks for a stop: whole units are to be committed first."""
        self._is_deferred = True

    def set(self) -> None:
        """Ask for a stop without a signal."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep until asked to stop, at most `seconds`."""
        return self._event.wait(seconds)

    @contextmanager
    def calling(self, action: Callable[[], None]) -> Iterator[None]:
        """While inside, `action` is called once, in a thread of its own, when a stop is asked for.

        Not in the handler: that runs in the main thread, which may hold the very lock that the action needs.
        """
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.is_set():
                if self._event.wait(_WATCH_S):
                    action()
                    return

        watcher = threading.Thread(target=watch, name="stop-watcher", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
