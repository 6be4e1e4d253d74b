"""How a stream of batches ends: closed from anywhere, at any time, by a signal, by what its units raise."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from batch_samples import CONFIG, SIDE, shard, threads
from stream_samples import unit_of

from geoloc_batch.errors import StopRequested
from geoloc_batch.records import Unit, UnitEnd
from geoloc_batch.stream.batches import Batch, BatchStream


@pytest.mark.parametrize("when", ["before", "at once", "half-way", "at the end", "in the ring"])
def test_close_ends_all_threads_whenever_it_comes(tmp_path: Path, when: str) -> None:
    is_closed = threading.Event()

    def units() -> Iterator[Unit]:
        try:
            for index in range(50):
                yield shard(tmp_path, index, 4)
        finally:
            is_closed.set()

    stream = BatchStream(units(), side=SIDE, batch_size=3, config=CONFIG, ring=2)
    items = iter(stream)
    if when != "before":
        first = next(items)
        assert len(threads()) > 0
    if when == "half-way":
        assert isinstance(first, Batch | UnitEnd)
        for item, _ in zip(items, range(20), strict=False):
            if isinstance(item, Batch):
                item.release()
    elif when == "at the end":
        for item in chain([first], items):
            if isinstance(item, Batch):
                item.release()
    elif when == "in the ring":
        # Nothing is released: every decode thread waits for a buffer.
        time.sleep(0.2)
    stream.close()
    stream.close()
    assert threads() == []
    assert list(items) == []
    assert is_closed.is_set() == (when != "before")


def test_close_ends_a_consumer_that_waits_in_another_thread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never.tar")
    stream = BatchStream([unit_of(f"pipe:sleep 60; cat {tmp_path}/x")], side=SIDE, batch_size=2, config=CONFIG)
    got: list[object] = []
    consumer = threading.Thread(target=lambda: got.extend(stream))
    consumer.start()
    time.sleep(0.3)
    started = time.monotonic()
    stream.close()
    consumer.join(5)
    assert not consumer.is_alive()
    assert time.monotonic() - started < 5
    assert got == []


def test_a_signal_that_does_not_wake_the_waiting_consumer_is_seen_nevertheless() -> None:
    # As one that comes between the main thread's last look for signals and its sleep. Here another thread takes it.
    is_begun, is_over, in_time = threading.Event(), threading.Event(), []

    def units() -> Iterator[Unit]:
        is_begun.set()
        is_over.wait()
        yield from ()

    def ask(stream: BatchStream) -> None:
        is_begun.wait()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR2)
        in_time.append(is_over.wait(5))
        stream.close()

    def handle(*_: object) -> None:
        raise StopRequested

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        with BatchStream(units(), side=SIDE, batch_size=4, config=CONFIG) as stream:
            asker = threading.Thread(target=ask, args=(stream,))
            asker.start()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
            with pytest.raises(StopRequested):
                next(iter(stream), None)
            is_over.set()
            asker.join()
        assert in_time == [True]
    finally:
        is_over.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR2, before)


def test_what_the_units_raise_reaches_the_consumer(tmp_path: Path) -> None:
    class LeaseLostError(Exception):
        pass

    def units() -> Iterator[Unit]:
        yield shard(tmp_path, 0, 3)
        raise LeaseLostError("unit 1")

    with (
        BatchStream(units(), side=SIDE, batch_size=64, config=CONFIG) as stream,
        pytest.raises(LeaseLostError, match="unit 1") as caught,
    ):
        list(stream)
    assert "units" in "".join(traceback.format_tb(caught.tb))
