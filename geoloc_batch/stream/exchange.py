"""What the stream's threads share, behind one lock: waiting photos, batches being filled, what goes to the consumer.

Shape letters: B batch, S image side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import NamedTuple

import numpy as np
from torch import Tensor

from geoloc_batch.records import RowError, Sample, Unit, UnitEnd, UnitError
from geoloc_batch.stream.batch import Batch, Filling, new_ring
from geoloc_batch.stream.interrupt import POLL_S
from geoloc_batch.stream.stats import Counts, Depth

MAX_ENDS_AHEAD = 64
"""Units that the reader may end before the consumer has heard of the first."""


class StoppedError(Exception):
    """Unwinds a thread when the stream is closed."""


@dataclass(slots=True, eq=False)
class UnitProgress:
    """How far one unit has come."""

    unit: Unit
    num_in_flight: int = 0
    """Photos read, but neither packed nor refused."""
    errors: list[RowError] = field(default_factory=list)
    ending: tuple[int, UnitError | None, tuple[str, ...]] | None = None
    """num_samples, unit_error and warnings, once it has been read through."""


class WaitingPhoto(NamedTuple):
    """A photo that no thread has taken yet."""

    progress: UnitProgress
    sample: Sample
    data: bytes
    cost: int
    """Bytes that it counts for."""


class Exchange:
    """The meeting place of one reader, several decode threads and one consumer.

    Every waiting method raises StoppedError once stop was called, save next_item, which returns None.
    """

    def __init__(
        self,
        *,
        side: int,
        batch_size: int,
        ring: int,
        pin_memory: bool,
        max_waiting_bytes: int,
        max_waiting_photos: int,
    ) -> None:
        self._batch_size = batch_size
        self._max_waiting_bytes = max_waiting_bytes
        self._max_waiting_photos = max_waiting_photos
        self._lock = Lock()
        self._room, self._work, self._buffers, self._ready, self._idle = (Condition(self._lock) for _ in range(5))
        self._waiting: deque[WaitingPhoto] = deque()
        self._waiting_bytes = 0
        self._num_in_flight = 0
        self._free = new_ring(ring, batch_size, side, pin_memory=pin_memory)
        self._filling: Filling | None = None
        self._out: deque[Batch | UnitEnd] = deque()
        self._num_ends_ahead = 0
        self._is_stopped = False
        self._is_finished = False
        self._failure: BaseException | None = None
        self._num_photos = 0
        self._samples_queued, self._batches_ready = Depth(), Depth()
        self._pack_busy_s = self._room_wait_s = self._photo_wait_s = self._ring_wait_s = self._consumer_wait_s = 0.0

    # The reader's side.

    def begin_unit(self, unit: Unit) -> UnitProgress:
        """Start on a unit; waits while the consumer is many units behind."""
        with self._lock:
            self._room_wait_s += self._wait(self._room, lambda: self._num_ends_ahead < MAX_ENDS_AHEAD)
        return UnitProgress(unit)

    def put_photo(self, progress: UnitProgress, sample: Sample, data: bytes) -> None:
        """Queue a photo; waits for room. One that is larger than the room goes in alone."""
        cost = len(data) + len(sample.meta)
        with self._lock:
            if not self._has_room(cost):
                # Then wait for half of it: a reader that is woken for each photo costs the decoders a tenth.
                self._room_wait_s += self._wait(self._room, lambda: self._is_half_empty() and self._has_room(cost))
            self._waiting.append(WaitingPhoto(progress, sample, data, cost))
            self._waiting_bytes += cost
            self._samples_queued.add(1)
            self._num_in_flight += 1
            progress.num_in_flight += 1
            self._work.notify()

    def put_refused(self, progress: UnitProgress, error: RowError) -> None:
        """Note a photo that was refused while reading."""
        with self._lock:
            self._num_photos += 1
            progress.errors.append(error)

    def end_unit(
        self, progress: UnitProgress, num_samples: int, unit_error: UnitError | None, warnings: tuple[str, ...]
    ) -> None:
        """Say that the unit has been read through. Its UnitEnd goes out when its last photo is settled."""
        with self._lock:
            progress.ending = (num_samples, unit_error, warnings)
            self._end_if_settled(progress)

    def flush(self) -> None:
        """Wait until every photo read so far is settled, then hand over what is partly filled, padded with zeros."""
        with self._lock:
            self._wait(self._idle, lambda: not self._num_in_flight)
            filling, self._filling = self._filling, None
            if filling is not None:
                filling.rows[len(filling.samples) :] = 0
                self._hand_over(filling)

    def finish(self) -> None:
        """Flush, and end the consumer's iteration."""
        self.flush()
        with self._lock:
            self._is_finished = True
            self._ready.notify_all()

    # The decode threads' side.

    def take_photo(self) -> WaitingPhoto:
        """The photo that has waited longest."""
        with self._lock:
            self._photo_wait_s += self._wait(self._work, lambda: bool(self._waiting))
            photo = self._waiting.popleft()
            self._samples_queued.add(-1)
            self._waiting_bytes -= photo.cost
            if self._is_half_empty():
                self._room.notify()
            return photo

    def pack(self, photo: WaitingPhoto, pixels_3SS: Tensor) -> float:
        """Write a photo into the next free row; waits for a free batch.

        Returns:
            Seconds of waiting.
        """
        with self._lock:
            waited = self._wait(self._buffers, lambda: self._filling is not None or bool(self._free))
            if self._filling is None:
                self._filling = Filling(self._free.pop())
            filling = self._filling
            row = len(filling.samples)
            filling.samples.append(photo.sample)
            if row + 1 == self._batch_size:
                self._filling = None
            self._ring_wait_s += waited
        started = time.perf_counter()
        # Through numpy: torch would start its own threads for a copy of this size, in every decode thread.
        np.copyto(filling.rows[row], pixels_3SS.permute(1, 2, 0).numpy())
        packed = time.perf_counter() - started
        with self._lock:
            self._pack_busy_s += packed
            filling.num_written += 1
            if filling.num_written == self._batch_size:
                self._hand_over(filling)
            self._settle(photo.progress)
        return waited

    def refuse(self, photo: WaitingPhoto, error: RowError) -> None:
        """Note a photo that cannot be decoded."""
        with self._lock:
            photo.progress.errors.append(error)
            self._settle(photo.progress)

    # The consumer's side.

    def next_item(self) -> Batch | UnitEnd | None:
        """What comes next; None at the end, and after stop. Raises what ended one of the threads."""
        started = time.perf_counter()
        with self._lock:
            # Not without end: the main thread does not wake of a signal that comes at the moment when its wait begins.
            while not self._ready.wait_for(lambda: self._out or self._is_finished or self._is_stopped, POLL_S):
                pass
            self._consumer_wait_s += time.perf_counter() - started
            if self._failure is not None:
                raise self._failure
            if self._is_stopped or not self._out:
                return None
            item = self._out.popleft()
            if isinstance(item, UnitEnd):
                self._num_ends_ahead -= 1
                self._room.notify_all()
            else:
                self._batches_ready.add(-1)
            return item

    # Everybody's side.

    def stop(self, failure: BaseException | None = None) -> None:
        """End all waiting. A failure is what next_item will raise; one that comes after a stop is only its echo."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped, self._failure = True, failure
            for condition in (self._room, self._work, self._buffers, self._ready, self._idle):
                condition.notify_all()

    @property
    def is_stopped(self) -> bool:
        """Whether stop was called."""
        return self._is_stopped

    def counts(self) -> Counts:
        """What has passed, and what waits."""
        with self._lock:
            return Counts(
                photos=self._num_photos,
                samples_queued=self._samples_queued.now,
                bytes_queued=self._waiting_bytes,
                batches_ready=self._batches_ready.now,
                samples_queued_area_s=self._samples_queued.area_s(),
                batches_ready_area_s=self._batches_ready.area_s(),
                pack_busy_s=self._pack_busy_s,
                room_wait_s=self._room_wait_s,
                photo_wait_s=self._photo_wait_s,
                ring_wait_s=self._ring_wait_s,
                consumer_wait_s=self._consumer_wait_s,
            )

    # Below, the lock is held.

    def _has_room(self, num_bytes: int) -> bool:
        is_within = self._waiting_bytes + num_bytes <= self._max_waiting_bytes
        return not self._waiting or (is_within and len(self._waiting) < self._max_waiting_photos)

    def _is_half_empty(self) -> bool:
        return 2 * self._waiting_bytes <= self._max_waiting_bytes and 2 * len(self._waiting) <= self._max_waiting_photos

    def _wait(self, condition: Condition, is_met: Callable[[], bool]) -> float:
        """Seconds waited."""
        waited = 0.0
        # Asked first, for it is met nearly always, and the rest takes longer than all else that a photo needs here.
        if not is_met():
            started = time.perf_counter()
            condition.wait_for(lambda: self._is_stopped or is_met())
            waited = time.perf_counter() - started
        if self._is_stopped:
            raise StoppedError
        return waited

    def _settle(self, progress: UnitProgress) -> None:
        self._num_photos += 1
        progress.num_in_flight -= 1
        self._end_if_settled(progress)
        self._num_in_flight -= 1
        if not self._num_in_flight:
            self._idle.notify_all()

    def _end_if_settled(self, progress: UnitProgress) -> None:
        if progress.ending is None or progress.num_in_flight:
            return
        num_samples, unit_error, warnings = progress.ending
        errors = tuple(sorted(progress.errors, key=lambda error: error.row))
        self._out.append(UnitEnd(progress.unit, num_samples, errors, unit_error, warnings))
        self._num_ends_ahead += 1
        self._ready.notify()

    def _hand_over(self, filling: Filling) -> None:
        is_released = False

        def give_back() -> None:
            nonlocal is_released
            with self._lock:
                if not is_released:
                    is_released = True
                    self._free.append(filling.pixels)
                    self._buffers.notify_all()

        self._out.append(Batch(filling.pixels, tuple(filling.samples), give_back))
        self._batches_ready.add(1)
        self._ready.notify()
