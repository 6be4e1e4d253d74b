"""The ranks of one training: who has which part of a batch, sums over ranks, and what the first rank does for all.

Ranks train one head together. Each holds the whole head and takes the same steps; a step's batch is cut among them, and
its gradients are added up. Whatever stands in a folder is read and written by the first rank alone, and what it found
or decided is told to the others, errors too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from geoloc_batch.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_MISUSE, GeolocError, StopRequested, UserError
from geoloc_batch.run.workers import Worker, num_together, this_worker
from geoloc_batch.train.meeting import Lifeline, Store, meet, told

# For what one rank may do while the others wait: reading features, writing a checkpoint. A rank that is lost is noticed
# at once, by the lifeline.
_PATIENCE = timedelta(minutes=30)

log = logging.getLogger("geoloc_batch")

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Group:
    """The ranks of one training, seen from one of them; by default this process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_on_machine: int = 1
    """Ranks on this machine, which share its memory."""
    num_on_device: int = 1
    """Ranks on this rank's GPU."""
    lifeline: Lifeline | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank reads and writes for all."""
        return self.rank == 0

    def part(self, num_rows: int) -> slice:
        """This rank's rows of so many: consecutive ones, as evenly as whole numbers allow."""
        share, rest = divmod(num_rows, self.size)
        start = self.rank * share + min(self.rank, rest)
        return slice(start, start + share + (self.rank < rest))

    def add(self, value: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, the same bits in all of them.

        Raises:
            StopRequested, GeolocError: a rank was lost, or ended with an error.
        """
        if self.size == 1:
            return
        try:
            torch.distributed.all_reduce(value)
        except RuntimeError as error:
            self._give_up(error)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first rank, the only one that calls it; what it raises there is raised in all.

        Raises:
            StopRequested, GeolocError: a rank was lost, or ended with an error.
        """
        if self.size == 1:
            return make()
        made: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                made = make()
            except Exception as raised:
                error = raised
        sent = [(made, error)]
        try:
            torch.distributed.broadcast_object_list(sent, src=0)
        except RuntimeError as lost:
            self._give_up(lost)
        if not self.is_first:
            made, error = sent[0]
        if error is not None:
            if self.lifeline is not None:
                self.lifeline.is_shared = True
            raise error
        return made  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def first_within(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """The first rank is within the context, which the others wait for; an error on the way in is all ranks'."""
        with contextlib.ExitStack() as stack:
            self.from_first(lambda: _enter(stack, context))
            yield

    def _give_up(self, error: RuntimeError) -> NoReturn:
        if isinstance(error, torch.OutOfMemoryError) or self.lifeline is None:
            raise error
        code = self.lifeline.code_of_lost()
        words = "another rank of this training ended with an error, which its own lines tell"
        if code == EXIT_MISUSE:
            raise UserError(words) from error
        if code == EXIT_FAILED:
            raise GeolocError(words) from error
        raise StopRequested from error


ALONE = Group()


@contextlib.contextmanager
def joined_group() -> Iterator[Group]:
    """Join the ranks that the launcher started; alone where it started no other, or where there is none.

    Raises:
        ConfigError: the launcher does not tell where the first rank is.
        GeolocError: not all ranks came.
    """
    worker, size = this_worker(), num_together()
    if size == 1:
        yield Group(device=worker.device)
        return
    level = log.level
    with meet(worker.rank, size) as (store, lifeline):
        group = _joined(worker, size, store, lifeline)
        if not group.is_first:
            # What all would say alike is said once.
            log.setLevel(logging.ERROR)
        try:
            yield group
            # Whoever is ready first waits: its end would look like a loss to a rank that still listens to it.
            with contextlib.suppress(RuntimeError):
                torch.distributed.all_reduce(torch.zeros(1, device=group.device))
                torch.distributed.destroy_process_group()
        except BaseException as error:
            lifeline.code = code_of(error)
            _leave()
            raise
        finally:
            log.setLevel(level)


def _leave() -> None:
    """Leave a group that has lost a rank or has an error, without waiting for anybody: another may be joined later."""
    if not torch.distributed.is_initialized():
        return
    with contextlib.suppress(Exception):
        if torch.distributed.get_backend() == "nccl":
            torch.distributed.distributed_c10d._abort_process_group()
        else:
            torch.distributed.destroy_process_group()


def code_of(error: BaseException) -> int:
    """The exit code of a command that ends with this."""
    if isinstance(error, UserError):
        return EXIT_MISUSE
    return EXIT_FAILED if isinstance(error, Exception) else EXIT_INCOMPLETE


def _joined(worker: Worker, size: int, store: Store, lifeline: Lifeline) -> Group:
    machine = socket.gethostname()
    device = worker.device if worker.device.type == "cuda" else torch.device("cpu")
    # A GPU by what it is: two ranks may call the same one by different numbers.
    place = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else machine
    store.set(f"rank {worker.rank}", f"{machine}\n{place}")
    facts = [told(store, f"rank {other}").decode().split("\n") for other in range(size)]
    machines, places = (Counter(column) for column in zip(*facts, strict=True))
    # NCCL wants a GPU for each rank.
    is_nccl = device.type == "cuda" and max(places.values()) == 1
    torch.distributed.init_process_group(
        "nccl" if is_nccl else "gloo", store=store, rank=worker.rank, world_size=size, timeout=_PATIENCE
    )
    if worker.rank == 0:
        log.info("%d ranks on %d machine%s train together", size, len(machines), "s" * (len(machines) > 1))
    return Group(
        rank=worker.rank,
        size=size,
        device=device,
        num_on_machine=machines[machine],
        num_on_device=places[place],
        lifeline=lifeline,
    )


def _enter(stack: contextlib.ExitStack, context: AbstractContextManager[object]) -> None:
    stack.enter_context(context)
