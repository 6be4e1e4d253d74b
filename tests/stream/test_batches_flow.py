"""Batches in time: who waits for whom, and what may wait. For how a stream ends see test_batches_end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batch_samples import CONFIG, SIDE, Run, released, shard, square
from stream_samples import jpeg, numbered, tar_bytes, unit_of, write_tar

from geoloc_batch.records import Unit
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
