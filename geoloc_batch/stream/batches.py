"""Units in, fixed uint8 batches out: read | decode and resize | pack, overlapped by threads in bounded memory.

    one reader  -> photos waiting, bounded by bytes -> N decode threads -> ring of batches -> the consumer

A decode thread takes the next free row when its photo is ready, so a refused photo leaves no hole and a slow one does
not hold the others up; rows therefore arrive out of order. Everything that the threads share is behind one lock.

Shape letters: B batch, S image side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from threading import Lock, Thread

import torch

from geoloc_batch.cpus import usable_cpus
from geoloc_batch.errors import DecodeError
from geoloc_batch.records import RowError, Sample, Unit, UnitEnd
from geoloc_batch.stream.batch import Batch
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig
from geoloc_batch.stream.decode import photo_pixels
from geoloc_batch.stream.exchange import Exchange, StoppedError
from geoloc_batch.stream.interrupt import Interrupt
from geoloc_batch.stream.samples import UnitReader
from geoloc_batch.stream.stats import StreamStats

__all__ = ["Batch", "BatchStream", "StreamStats"]

MAX_WAITING_BYTES = 64 << 20
"""Photos that are read but not yet taken by a decode thread."""

MAX_WAITING_PER_THREAD = 16
"""The same, counted: small photos need not wait in thousands for the reader to stay ahead."""

_JOIN_TIMEOUT_S = 10.0


class BatchStream:
    """Reads units and gives batches of one fixed shape.

    Args:
        units: pulled by the reader's thread, the next one only when the one before has been read through; it may
            block. None asks for what is partly filled: it comes as a padded batch.
        side: S, the encoder's image side.
        batch_size: B.
        config: threads, limits, orientation.
        pin_memory: page-locked buffers, for copies to CUDA.
        ring: batches that exist; the consumer may hold all but one.

    Raises:
        ConfigError: the ring does not fit into memory.
    """

    def __init__(
        self,
        units: Iterable[Unit | None],
        *,
        side: int,
        batch_size: int,
        config: StreamConfig,
        pin_memory: bool = False,
        ring: int = 4,
    ) -> None:
        self._units = units
        self._side = side
        self._config = config
        self._num_threads = config.decode_threads or _default_threads()
        self._budget = MemoryBudget(config.decode_memory_mb << 20)
        self._exchange = Exchange(
            side=side,
            batch_size=batch_size,
            ring=ring,
            pin_memory=pin_memory,
            max_waiting_bytes=MAX_WAITING_BYTES,
            max_waiting_photos=max(64, MAX_WAITING_PER_THREAD * self._num_threads),
        )
        self._interrupt = Interrupt()
        self._reading: UnitReader | None = None
        self._bytes_of_ended = 0
        # When the iteration began and ended.
        self._began = self._ended = 0.0
        self._read_busy_s = 0.0
        # One cell a thread: no lock, no lost addition.
        self._decode_busy_s = [0.0] * self._num_threads
        self._threads: list[Thread] = []
        self._starting = Lock()

    def __iter__(self) -> Iterator[Batch | UnitEnd]:
        """Give batches and, once per unit, its UnitEnd, which may come before the batch with its last rows.

        Raises:
            Exception: what ended one of the threads, the units' own exceptions among it.
        """
        self._start()
        try:
            while (item := self._exchange.next_item()) is not None:
                yield item
        finally:
            self._ended = self._ended or time.perf_counter()

    def close(self) -> None:
        """End the consumer's iteration, whatever it waits for, stop the threads and join them; may be called twice.

        Any thread may call it but the stream's own. A reader that waits for a named pipe, a command or a server gives
        up within a second, and what a command has started is killed. A reader that is blocked in `units` is waited for
        10 s at most: whoever closes should end that wait too.
        """
        self._exchange.stop()
        self._interrupt.set()
        # Threads that are just being started can be joined only afterwards.
        with self._starting:
            threads = self._threads
        for thread in threads:
            thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> StreamStats:
        """The stream's own measurements, at any time."""
        reading = self._reading
        counts = self._exchange.counts()._asdict()
        seconds = (self._ended or time.perf_counter()) - self._began if self._began else 0.0
        return StreamStats(
            seconds=seconds,
            bytes_read=self._bytes_of_ended + (reading.bytes_read if reading is not None else 0),
            decode_threads=self._num_threads,
            read_busy_s=self._read_busy_s,
            decode_busy_s=sum(self._decode_busy_s),
            memory_wait_s=self._budget.wait_s,
            mean_samples_queued=counts.pop("samples_queued_area_s") / max(seconds, 1e-9),
            mean_batches_ready=counts.pop("batches_ready_area_s") / max(seconds, 1e-9),
            **counts,
        )

    def _start(self) -> None:
        with self._starting:
            if self._threads or self._exchange.is_stopped:
                return
            self._threads = [Thread(target=self._guarded, args=(self._read,), name="geoloc-read", daemon=True)]
            for number in range(self._num_threads):
                name = f"geoloc-decode-{number}"
                self._threads.append(Thread(target=self._guarded, args=(self._decode, number), name=name, daemon=True))
            self._began = time.perf_counter()
            for thread in self._threads:
                thread.start()

    def _guarded(self, work: Callable[..., None], *args: int) -> None:
        """A thread's whole life."""
        try:
            work(*args)
        except StoppedError:
            return
        except BaseException as failure:
            self._exchange.stop(failure)

    def _read(self) -> None:
        """The reader's thread."""
        units = iter(self._units)
        try:
            for unit in units:
                if unit is None:
                    self._exchange.flush()
                else:
                    self._read_unit(unit)
            self._exchange.finish()
        finally:
            # A generator of units holds leases; it ends here, where it ran, not in the garbage collector.
            if isinstance(units, Generator):
                units.close()

    def _read_unit(self, unit: Unit) -> None:
        progress = self._exchange.begin_unit(unit)
        reader = self._reading = UnitReader(unit, self._interrupt)
        started = time.perf_counter()
        with closing(iter(reader)) as items:
            for item in items:
                self._read_busy_s += time.perf_counter() - started
                if isinstance(item, RowError):
                    self._exchange.put_refused(progress, item)
                else:
                    self._exchange.put_photo(progress, *item)
                started = time.perf_counter()
        self._read_busy_s += time.perf_counter() - started
        self._exchange.end_unit(progress, reader.num_photos, reader.unit_error, reader.warnings)
        self._bytes_of_ended, self._reading = self._bytes_of_ended + reader.bytes_read, None

    def _decode(self, number: int) -> None:
        """One decode thread."""
        # Without what autograd notes of each tensor; nothing made here leaves the thread but bytes.
        with torch.inference_mode():
            while True:
                self._decode_next(number)

    def _decode_next(self, number: int) -> None:
        config, exchange = self._config, self._exchange
        photo = exchange.take_photo()
        started = time.perf_counter()
        waited = -self._budget.own_wait_s
        try:
            pixels = photo_pixels(
                photo.data,
                self._side,
                fast=config.fast_decode,
                apply_orientation=config.apply_orientation,
                max_pixels=config.max_pixels,
                budget=self._budget,
            )
        except Exception as error:
            exchange.refuse(photo, _row_error(photo.sample, error))
        else:
            waited += exchange.pack(photo, pixels)
        waited += self._budget.own_wait_s
        self._decode_busy_s[number] += time.perf_counter() - started - waited


def _row_error(sample: Sample, error: Exception) -> RowError:
    # What is no DecodeError came from this machine, memory for one; another try may go well.
    is_foreign = not isinstance(error, DecodeError)
    message = f"{type(error).__name__}: {error}" if is_foreign else str(error)
    is_retryable = is_foreign or getattr(error, "retryable", False)
    return RowError(sample.key, sample.shard, sample.row, "decode", message, is_retryable)


def _default_threads() -> int:
    num_cpus = usable_cpus()
    return num_cpus - 1 if num_cpus > 2 else num_cpus
