"""Batches in time: who waits for whom, what may wait, and how a stream is closed."""

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
import torch
from batch_samples import CONFIG, SIDE, Run, released, shard, square, threads
from stream_samples import jpeg, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.errors import StopRequested
from geoloc_batch.records import Unit, UnitEnd
from geoloc_batch.stream import batches as batches_module
from geoloc_batch.stream import exchange as exchange_module
from geoloc_batch.stream.batches import Batch, BatchStream
from geoloc_batch.stream.budget import MemoryBudget
from geoloc_batch.stream.config import StreamConfig


def test_the_next_unit_is_asked_for_only_when_the_one_before_is_read(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []
    fifo = tmp_path / "slow.tar"
    os.mkfifo(fifo)

    def units() -> Iterator[Unit]:
        for index, path in enumerate((fifo, shard(tmp_path, 1, 2).source)):
            asked.append((index, threading.current_thread().name))
            yield unit_of(path, index=index)

    with BatchStream(units(), side=SIDE, batch_size=2, config=CONFIG) as stream:
        feeder = threading.Thread(target=feed, args=(fifo, tar_bytes(numbered(3)), asked))
        feeder.start()
        rows = [sample.key for item in stream if isinstance(item, Batch) for sample in released(item).samples]
        feeder.join(10)
    assert len(rows) == 5
    assert asked == [(0, "geoloc-read"), (1, "geoloc-read")]


def feed(fifo: Path, data: bytes, asked: list[tuple[int, str]]) -> None:
    with open(fifo, "wb", buffering=0) as file:
        file.write(data[:2000])
        time.sleep(0.2)
        # With the first unit still open, the second must not have been asked for.
        file.write(data[2000:] if len(asked) == 1 else b"")


def test_none_hands_over_what_is_partly_filled(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def units() -> Iterator[Unit | None]:
        yield shard(tmp_path, 0, 5)
        yield None
        assert may_go_on.wait(20)
        yield None
        yield shard(tmp_path, 1, 2)

    with BatchStream(units(), side=SIDE, batch_size=4, config=CONFIG) as stream:
        items = iter(stream)
        first = [next(items) for _ in range(3)]
        assert sorted(len(item.samples) for item in first if isinstance(item, Batch)) == [1, 4]
        (padded,) = (item for item in first if isinstance(item, Batch) and len(item.samples) == 1)
        assert not padded.pixels[1:].any()
        for item in first:
            if isinstance(item, Batch):
                item.release()
        may_go_on.set()
        rest = list(items)
    assert [len(item.samples) for item in rest if isinstance(item, Batch)] == [2]


def test_a_consumer_may_hold_all_batches_but_one(tmp_path: Path) -> None:
    with BatchStream([shard(tmp_path, 0, 23)], side=SIDE, batch_size=2, config=CONFIG, ring=4) as stream:
        held: list[Batch] = []
        seen: list[int] = []
        for item in stream:
            if isinstance(item, Batch):
                held.append(item)
                seen += [sample.row for sample in item.samples]
                # What is held must not be written to.
                for batch in held:
                    for row, sample in enumerate(batch.samples):
                        assert torch.equal(batch.pixels[row], square(sample.row))
                if len(held) == 3:
                    held.pop(0).release()
        assert sorted(seen) == list(range(23))


def test_a_second_release_does_not_free_a_buffer_that_was_lent_again(tmp_path: Path) -> None:
    with BatchStream([shard(tmp_path, 0, 6)], side=SIDE, batch_size=1, config=CONFIG, ring=1) as stream:
        batches = (item for item in stream if isinstance(item, Batch))
        first = next(batches)
        first.release()
        second = next(batches)
        pixels = second.pixels.clone()
        first.release()
        time.sleep(0.1)
        assert torch.equal(second.pixels, pixels)
        assert stream.stats().batches_ready == 0
        second.release()
        assert len(list(map(released, batches))) == 4


def test_the_reader_stops_at_the_bytes_that_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 40_000)
    members = [(f"{n}.jpg", jpeg(seed=n) + bytes(9000)) for n in range(200)]
    unit = unit_of(write_tar(tmp_path / "a.tar", members))
    with BatchStream([unit], side=SIDE, batch_size=2, config=CONFIG, ring=2) as stream:
        items = iter(stream)
        held = [next(items), next(items)]
        time.sleep(0.3)
        stats = stream.stats()
        assert 0 < stats.bytes_queued <= 40_000
        assert stats.samples_queued <= 4
        # Two batches, three photos in the threads' hands, those that wait, and the reader's own.
        assert stats.bytes_read < 20 * 12_000 + (1 << 20)
        for item in held:
            assert isinstance(item, Batch)
            item.release()
        rest = [released(item) for item in items if isinstance(item, Batch)]
    assert 2 * (len(rest) + 2) == 200


def test_a_photo_larger_than_all_that_may_wait_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_WAITING_BYTES", 10)
    assert len(Run([shard(tmp_path, 0, 7)]).pixels) == 7


def test_units_without_photos_do_not_run_ahead_of_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MAX_ENDS_AHEAD", 5)
    path = write_tar(tmp_path / "empty.tar", [])
    asked: list[int] = []

    def units() -> Iterator[Unit]:
        for index in range(50):
            asked.append(index)
            yield unit_of(path, index=index)

    with BatchStream(units(), side=SIDE, batch_size=2, config=CONFIG) as stream:
        items = iter(stream)
        next(items)
        time.sleep(0.2)
        assert len(asked) <= 8
        assert len(list(items)) == 49


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


def test_a_slow_photo_does_not_hold_the_others_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches_module.photo_pixels
    gate = threading.Event()

    def slow(data: bytes, *args: object, **options: object) -> torch.Tensor:
        if data == jpeg(seed=0):
            assert gate.wait(20)
        return real(data, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "photo_pixels", slow)
    with BatchStream([shard(tmp_path, 0, 9)], side=SIDE, batch_size=2, config=CONFIG) as stream:
        items = iter(stream)
        rows = []
        for _ in range(4):
            item = next(items)
            assert isinstance(item, Batch)
            rows += [sample.row for sample in item.samples]
            item.release()
        assert sorted(rows) == list(range(1, 9))
        gate.set()
        last = [item for item in items if isinstance(item, Batch)]
        assert [sample.row for batch in last for sample in batch.samples] == [0]


def test_a_photo_of_12_megapixels_does_not_stall_the_small_ones(tmp_path: Path) -> None:
    large = jpeg(3024, 4032, quality=60)
    members = [("large.jpg", large), *((f"{n:03d}.jpg", jpeg(seed=n)) for n in range(100))]
    unit = unit_of(write_tar(tmp_path / "a.tar", members))
    with BatchStream([unit], side=SIDE, batch_size=4, config=StreamConfig(decode_threads=2)) as stream:
        keys = [sample.key for item in stream if isinstance(item, Batch) for sample in released(item).samples]
    assert len(set(keys)) == 101
    # The large one takes as long as a thousand small ones, and was begun before them all.
    assert keys.index("large") > 40


def test_large_photos_at_a_time_stay_within_the_decode_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[MemoryBudget] = []

    def noted(limit: int) -> MemoryBudget:
        budgets.append(MemoryBudget(limit))
        return budgets[-1]

    monkeypatch.setattr(batches_module, "MemoryBudget", noted)
    large = jpeg(1512, 2016, quality=60)
    members = [(f"{n}.jpg", large) for n in range(6)]
    config = StreamConfig(decode_threads=4, decode_memory_mb=25)
    run = Run([unit_of(write_tar(tmp_path / "a.tar", members))], config=config)
    assert len(run.pixels) == 6
    # 9 MB each and some for resizing: two fit, four would not.
    assert 9_000_000 < budgets[0].peak <= 25 << 20


def test_the_next_unit_is_read_while_the_last_photos_of_one_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches_module.photo_pixels
    gate = threading.Event()
    held: list[bytes] = []

    def held_up(data: bytes, *args: object, **options: object) -> torch.Tensor:
        held.append(data)
        assert gate.wait(20)
        return real(data, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches_module, "photo_pixels", held_up)
    units = [shard(tmp_path, 0, 3), shard(tmp_path, 1, 5), shard(tmp_path, 2, 4)]
    with BatchStream(units, side=SIDE, batch_size=4, config=CONFIG) as stream:
        rows: list[int] = []
        consumer = threading.Thread(target=lambda: rows.extend(drained(stream)))
        consumer.start()
        deadline = time.monotonic() + 10
        # The three threads hold unit 0's photos; all of units 1 and 2 is read behind their backs.
        while (len(held) < 3 or stream.stats().samples_queued < 9) and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = stream.stats()
        gate.set()
        consumer.join(10)
    assert (stats.photos, stats.samples_queued) == (0, 9)
    assert len(rows) == 12


def drained(stream: BatchStream) -> list[int]:
    return [sample.row for item in stream if isinstance(item, Batch) for sample in released(item).samples]


def test_photos_larger_than_the_decode_memory_go_through_one_at_a_time(tmp_path: Path) -> None:
    photos = [(f"{n}.jpg", jpeg(900, 1200, seed=n)) for n in range(6)]
    config = StreamConfig(decode_threads=3, decode_memory_mb=1)
    run = Run([unit_of(write_tar(tmp_path / "a.tar", photos))], config=config)
    assert len(run.pixels) == 6
